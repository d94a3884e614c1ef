"""What every command refuses before it loads a model."""

import importlib.util
import os
from pathlib import Path

import pytest

BAD_OUTPUTS = {
    "missing/out": "there is no folder",
    "clip.wav/out": "there is no folder",
    "folder": "it is a folder",
    "/proc/out": "no file can be made in",
}
COMMANDS = {
    ".safetensors": ("encode", "clip.wav"),
    ".wav": ("decode", "codes.safetensors"),
    ".flac": ("roundtrip", "clip.wav"),
}


@pytest.mark.parametrize("output", BAD_OUTPUTS)
@pytest.mark.parametrize("suffix", COMMANDS)
def test_unwritable_output(fails, too_late: None, place: Path, suffix: str, output: str):
    (place / "folder.flac").mkdir()
    assert BAD_OUTPUTS[output] in fails(*COMMANDS[suffix], "-o", f"{output}{suffix}")


def test_a_device_is_not_an_output(fails, too_late: None):
    assert "it is a folder or a device" in fails("encode", "clip.wav", "-o", "/dev/full")


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["encode", "clip", "-o", "clip"], "clip is the input and would be overwritten"),
        (["encode", "clip", "-o", "./clip"], "is the input"),
        (["encode", "clip.wav", "-o", "clip.wav"], "so their file must not end in .wav, got clip.wav"),
        (["encode", "clip.wav", "-o", "missing/out.MP3"], "codes are not audio"),
        (["encode", "codes.safetensors"], "codes.safetensors holds codes, not audio; mimi-jax decode makes"),
        (["encode", "codes.safetensors", "-o", "out"], "codes.safetensors holds codes, not audio"),
        (["encode", "text.safetensors"], "is the input"),
        (["roundtrip", "clip.wav", "-o", "clip.wav"], "is the input"),
        (["decode", "codes.safetensors", "-o", "codes.safetensors"], "must end in .flac, .mp3"),
        (["decode", "codes.safetensors", "-o", "missing/out.xyz"], "must end in .flac, .mp3"),
        (["roundtrip", "clip.wav", "-o", "missing/out.xyz"], "must end in .flac, .mp3"),
        (["decode", "codes.safetensors", "-o", "out.txt"], "must end in .flac, .mp3"),
        (["roundtrip", "clip.wav", "-o", "out"], "must end in .flac, .mp3"),
        (["roundtrip", "clip.wav"], "the following arguments are required: -o"),
        (["convert", "mini", "converted"], "the following arguments are required: --to"),
        (["convert", "mini", "converted", "--to", "onnx"], "invalid choice: 'onnx'"),
        (["convert", "mini", ".", "--to", "flax"], ". exists; name a new folder"),
        (["convert", "mini", "clip.wav", "--to", "flax"], "clip.wav exists; name a new folder"),
        (["encode"], "the following arguments are required: IN"),
        (["encode", "clip.wav", "--loud"], "unrecognized arguments: --loud; see mimi-jax encode --help"),
        (["decode", "codes.safetensors", "out.wav"], "unrecognized arguments: out.wav; see mimi-jax decode"),
        (["encode", ""], "argument IN: a path must not be empty"),
        (["encode", "clip.wav", "-o", ""], "argument -o/--output: a path must not be empty"),
        (
            ["encode", "s3://bucket/clip.wav"],
            "argument IN: it must be a local path, got s3://bucket/clip.wav",
        ),
        (["encode", "clip.wav", "--num-quantizers", "8.0"], "must be a whole number, got '8.0'"),
        (["evaluate", "mini", ".", "--num-quantizers", "8", "eight"], "must be a whole number, got 'eight'"),
        (["tokenize", ".", "-o", "out", "--num-quantizers", "8.0"], "must be a whole number, got '8.0'"),
        (["tokenize", ".", "-o", "out", "--num-quantizers", "0"], "must be positive, got 0"),
        (["roundtrip", "-", "-o", "out.wav"], "- stands for a pipe, which only encode and decode can read"),
        (["info", "-"], "- stands for a pipe"),
        (["transmogrify"], "invalid choice: 'transmogrify'"),
        ([], "the following arguments are required: COMMAND"),
    ],
)
def test_bad_usage(fails, too_late: None, place: Path, words: list[str], error: str):
    (place / "clip").write_bytes((place / "clip.wav").read_bytes())
    assert error in fails(*words, status=2)


@pytest.mark.parametrize("words", [["encode", "pipe"], ["decode", "pipe"], ["info", "pipe"]])
@pytest.mark.parametrize("kind", ["named pipe", "process substitution"])
def test_a_path_that_is_a_pipe(fails, too_late: None, place: Path, words: list[str], kind: str):
    reading, writing = os.pipe()
    if kind == "named pipe":
        os.mkfifo(place / "pipe")
    else:  # as the shell does for <(command)
        (place / "pipe").symlink_to(f"/dev/fd/{reading}")
    line = fails(*words, status=2)
    os.close(reading)
    os.close(writing)
    assert "pipe is a pipe or a device, but only a file can be checked to its end; write a file first" in line


@pytest.mark.parametrize("words", [["roundtrip", "pipe", "-o", "out.wav"], ["evaluate", "mini", "pipe"]])
def test_a_pipe_is_not_a_clip_to_measure(
    fails, too_late: None, place: Path, words: list[str], all_extras: None
):
    os.mkfifo(place / "pipe")
    assert "pipe is a pipe or a device" in fails(*words, status=2)


def test_home_is_found_where_the_shell_does_not_expand_it(
    fails, monkeypatch: pytest.MonkeyPatch, place: Path
):
    monkeypatch.setenv("HOME", str(place / "home"))
    assert f"{place}/home/in.wav: No such file" in fails("encode", "~/in.wav")
    for output in ("--output=~/out.safetensors", "-o=~/out.safetensors"):
        assert f"there is no folder {place}/home" in fails("encode", "clip.wav", output)
    assert f"unknown model '{place}/home/model'" in fails("info", "~/model")


@pytest.fixture
def all_extras(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let commands start whose packages are not installed."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)


# default names


@pytest.mark.parametrize("command", ["encode", "decode"])
def test_a_default_name_replaces_no_file(fails, run, place: Path, tiny: list[str], command: str):
    source, default = {
        "encode": ("clip.flac", "clip.safetensors"),
        "decode": ("codes.safetensors", "codes.decoded.wav"),
    }[command]
    (place / "clip.flac").write_bytes((place / "clip.wav").read_bytes())
    (place / default).write_bytes(b"of another clip")
    error = f"error: {default} exists; name the output with -o to replace it\n"
    assert fails(command, source, *tiny, status=2).endswith(error)
    assert run(command, source, "-o", default, *tiny).status == 0
    assert (place / default).read_bytes() != b"of another clip"


def test_the_numbers_of_an_evaluation_are_no_picture(fails, too_late: None, place: Path, all_extras: None):
    error = "-o names the file of numbers, and their picture ends in .png, got 2.png"
    assert error in fails("evaluate", "mini", ".", "-o", "2.png", status=2)


@pytest.mark.parametrize(
    "words", [["roundtrip", "clip.wav", "-o", "2.wav"], ["evaluate", "mini", ".", "-o", "2.json"]]
)
def test_a_picture_replaces_only_that_of_an_older_output(
    fails, too_late: None, place: Path, words: list[str], all_extras: None
):
    (place / "2.png").write_bytes(b"a picture of something else")
    error = "2.png exists and would be overwritten; name another output with -o"
    assert error in fails(*words, status=2)
    (place / words[-1]).touch()
    with pytest.raises(AssertionError, match="before it loads a model"):  # now it goes on
        fails(*words)
