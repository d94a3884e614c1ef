"""One file for three platforms: loaded again, it gives what the model gives."""

import functools
import json
import re
import zipfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mimi_jax import checkpoint, export
from mimi_jax.export import ExportedMimi
from mimi_jax.model import decode, decode_step, encode, encode_step
from mimi_jax.streams.rows import reset_rows, take_rows
from tests.models import load_fixture, random_like, relative_error

MODEL, CLIPS = load_fixture("kyutai")
CLIP = CLIPS[0]  # two rows, 16 frames of 16 samples
FRAME = MODEL.config.frame_size
SECONDS = 16 * FRAME / MODEL.config.sampling_rate
save = functools.partial(export.save, batch_size=2, seconds=SECONDS)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("export") / "mimi.zip"
    save(MODEL, path)
    return path


@pytest.fixture(scope="module")
def codec(path: Path) -> ExportedMimi:
    return export.load(path)


def test_metadata(codec: ExportedMimi):
    assert codec.config == MODEL.config
    expected = (MODEL.config, ("cpu", "cuda", "tpu"), jax.__version__, checkpoint.model_id(MODEL), 2)
    assert codec.metadata == (*expected, MODEL.config.num_quantizers, 16)


def test_every_function_is_there_for_every_platform(path: Path):
    with zipfile.ZipFile(path) as file:
        programs = {name: file.read(name) for name in file.namelist() if name.endswith(".bin")}
        stored = safetensors_shapes(file.read("weights.safetensors"))
    assert programs.keys() == {"encode.bin", "decode.bin", "encode_step.bin", "decode_step.bin"}
    for program in programs.values():
        assert jax.export.deserialize(bytearray(program)).platforms == ("cpu", "cuda", "tpu")
    assert "decoder.first.kernel" in stored and not any("embedding_sum" in name for name in stored)


def safetensors_shapes(data: bytes) -> dict[str, Any]:
    """The header of a safetensors file."""
    size = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + size])


@pytest.mark.parametrize("num_samples", [16 * FRAME, 5 * FRAME, 5 * FRAME - 3, 1])
def test_clips_of_every_length(codec: ExportedMimi, num_samples: int):
    audio = CLIP.audio[:, :, :num_samples]
    out, expected = codec.encode(audio), encode(MODEL, audio)
    np.testing.assert_array_equal(out.audio_codes, expected.audio_codes)
    np.testing.assert_array_equal(out.audio_codes_mask, expected.audio_codes_mask)
    decoded = codec.decode(out.audio_codes).audio_values
    assert relative_error(decoded, decode(MODEL, expected.audio_codes).audio_values) < 1e-5


def test_reference_numbers(codec: ExportedMimi):
    np.testing.assert_array_equal(codec.encode(CLIP.audio).audio_codes, CLIP.audio_codes)
    assert relative_error(codec.decode(CLIP.audio_codes).audio_values, CLIP.audio_values) < 1e-5


def test_rows_of_unequal_length(codec: ExportedMimi):
    mask = np.arange(9 * FRAME) < np.array([[4 * FRAME + 1], [9 * FRAME]])
    audio = np.where(mask[:, None], CLIP.audio[:, :, : 9 * FRAME], np.nan)
    out, expected = codec.encode(audio, mask), encode(MODEL, audio, mask)
    np.testing.assert_array_equal(out.audio_codes, expected.audio_codes)
    np.testing.assert_array_equal(out.audio_codes_mask, expected.audio_codes_mask)
    decoded = codec.decode(out.audio_codes, mask).audio_values
    wanted = decode(MODEL, expected.audio_codes, mask).audio_values
    assert relative_error(decoded, wanted) < 1e-5
    assert not np.any(decoded[0, :, 4 * FRAME + 1 :])


def test_corners_of_decode(codec: ExportedMimi):
    """No frames at all, and a mask with holes, of which one is at its end."""
    codes = np.asarray(CLIP.audio_codes)
    assert codec.decode(codes[:, :, :0]).audio_values.shape == (len(codes), 1, 0)
    mask = np.ones((len(codes), 4 * FRAME), bool)
    mask[:, FRAME : FRAME + 5] = mask[:, 4 * FRAME - 3 :] = False
    decoded, wanted = (
        f(codes[:, :, :4], mask).audio_values for f in (codec.decode, functools.partial(decode, MODEL))
    )
    assert decoded.shape == wanted.shape and relative_error(decoded, wanted) < 1e-5
    with pytest.raises(ValueError, match=r"padding_mask must be that of the audio, .*, got 4 samples"):
        codec.decode(codes[:, :, :4], np.ones((len(codes), 4), bool))


def test_steps(codec: ExportedMimi):
    """A stream whose rows pause and end, in the file and in the model."""
    states: list[Any] = [codec.init_encoder_state(), codec.init_decoder_state()]
    wanted: list[Any] = [MODEL.init_encoder_state(2), MODEL.init_decoder_state(2)]
    for index in range(4):
        frame = CLIP.audio[:, :, index * FRAME : (index + 1) * FRAME]
        active = np.array([True, index != 1])
        mask = np.arange(FRAME) < np.array([[FRAME], [FRAME if index < 3 else 3]])
        states[0], codes = codec.encode_step(states[0], frame, mask, active)
        wanted[0], expected = encode_step(MODEL, wanted[0], frame, mask, active=active)
        np.testing.assert_array_equal(codes, expected)
        states[1], audio = codec.decode_step(states[1], codes, active)
        wanted[1], expected = decode_step(MODEL, wanted[1], codes, active)
        assert relative_error(audio, expected) < 1e-5
    for actual, expected in zip(jax.tree.leaves(states), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)


def test_steps_give_the_codes_of_the_whole(codec: ExportedMimi):
    state, codes = codec.init_encoder_state(), []
    for start in range(0, 16 * FRAME, FRAME):
        state, new = codec.encode_step(state, CLIP.audio[:, :, start : start + FRAME])
        codes.append(new)
    np.testing.assert_array_equal(jnp.concatenate(codes, axis=2), CLIP.audio_codes)


def test_a_state_has_its_batch_on_the_first_axis(codec: ExportedMimi):
    state, _ = codec.encode_step(codec.init_encoder_state(), CLIP.audio[:, :, :FRAME])
    assert {len(leaf) for leaf in take_rows(state, [1])} == {1}
    for leaf, fresh in zip(reset_rows(state, [True, True]), codec.init_encoder_state(), strict=True):
        np.testing.assert_array_equal(leaf, fresh)


def test_inside_jit(codec: ExportedMimi):
    codes = jax.jit(lambda audio: codec.encode(audio).audio_codes)(CLIP.audio[:, :, : 3 * FRAME])
    np.testing.assert_array_equal(codes, CLIP.audio_codes[:, :, :3])


def test_bfloat16_and_fewer_codebooks(tmp_path: Path):
    model = MODEL.astype(jnp.bfloat16)
    save(model, tmp_path / "half.zip", num_quantizers=2, platforms=("cpu", "tpu"))
    codec = export.load(tmp_path / "half.zip")
    assert codec.metadata.model_id == checkpoint.model_id(model, 2) != checkpoint.model_id(model)
    codes = codec.encode(CLIP.audio).audio_codes
    np.testing.assert_array_equal(codes, encode(model, CLIP.audio, num_quantizers=2).audio_codes)
    audio = codec.decode(codes).audio_values
    assert audio.dtype == jnp.bfloat16
    assert relative_error(audio, decode(model, codes).audio_values) < 1e-2


def test_device_kernels_of_one_platform_stay_out(tmp_path: Path):
    model = checkpoint.abstract_model(MODEL.config, compute={"attention": "cudnn"})
    save(random_like(model, seed=0), tmp_path / "mimi.zip")
    assert np.all(export.load(tmp_path / "mimi.zip").encode(CLIP.audio).audio_codes_mask)


def test_halves(tmp_path: Path):
    without = checkpoint.abstract_model(MODEL.config, decoder=False)
    save(random_like(without, seed=0), tmp_path / "encoder.zip")
    codec = export.load(tmp_path / "encoder.zip")
    codec.encode_step(codec.init_encoder_state(), CLIP.audio[:, :, :FRAME])
    with pytest.raises(ValueError, match="this file has no decode, only encode, encode_step; export a model"):
        codec.decode(CLIP.audio_codes)
    with pytest.raises(ValueError, match="this file has no decode_step"):
        codec.init_decoder_state()


def test_a_model_that_looks_ahead_has_no_steps(tmp_path: Path):
    model, clips = load_fixture("noncausal")
    audio = clips[0].audio
    config = model.config
    seconds = 20 * config.frame_size / config.sampling_rate
    export.save(model, tmp_path / "mimi.zip", batch_size=len(audio), seconds=seconds)
    codec = export.load(tmp_path / "mimi.zip")
    audio = audio[:, :, : 9 * config.frame_size]
    codes = codec.encode(audio).audio_codes
    np.testing.assert_array_equal(codes, encode(model, audio).audio_codes)
    expected = decode(model, codes).audio_values
    assert relative_error(codec.decode(codes).audio_values, expected) < 1e-5
    with pytest.raises(ValueError, match="this file has no encode_step"):
        codec.init_encoder_state()


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"platforms": ("cpu", "gpu")}, "platforms must be some of cpu, cuda, tpu, got ['cpu', 'gpu']"),
        ({"platforms": ()}, "platforms must be some of"),
        ({"batch_size": 0}, "batch_size must be a positive integer, got 0"),
        ({"seconds": 0.0}, "seconds must be positive, got 0.0"),
        ({"seconds": float("nan")}, "seconds must be positive, got nan"),
        ({"num_quantizers": 99}, "num_quantizers must be an integer from 1 to"),
    ],
)
def test_save_refuses(tmp_path: Path, arguments: dict[str, Any], error: str):
    with pytest.raises(ValueError, match=re.escape(error)):
        save(MODEL, tmp_path / "mimi.zip", **arguments)
    assert not list(tmp_path.iterdir())


CODES = CLIP.audio_codes
REFUSED = [
    ("encode", (CLIP.audio[:1],), "this file takes batches of 2, got one of 1"),
    ("encode", (np.tile(CLIP.audio, 2),), "this file takes up to 256 samples at once, got 512"),
    ("encode", (CLIP.audio[0],), "audio must be [batch, channels=1, samples > 0]"),
    ("encode", (CLIP.audio, np.ones((2, 3))), "padding_mask must cover 256 samples, got 3"),
    ("decode", (CODES[:, :2],), "codes must be [batch, codebooks=4, frames], got [2, 2, 16]"),
    ("decode", (CODES / 1,), "codes must be integers"),
    ("decode", (np.tile(CODES, 2),), "this file takes up to 16 frames of codes, got 32"),
    ("encode_step", ([], CLIP.audio[:, :, :3]), "a step takes one frame, 16 samples, got 3; pad"),
    ("decode_step", ([], CODES), "a step takes one frame of codes, got 16"),
    ("decode_step", ([], CODES[:, :, :1], np.ones(1)), "active must be bool [batch=2]"),
]


@pytest.mark.parametrize(("method", "arguments", "error"), REFUSED)
def test_functions_refuse(codec: ExportedMimi, method: str, arguments: tuple, error: str):
    with pytest.raises(ValueError, match=re.escape(error)):
        getattr(codec, method)(*arguments)


def changed(path: Path, to: Path, **fields: Any) -> Path:
    """The same file with other metadata."""
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(to, "w") as new:
        for name in old.namelist():
            data = old.read(name)
            if name == "metadata.json":
                data = json.dumps({**json.loads(data), **fields})
            new.writestr(name, data)
    return to


def test_load_refuses_other_files(path: Path, tmp_path: Path):
    other = tmp_path / "other.zip"
    with pytest.raises(FileNotFoundError):
        export.load(other)
    other.write_bytes(b"no zip")
    with pytest.raises(
        ValueError, match=r"other\.zip: not an exported model, or a damaged one \(File is not"
    ):
        export.load(other)
    with zipfile.ZipFile(other, "w") as file:
        file.writestr("anything", b"")
    with pytest.raises(ValueError, match=r"There is no item named 'metadata\.json'"):
        export.load(other)
    with pytest.raises(ValueError, match=r"format must be 'mimi_jax\.export\.1', got 'other'"):
        export.load(changed(path, other, format="other"))
    with pytest.raises(ValueError, match="damaged"):
        export.load(changed(path, other, unknown=1))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    other.write_bytes(data)
    with pytest.raises(ValueError, match="Bad CRC-32"):
        export.load(other)


def test_load_refuses_another_platform(tmp_path: Path):
    save(MODEL, tmp_path / "tpu.zip", platforms=("tpu",))
    with pytest.raises(ValueError, match=r"tpu\.zip: made for tpu, and this is cpu; name that in platforms"):
        export.load(tmp_path / "tpu.zip")


def test_load_refuses_another_version_of_the_serialization(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def refuse(program: bytearray) -> None:
        raise NotImplementedError("deserialize unsupported version 99")

    monkeypatch.setattr(jax.export, "deserialize", refuse)
    other = changed(path, tmp_path / "other.zip", jax_version="0.99")
    with pytest.raises(ValueError, match=r"jax .* cannot read what jax 0\.99 wrote; export the model again"):
        export.load(other)


def test_implementations_can_be_named(tmp_path: Path):
    """What is named is in the programs; what does not exist is refused."""
    with pytest.raises(
        ValueError, match=r"compute\['attention'\] must be one of reference, banded, .* got 'flash'"
    ):
        save(MODEL, tmp_path / "mimi.zip", compute={"attention": "flash"})
    save(MODEL, tmp_path / "mimi.zip", compute={"attention": "banded"}, platforms=["cpu"])
    codes = export.load(tmp_path / "mimi.zip").encode(CLIP.audio).audio_codes
    np.testing.assert_array_equal(codes, encode(MODEL, CLIP.audio).audio_codes)
