"""The bundled model: small, trained, and stored in half precision."""

import json
from pathlib import Path

import numpy as np
import pytest
import safetensors

import mimi_jax
from mimi_jax import Mimi
from mimi_jax.checkpoint import BUNDLED

SAMPLE = BUNDLED.parent / "samples" / "speech.flac"


@pytest.fixture(scope="module")
def model() -> Mimi:
    return Mimi.from_pretrained("mini")


def test_topology(model: Mimi):
    config = model.config
    assert (config.sampling_rate, config.frame_rate, config.frame_size) == (24_000, 12.5, 1920)
    assert config.upsampling_ratios == (8, 6, 5, 4) and config.num_semantic_quantizers == 1
    assert config.use_causal_conv


def test_size():
    file = BUNDLED / "mini" / "model.safetensors"
    assert file.stat().st_size <= 8_000_000
    with safetensors.safe_open(file, "numpy") as tensors:
        assert {tensors.get_slice(name).get_dtype() for name in tensors.keys()} == {"F16"}  # noqa: SIM118
    assert json.loads((BUNDLED / "mini" / "config.json").read_text())["dtype"] == "float32"


def test_it_computes_in_float32(model: Mimi):
    assert model.encode_latents(np.zeros((1, 1, 1920), np.float32)).dtype == np.float32


def test_it_has_learned_speech(model: Mimi):
    """The voice is synthetic and was not in the training data. Random weights gave 0.35."""
    from pystoi import stoi

    audio = mimi_jax.load_audio(SAMPLE)
    codes = mimi_jax.encode(model, audio[None]).audio_codes
    stois = []
    for count in (1, model.config.num_quantizers):
        decoded = np.asarray(mimi_jax.decode(model, codes[:, :count]).audio_values)[0, 0]
        stois.append(stoi(audio[0], decoded[: audio.shape[1]], model.config.sampling_rate))
    assert stois[0] < stois[1] and stois[1] > 0.7


@pytest.mark.slow
def test_real_speech_is_understood(model: Mimi, shared_speech: list[Path]):
    """The speakers were not in the training data. The card of `mini` has more measures."""
    from pystoi import stoi

    clips = [mimi_jax.load_audio(path) for path in shared_speech if path.parent.name == "valid"]
    assert len(clips) == 17
    batch, mask = mimi_jax.pad_batch(clips, model.config.frame_size)
    codes = mimi_jax.encode(model, batch, mask).audio_codes
    means = []
    for count in (1, 16, 32):
        decoded = np.asarray(mimi_jax.decode(model, codes[:, :count], mask).audio_values)
        pairs = zip(clips, decoded, strict=True)
        rate = model.config.sampling_rate
        means.append(np.mean([stoi(clip[0], row[0, : clip.shape[1]], rate) for clip, row in pairs]))
    assert means[0] < means[1] < means[2] and means[2] >= 0.85
