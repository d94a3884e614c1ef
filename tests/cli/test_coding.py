"""`encode` and `decode` on files."""

import dataclasses
import os
from pathlib import Path

import numpy as np
import pytest
import soundfile

import mimi_jax
from mimi_jax import Mimi, checkpoint
from tests.cli.conftest import BAD_CODES, RATE, tone

OUTPUTS = {"encode": "out.safetensors", "roundtrip": "out.wav"}


def test_encode_and_decode(place: Path, run, tiny: list[str], models: Path):
    result = run("encode", "clip.wav", "-o", "out.safetensors", *tiny)
    assert result.status == 0, result.stderr
    assert result.stdout.startswith("wrote out.safetensors: 125 frames x 4 codebooks, 24.00 kbit/s; ")
    assert result.stderr == ""
    model = Mimi.from_pretrained(models / "tiny")
    audio = mimi_jax.load_audio("clip.wav")
    file = mimi_jax.load_codes("out.safetensors")
    np.testing.assert_array_equal(file.audio_codes, mimi_jax.encode(model, audio[None]).audio_codes[0])
    assert (file.num_samples, file.spec.sampling_rate) == (2000, RATE)
    assert file.spec.model_id == checkpoint.model_id(model)

    result = run("decode", "out.safetensors", "-o", "out.wav", *tiny)
    assert result.status == 0, result.stderr
    assert result.stdout.startswith("wrote out.wav: 125 frames x 4 codebooks")
    mimi_jax.save_audio(
        "expected.wav", mimi_jax.decode(model, file.audio_codes[None]).audio_values[0, :, :2000]
    )
    decoded, expected = (
        soundfile.read("out.wav", dtype="int16")[0],
        soundfile.read("expected.wav", dtype="int16")[0],
    )
    assert decoded.shape == (2000,)
    assert np.abs(decoded.astype(int) - expected).max() <= 1


def test_outputs_stand_beside_the_input(place: Path, run, tiny: list[str]):
    original = (place / "clip.wav").read_bytes()
    os.chdir("/")
    (place / "clip.safetensors").unlink()
    assert run("encode", place / "clip.wav", *tiny).stdout.startswith(f"wrote {place / 'clip.safetensors'}: ")
    assert run("decode", place / "clip.safetensors", *tiny).status == 0
    assert (place / "clip.decoded.wav").is_file()
    assert (place / "clip.wav").read_bytes() == original


def test_fewer_codebooks(place: Path, run, tiny: list[str]):
    assert (
        "2 codebooks"
        in run("encode", "clip.wav", "-o", "2.safetensors", "--num-quantizers", "2", *tiny).stdout
    )
    few, all_ = mimi_jax.load_codes("2.safetensors"), mimi_jax.load_codes("codes.safetensors")
    np.testing.assert_array_equal(few.audio_codes, all_.audio_codes[:2])
    assert run("decode", "2.safetensors", *tiny).status == 0


def test_a_model_of_the_first_codebooks_and_the_whole_read_each_other(
    place: Path, run, fails, tiny: list[str], models: Path
):
    Mimi.from_pretrained(models / "tiny", num_quantizers=2).save_pretrained("few")
    few = ["--model", "few"]
    assert run("encode", "clip.wav", "-o", "2.safetensors", "--num-quantizers", 2, *tiny).status == 0
    assert run("encode", "clip.wav", "-o", "few.safetensors", *few).status == 0
    assert Path("2.safetensors").read_bytes() == Path("few.safetensors").read_bytes()
    for name, model in (("few.wav", few), ("whole.wav", tiny)):
        assert run("decode", "2.safetensors", "-o", name, *model).status == 0
    assert Path("few.wav").read_bytes() == Path("whole.wav").read_bytes()
    line = fails("decode", "codes.safetensors", "-o", "out.wav", *few)
    assert (
        "few cannot decode codes.safetensors: the codes have 4 codebooks, but the model has only 2; " in line
    )


@pytest.mark.parametrize("rate", [8000, 16_000, 24_000, 44_100])
@pytest.mark.parametrize("suffix", [".wav", ".flac", ".ogg", ".mp3"])
def test_any_rate_and_format(place: Path, run, tiny: list[str], rate: int, suffix: str):
    mimi_jax.save_audio(f"in{suffix}", tone(rate // 20, channels=2), rate)
    assert run("encode", f"in{suffix}", "-o", "out.safetensors", *tiny).status == 0
    num_samples = mimi_jax.load_codes("out.safetensors").num_samples
    assert num_samples == mimi_jax.load_audio(f"in{suffix}").shape[1]
    if suffix in (".wav", ".flac"):
        assert num_samples == RATE // 20
    assert run("decode", "out.safetensors", "-o", "out.wav", *tiny).status == 0
    assert soundfile.info("out.wav").frames == num_samples


@pytest.mark.parametrize("suffix", [".flac", ".ogg", ".opus", ".mp3"])
def test_decode_to_other_formats(place: Path, run, tiny: list[str], suffix: str):
    assert run("decode", "codes.safetensors", "-o", f"out{suffix}", *tiny).status == 0
    assert mimi_jax.load_audio(f"out{suffix}").shape[1] >= 2000


BAD_AUDIO = {
    "empty.wav": "is empty",
    "text.wav": "is not a WAV, ",
    "truncated.wav": "is cut short",
    "half.wav": "is cut short",
    "junk.wav": "is not a WAV, ",
    "junk.mp3": "junk.mp3 ",
    "no_samples.wav": "has no samples",
    "nan.wav": "NaN or infinite",
    "missing.wav": "No such file or directory",
    "folder.wav": "Is a directory",
    "model.safetensors": "is not a WAV, ",
}


@pytest.mark.parametrize("name", BAD_AUDIO)
@pytest.mark.parametrize("command", ["encode", "roundtrip"])
def test_bad_audio(fails, tiny: list[str], command: str, name: str):
    assert BAD_AUDIO[name] in fails(command, name, "-o", OUTPUTS[command], *tiny)


@pytest.mark.parametrize("name", BAD_CODES)
def test_bad_codes(fails, tiny: list[str], name: str):
    assert BAD_CODES[name] in fails("decode", name, "-o", "out.wav", *tiny)


def test_codes_of_another_model(fails, models: Path):
    line = fails("decode", "codes.safetensors", "-o", "out.wav", "--model", models / "other")
    assert "cannot decode codes.safetensors: another model made the codes: their model_id is " in line
    assert "--model" in line


def test_codes_of_another_rate(fails, tiny: list[str]):
    file = mimi_jax.load_codes("codes.safetensors")
    slow = dataclasses.replace(file, spec=dataclasses.replace(file.spec, sampling_rate=16_000))
    mimi_jax.save_codes("slow.safetensors", slow)
    assert "their sampling_rate is 16000, that of the model 24000" in fails(
        "decode", "slow.safetensors", "-o", "out.wav", *tiny
    )


@pytest.mark.parametrize("number", ["0", "-1", "99", "5", "a", "1.5", ""])
@pytest.mark.parametrize("command", ["encode", "roundtrip"])
def test_bad_number_of_codebooks(fails, tiny: list[str], command: str, number: str):
    line = fails(command, "clip.wav", "-o", OUTPUTS[command], "--num-quantizers", number, *tiny, status=2)
    assert "num_quantizers must be an integer from 1 to 4" in line or "must be a whole number" in line
