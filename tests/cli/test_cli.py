"""The command line: what it writes, and that every failure is one line and leaves nothing behind."""

import dataclasses
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import soundfile
from safetensors.numpy import load_file, save_file

import mimi_jax
from mimi_jax import Mimi, checkpoint, cli
from mimi_jax.cli.parser import LAYOUTS
from mimi_jax.files.codes import CodeSpec
from tests.models import load_fixture

ROOT = Path(__file__).parents[2]
RATE = 24_000
COMMANDS = ["encode", "decode", "roundtrip", "info", "convert", "tokenize", "train", "evaluate"]


class Run(NamedTuple):
    status: int
    stdout: str
    stderr: str


def tone(num_samples: int, channels: int = 1) -> np.ndarray:
    """float32 [channels, samples]."""
    tones = [np.sin(0.05 * (c + 1) * np.arange(num_samples)) for c in range(channels)]
    return 0.5 * np.array(tones, np.float32)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of models: tiny, one of other codes, and one that can neither stream nor mix to mono."""
    folder = tmp_path_factory.mktemp("models")
    for name, fixture in {"tiny": "base", "other": "groups1", "gqa": "gqa", "whole": "noncausal"}.items():
        load_fixture(fixture).model.save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="session")
def made(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a clip, its codes, and files that look like either and are not."""
    folder = tmp_path_factory.mktemp("made")
    mimi_jax.save_audio(folder / "clip.wav", tone(2000))
    tiny = ["--model", str(models / "tiny")]
    assert cli.main(["encode", str(folder / "clip.wav"), *tiny]) == 0
    (folder / "codes.safetensors").write_bytes((folder / "clip.safetensors").read_bytes())
    wav, codes = (folder / "clip.wav").read_bytes(), (folder / "codes.safetensors").read_bytes()
    for suffix, data in ((".wav", wav), (".safetensors", codes)):
        (folder / f"empty{suffix}").write_bytes(b"")
        (folder / f"text{suffix}").write_text("This is neither audio nor codes.\nIt goes on.\n")
        (folder / f"truncated{suffix}").write_bytes(data[:-100])
        (folder / f"half{suffix}").write_bytes(data[: len(data) // 8])
        junk = np.random.default_rng(0).integers(0, 256, 5000, np.uint8).tobytes()
        (folder / f"junk{suffix}").write_bytes(junk)
        (folder / f"folder{suffix}").mkdir()
    (folder / "junk.mp3").write_bytes(b"\xff\xfb\x90\x00" + junk)
    soundfile.write(folder / "no_samples.wav", np.zeros((0, 1)), RATE)
    soundfile.write(folder / "nan.wav", np.full((99, 1), np.nan), RATE, subtype="FLOAT")
    (folder / "model.safetensors").write_bytes((models / "tiny" / "model.safetensors").read_bytes())
    return folder


@pytest.fixture
def place(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of `made`, which is the current folder."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def tiny(models: Path) -> list[str]:
    return ["--model", str(models / "tiny")]


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]):
    """Run a command; what C libraries write to stderr counts too."""

    def run(*words: str | Path) -> Run:
        capfd.readouterr()
        status = cli.main([str(word) for word in words])
        output = capfd.readouterr()
        return Run(status, str(output.out), str(output.err))

    return run


def contents(folder: Path) -> dict[Path, bytes | None]:
    """Everything in a folder, with its bytes; None for a folder."""
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@pytest.fixture
def fails(run, place: Path):
    """Run a command that must fail, and check that it does so cleanly; returns its line."""

    def fails(*words: str | Path, status: int = 1) -> str:
        before = contents(place)
        result = run(*words)
        assert result.stdout == ""
        assert result.stderr.count("\n") == 1, result.stderr
        assert result.status == status, result.stderr
        assert contents(place) == before
        name = f"mimi-jax {words[0]}" if words and words[0] in COMMANDS else "mimi-jax"
        assert result.stderr.startswith(f"{name}: error: ")
        return result.stderr

    return fails


# encode, decode, roundtrip


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


@pytest.mark.parametrize("num_samples", [1, 2000])
def test_roundtrip(place: Path, run, tiny: list[str], num_samples: int):
    mimi_jax.save_audio("in.wav", tone(num_samples))
    result = run("roundtrip", "in.wav", "-o", "out.wav", "--num-quantizers", "2", *tiny)
    assert result.status == 0, result.stderr
    for word in ("model ", f"{num_samples} samples", "2 x 16 codes", "12.00 kbit/s", " dB\n", "x realtime"):
        assert word in result.stdout
    assert "so they do not include compilation" in result.stdout
    assert soundfile.info("out.wav").frames == num_samples
    assert Path("out.png").read_bytes().startswith(b"\x89PNG")
    assert not list(place.glob(".tmp*"))


def test_roundtrip_of_a_model_that_cannot_stream(place: Path, run, models: Path):
    assert run("roundtrip", "clip.wav", "-o", "out.wav", "--model", models / "whole").status == 0
    assert soundfile.info("out.wav").frames == 2000


def test_roundtrip_needs_matplotlib_before_it_works(fails, tiny: list[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(Mimi, "from_pretrained", None)
    assert "pip install 'mimi_jax[plot]'" in fails("roundtrip", "clip.wav", "-o", "out.wav", *tiny)


def test_roundtrip_writes_two_files_or_none(fails, tiny: list[str], monkeypatch: pytest.MonkeyPatch):
    def full(*_):
        raise OSError(28, "No space left on device", "out.wav")

    monkeypatch.setattr("mimi_jax.files.audio.save_audio", full)
    line = fails("roundtrip", "clip.wav", "-o", "out.wav", "--num-quantizers", "2", *tiny)
    assert line == "mimi-jax roundtrip: error: out.wav: No space left on device\n"


# info and convert


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


def test_convert_to_an_empty_folder(place: Path, run, models: Path):
    (place / "converted").mkdir()
    assert run("convert", models / "tiny", "converted", "--to", "kyutai").status == 0
    assert sorted(path.name for path in (place / "converted").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]


# failures

BAD_AUDIO = {
    "empty.wav": "is empty",
    "text.wav": "is not a WAV, FLAC, OGG or MP3 file",
    "truncated.wav": "is cut short",
    "half.wav": "is cut short",
    "junk.wav": "is not a WAV, FLAC, OGG or MP3 file",
    "junk.mp3": "junk.mp3 ",
    "no_samples.wav": "has no samples",
    "nan.wav": "NaN or infinite",
    "missing.wav": "No such file or directory",
    "folder.wav": "Is a directory",
    "codes.safetensors": "is not a WAV, FLAC, OGG or MP3 file",
}


@pytest.mark.parametrize("name", BAD_AUDIO)
@pytest.mark.parametrize("command", ["encode", "roundtrip"])
def test_bad_audio(fails, tiny: list[str], command: str, name: str):
    assert BAD_AUDIO[name] in fails(command, name, "-o", "out.wav", *tiny)


BAD_CODES = {
    "empty.safetensors": "is not a valid code file",
    "text.safetensors": "is not a valid code file",
    "truncated.safetensors": "is not a valid code file",
    "half.safetensors": "is not a valid code file",
    "junk.safetensors": "is not a valid code file",
    "model.safetensors": "is not a valid code file",
    "clip.wav": "is not a valid code file",
    "missing.safetensors": "No such file or directory",
    "folder.safetensors": "Is a directory",
}


@pytest.mark.parametrize("name", BAD_CODES)
def test_bad_codes(fails, tiny: list[str], name: str):
    assert BAD_CODES[name] in fails("decode", name, "-o", "out.wav", *tiny)


@pytest.mark.parametrize("name", [*sorted(BAD_CODES.keys() - {"model.safetensors"}), "no/such/thing"])
def test_info_of_what_is_neither(fails, name: str):
    assert name in fails("info", name)


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
    line = fails(command, "clip.wav", "-o", "out.wav", "--num-quantizers", number, *tiny, status=2)
    assert "num_quantizers must be an integer from 1 to 4" in line or "invalid int value" in line


BAD_OUTPUTS = {
    "missing/out.wav": "there is no folder",
    "clip.wav/out.wav": "there is no folder",
    "folder.wav": "it is a folder",
    "/proc/out.wav": "no file can be made in",
    "/dev/full": "it is a folder or a device",
}


@pytest.fixture
def too_late(monkeypatch: pytest.MonkeyPatch) -> None:
    def compute(*_, **__):
        raise AssertionError("this should have been found out before any work")

    monkeypatch.setattr(Mimi, "from_pretrained", compute)


@pytest.mark.parametrize("output", BAD_OUTPUTS)
@pytest.mark.parametrize(
    "command", [("encode", "clip.wav"), ("decode", "codes.safetensors"), ("roundtrip", "clip.wav")]
)
def test_unwritable_output(fails, too_late: None, command: tuple[str, str], output: str):
    assert BAD_OUTPUTS[output] in fails(*command, "-o", output)


def test_a_folder_where_the_picture_goes(fails, too_late: None, place: Path):
    (place / "out.png").mkdir()
    assert "cannot write out.png" in fails("roundtrip", "clip.wav", "-o", "out.wav")


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["encode", "clip.wav", "-o", "clip.wav"], "clip.wav is the input and would be overwritten"),
        (["encode", "clip.wav", "-o", "./clip.wav"], "is the input"),
        (["encode", "text.safetensors"], "is the input"),
        (["roundtrip", "clip.wav", "-o", "clip.wav"], "is the input"),
        (["decode", "codes.safetensors", "-o", "codes.safetensors"], "is the input"),
        (["decode", "codes.safetensors", "-o", "out.txt"], "must end in .flac, .mp3"),
        (["roundtrip", "clip.wav", "-o", "out"], "must end in .flac, .mp3"),
        (["roundtrip", "clip.wav"], "the following arguments are required: -o"),
        (["convert", "mini", "converted"], "the following arguments are required: --to"),
        (["convert", "mini", "converted", "--to", "onnx"], "invalid choice: 'onnx'"),
        (["convert", "mini", ".", "--to", "flax"], ". exists; name a new folder"),
        (["convert", "mini", "clip.wav", "--to", "flax"], "clip.wav exists; name a new folder"),
        (["encode"], "the following arguments are required: IN"),
        (["encode", "clip.wav", "--loud"], "unrecognized arguments: --loud"),
        (["transmogrify"], "invalid choice: 'transmogrify'"),
        ([], "the following arguments are required: COMMAND"),
    ],
)
def test_bad_usage(fails, too_late: None, words: list[str], error: str):
    assert error in fails(*words, status=2)


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


def test_convert_leaves_nothing_where_it_fails(fails, models: Path):
    line = fails("convert", models / "gqa", "converted", "--to", "kyutai")
    assert "the Kyutai layout holds neither" in line


def test_interrupt(fails, tiny: list[str], monkeypatch: pytest.MonkeyPatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("mimi_jax.streams.chunks.encode_step", interrupt)
    assert (
        fails("encode", "clip.wav", "-o", "out", *tiny, status=130) == "mimi-jax encode: error: interrupted\n"
    )


def test_a_name_of_two_lines_is_one_line(fails):
    assert fails("encode", "no\nwav") == "mimi-jax encode: error: no wav: No such file or directory\n"


# the process


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """That of a user whose cache is empty."""
    own = {key: value for key, value in os.environ.items() if not key.startswith(("JAX_", "XDG_", "TF_"))}
    return own | {"HOME": str(tmp_path / "home"), "PYTHONPATH": str(ROOT)}


def process(environment: dict[str, str], *words: str | Path) -> Run:
    command = [sys.executable, "-m", "mimi_jax.cli", *map(str, words)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    return Run(result.returncode, result.stdout, result.stderr)


def test_process_that_fails(place: Path, environment: dict[str, str], tiny: list[str]):
    environment["XDG_CACHE_HOME"] = "/dev/null"  # that nothing can be kept there must not add a line
    result = process(environment, "encode", "truncated.wav", "-o", "out.safetensors", *tiny)
    assert (result.status, result.stdout) == (1, "")
    assert result.stderr.startswith("mimi-jax encode: error: truncated.wav is cut short")
    assert result.stderr.count("\n") == 1


def test_process_keeps_what_it_compiled(place: Path, environment: dict[str, str], tiny: list[str]):
    result = process(environment, "encode", "clip.wav", "-o", "out.safetensors", *tiny)
    assert (result.status, result.stderr) == (0, "")
    cache = Path(environment["HOME"]) / ".cache" / "mimi_jax" / "xla"
    assert list(cache.glob("jit_encode_step-*"))
    for file in cache.iterdir():
        file.write_bytes(b"junk")
    result = process(environment, "encode", "clip.wav", "-o", "again.safetensors", *tiny)
    assert (result.status, result.stderr) == (0, "")
    assert Path("again.safetensors").read_bytes() == Path("out.safetensors").read_bytes()


@pytest.mark.parametrize("words", [["--help"], ["encode", "--help"], ["encode", "missing.wav"]])
def test_starts_without_jax(words: list[str]):
    code = f"from mimi_jax import cli; cli.main({words}); import sys; print('jax' in sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert result.stdout.splitlines()[-1] == "False"


@pytest.mark.parametrize("command", COMMANDS)
def test_help(run, command: str):
    result = run(command, "--help")
    assert result.status == 0
    assert f"usage: mimi-jax {command}" in result.stdout
    assert result.stderr == ""
