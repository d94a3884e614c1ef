"""Fixtures for the tests of the command line."""

import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import soundfile

import mimi_jax
from mimi_jax import Mimi, cli
from tests.models import load_fixture

RATE = 24_000
COMMANDS = ["encode", "decode", "roundtrip", "info", "convert", "tokenize", "train", "evaluate"]
# What the errors say of files that are not code files; `made` writes them.
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
    """A folder of tiny models: two of different codes, one with grouped keys, one that looks ahead."""
    folder = tmp_path_factory.mktemp("models")
    for name, fixture in {"tiny": "base", "other": "groups1", "gqa": "gqa", "whole": "noncausal"}.items():
        load_fixture(fixture).model.save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="session")
def made(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a clip, its codes, and broken files that have the same suffixes."""
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
    """A copy of `made`, as the current folder."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def tiny(models: Path) -> list[str]:
    return ["--model", str(models / "tiny")]


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]):
    """Run a command. Its stderr includes what C libraries write there."""

    def run(*words: str | Path) -> Run:
        capfd.readouterr()
        status = cli.main([str(word) for word in words])
        output = capfd.readouterr()
        return Run(status, str(output.out), str(output.err))

    return run


def contents(folder: Path) -> dict[Path, bytes | None]:
    """Return the bytes of every file in a folder, and None for every folder."""
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@pytest.fixture
def fails(run, place: Path):
    """Run a command that must fail. Check that it prints one line and changes no file; return the line."""

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


@pytest.fixture
def too_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail if a command loads a model."""

    def compute(*_, **__):
        raise AssertionError("the command should fail before it loads a model")

    monkeypatch.setattr(Mimi, "from_pretrained", compute)
