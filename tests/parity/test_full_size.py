"""At full size, codes and audio equal those of `transformers` and `moshi` (real speech, if there is some)."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import MimiModel

import mimi_jax
from mimi_jax import Mimi, checkpoint
from tests.parity.conftest import SPEECH
from tests.parity.references import flat_state, kyutai_state, moshi_model_from
from tests.parity.table import OTHER_LENGTHS, WHOLE_LENGTHS, Parity, compare, speech

pytestmark = pytest.mark.parity

LONGEST = max(WHOLE_LENGTHS + OTHER_LENGTHS)


@pytest.fixture(scope="module")
def audio() -> np.ndarray:
    return speech(SPEECH if SPEECH.is_dir() else None, LONGEST)


@pytest.fixture(scope="module")
def moshi(reference: Any) -> Any:
    return moshi_model_from(reference)


def check(parity: Parity) -> None:
    print(parity.row(), file=sys.stderr)
    for gap in parity.gaps:
        print(f"differing code, relative distance gap {gap:.1e}", file=sys.stderr)
    assert parity.agreement >= 0.999
    assert parity.semantic_agreement >= 0.999
    assert parity.audio_error <= 1e-5


@pytest.mark.parametrize("num_samples", WHOLE_LENGTHS + OTHER_LENGTHS)
def test_equals_transformers(model: Mimi, reference: Any, audio: np.ndarray, num_samples: int):
    check(compare(model, reference, audio[:, :, :num_samples]))


@pytest.mark.parametrize("num_samples", WHOLE_LENGTHS)
def test_equals_moshi_on_whole_frames(
    model: Mimi, reference: Any, moshi: Any, audio: np.ndarray, num_samples: int
):
    check(compare(model, reference, audio[:, :, :num_samples], moshi))


@torch.no_grad()
def test_pad_to_frame_gives_kyutais_tail(model: Mimi, moshi: Any, audio: np.ndarray):
    clip = audio[:, :, :50_000]
    padded = mimi_jax.pad_to_frame(clip, model.config)
    codes = np.asarray(mimi_jax.encode(model, padded).audio_codes)
    np.testing.assert_array_equal(codes, moshi.encode(torch.from_numpy(clip)).numpy())


def test_batched_equals_alone(model: Mimi, audio: np.ndarray):
    """Rows of a ragged batch, with NaN in their padding, get exactly the codes that they get alone."""
    lengths = (48_000, 30_001, 1, 47_999)
    clips = [audio[0, 0, 10_000 * i : 10_000 * i + length] for i, length in enumerate(lengths)]
    batch, mask = mimi_jax.pad_batch(clips)
    batch = np.where(mask[:, None], batch, np.nan)
    out = mimi_jax.encode(model, batch, mask)
    differing = 0
    for row, clip in enumerate(clips):
        alone = np.asarray(mimi_jax.encode(model, clip[None, None]).audio_codes)[0]
        frames = alone.shape[1]
        differing += int((np.asarray(out.audio_codes)[row, :, :frames] != alone).sum())
        assert np.asarray(out.audio_codes_mask)[row].sum() == frames
    assert differing == 0


def test_steps_equal_whole_beyond_two_windows(model: Mimi, audio: np.ndarray):
    """21 s in steps of one frame, which is beyond the window. There Kyutai's own stream drifts."""
    clip = np.tile(audio, (1, 1, 2))[:, :, : 264 * 1920]
    codes = mimi_jax.encode(model, clip).audio_codes
    state, stepped = model.init_encoder_state(1), []
    for frame in np.split(clip, 264, axis=2):
        state, new = mimi_jax.encode_step(model, state, frame)
        stepped.append(new)
    assert np.mean(np.concatenate(stepped, axis=2) == codes) >= 0.999

    whole = mimi_jax.decode(model, codes).audio_values
    state, pieces = model.init_decoder_state(1), []
    for part in np.split(np.asarray(codes), 264, axis=2):
        state, new = mimi_jax.decode_step(model, state, part)
        pieces.append(new)
    error = np.linalg.norm(np.concatenate(pieces, axis=2) - whole) / np.linalg.norm(whole)
    assert error <= 1e-5


@torch.no_grad()
def test_weights_return_to_transformers_bit_for_bit(
    model: Mimi, reference: Any, audio: np.ndarray, tmp_path: Path
):
    model.save_pretrained(tmp_path)
    returned = MimiModel.from_pretrained(tmp_path).eval()
    expected, got = flat_state(reference), flat_state(returned)
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(got[name], tensor), name
    wave = torch.from_numpy(audio[:, :, :48_000])
    codes = returned.encode(wave).audio_codes
    assert codes is not None and torch.equal(codes, reference.encode(wave).audio_codes)


@torch.no_grad()
def test_the_first_codebooks_load_in_transformers(
    model: Mimi, reference: Any, audio: np.ndarray, tmp_path: Path
):
    checkpoint.keep_codebooks(model, 8).save_pretrained(tmp_path)
    returned, wave = MimiModel.from_pretrained(tmp_path).eval(), torch.from_numpy(audio[:, :, :48_000])
    codes = returned.encode(wave).audio_codes
    assert codes is not None and torch.equal(codes, reference.encode(wave, num_quantizers=8).audio_codes)
    decoded = returned.decode(codes).audio_values
    assert decoded is not None and torch.equal(decoded, reference.decode(codes).audio_values)


def test_kyutai_layout_bit_for_bit(model: Mimi, reference: Any, tmp_path: Path):
    """Kyutai's file, without a config.json, loads as the same model and is written as the same file."""
    import safetensors.torch

    expected = kyutai_state(reference)
    safetensors.torch.save_file(
        {name: tensor.contiguous() for name, tensor in expected.items()}, tmp_path / "tokenizer.safetensors"
    )
    loaded = Mimi.from_pretrained(tmp_path / "tokenizer.safetensors")
    assert checkpoint.model_id(loaded) == checkpoint.model_id(model)
    checkpoint.save(loaded, tmp_path / "kyutai", "kyutai")
    got = safetensors.torch.load_file(tmp_path / "kyutai" / "model.safetensors")
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(got[name], tensor), name
