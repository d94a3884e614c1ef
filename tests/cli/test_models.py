"""`info` and `convert`."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import mimi_jax
from mimi_jax import Mimi, checkpoint
from mimi_jax.cli.parser import LAYOUTS
from mimi_jax.files.codes import CodeSpec
from tests.cli.conftest import BAD_CODES, RATE


def test_info_of_codes(place: Path, run, models: Path):
    result = run("info", "codes.safetensors")
    assert result.status == 0, result.stderr
    identity = checkpoint.model_id(Mimi.from_pretrained(models / "tiny"))
    assert result.stdout.splitlines() == [
        "duration   0.08 s, 2000 samples",
        "frames     125, 1500 Hz",
        "codebooks  4 x 16 codes",
        "bitrate    24.00 kbit/s",
        f"model      {identity} (not a bundled model)",
    ]


@pytest.mark.parametrize("count", [2, 32])
def test_info_names_the_bundled_model_of_codes(place: Path, run, count: int):
    model = Mimi.from_pretrained("mini")
    config, identity = model.config, checkpoint.model_id(model, count)
    codes = np.zeros((count, 1), int)
    spec = CodeSpec(identity, RATE, config.frame_size, config.codebook_size, count)
    mimi_jax.save_codes("mini.safetensors", mimi_jax.CodeFile(spec, codes, 1))
    assert f"{identity} (mini)" in run("info", "mini.safetensors").stdout


@pytest.mark.parametrize("layout", LAYOUTS)
def test_convert_and_info_of_the_result(place: Path, run, models: Path, layout: str):
    result = run("convert", models / "tiny", "converted", "--to", layout)
    assert result.status == 0, result.stderr
    assert result.stdout.startswith("wrote converted: ")
    assert not list(place.glob(".tmp*"))
    result = run("info", "converted")
    assert result.status == 0, result.stderr
    rows = dict(line.split(maxsplit=1) for line in result.stdout.splitlines())
    assert (rows["model"], rows["layout"]) == ("converted", layout)
    assert rows["identity"] == checkpoint.model_id(Mimi.from_pretrained(models / "tiny"))
    tensors = load_file(models / "tiny" / "model.safetensors").values()
    assert rows["parameters"] == f"{sum(tensor.size for tensor in tensors):,}"

    assert run("convert", "converted", "back", "--to", "transformers").status == 0
    name = Path("model.safetensors")
    assert (place / "back" / name).read_bytes() == (models / "tiny" / name).read_bytes()


def test_info_of_a_bundled_model(run):
    result = run("info", "mini")
    assert result.status == 0
    assert "12.5 Hz, of 1920 samples" in result.stdout


@pytest.mark.parametrize("name", [*sorted(BAD_CODES.keys() - {"model.safetensors"}), "no/such/thing"])
def test_info_of_neither_a_model_nor_codes(fails, name: str):
    assert name in fails("info", name)


@pytest.mark.parametrize(("name", "kind"), [("clip.wav", "a WAV file"), ("text.safetensors", "text")])
def test_info_and_decode_say_what_they_got(fails, name: str, kind: str):
    error = f"error: {name} is neither a code file nor a model, but {kind}\n"
    assert fails("info", name).endswith(error)
    error = f"error: {name} is not a valid code file, but {kind}\n"
    assert fails("decode", name, "-o", "out.wav").endswith(error)


def test_convert_to_an_empty_folder(place: Path, run, models: Path):
    (place / "converted").mkdir()
    assert run("convert", models / "tiny", "converted", "--to", "kyutai").status == 0
    assert sorted(path.name for path in (place / "converted").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]


@pytest.mark.parametrize(
    "words",
    [
        ["encode", "clip.wav", "-o", "out", "--model"],
        ["decode", "codes.safetensors", "--model"],
        ["roundtrip", "clip.wav", "-o", "out.wav", "--model"],
        ["info"],
    ],
)
def test_unknown_model(fails, words: list[str]):
    assert "unknown model 'maxi': give a bundled model" in fails(*words, "maxi")


def test_unknown_model_to_convert(fails):
    assert "unknown model 'maxi'" in fails("convert", "maxi", "converted", "--to", "kyutai")


def test_checkpoint_with_wrong_tensors(fails, models: Path, place: Path):
    tensors = load_file(models / "tiny" / "model.safetensors")
    del tensors["upsample.conv.weight"]
    tensors["downsample.conv.weight"] = tensors["downsample.conv.weight"][1:]
    tensors["decoder.extra"] = np.zeros(3, np.float32)
    (place / "broken").mkdir()
    save_file(tensors, place / "broken" / "model.safetensors")
    shutil.copy(models / "tiny" / "config.json", place / "broken")
    for words in (["info", "broken"], ["roundtrip", "clip.wav", "-o", "out.wav", "--model", "broken"]):
        line = fails(*words)
        assert "missing upsample.conv.weight" in line
        assert "unexpected decoder.extra" in line
        assert "downsample.conv.weight is float32 [15, 16, 4], expected floating point [16, 16, 4]" in line


@pytest.mark.parametrize(
    ("config", "error"),
    [
        ("{", "config.json: "),
        ('{"hidden_sise": 8}', "unknown field 'hidden_sise'"),
        ('{"audio_channels": 3}', "1 or 2"),
    ],
)
def test_bad_configuration(fails, place: Path, models: Path, config: str, error: str):
    shutil.copytree(models / "tiny", place / "broken")
    (place / "broken" / "config.json").write_text(config)
    assert error in fails("encode", "clip.wav", "-o", "out", "--model", "broken")


@pytest.mark.parametrize("half", ["encoder", "decoder"])
def test_half_a_model(fails, run, place: Path, models: Path, half: str):
    model = Mimi.from_pretrained(models / "tiny", encoder=half != "encoder", decoder=half != "decoder")
    model.save_pretrained(place / "half")
    command = ["encode", "clip.wav", "-o", "out"] if half == "encoder" else ["decode", "codes.safetensors"]
    fails(*command, "--model", "half")
    assert run("info", "half").status == 0


def test_convert_refuses_pytorch_files(fails, place: Path):
    (place / "pytorch_model.bin").write_bytes(b"pickle")
    line = fails("convert", "pytorch_model.bin", "converted", "--to", "flax")
    assert "convert it with convert/convert_checkpoint.py" in line


@pytest.mark.parametrize("output", ["missing/converted", "clip.wav/converted", "/proc/converted"])
def test_convert_to_an_unwritable_place(fails, too_late: None, output: str):
    assert f"cannot write {output}: " in fails("convert", "mini", output, "--to", "flax")


def test_a_failed_convert_leaves_nothing(fails, models: Path):
    line = fails("convert", models / "gqa", "converted", "--to", "kyutai")
    assert "the Kyutai layout holds neither" in line
