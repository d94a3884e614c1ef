"""`main` and the process: help, interrupts, error lines, start-up and the cache of compiled programs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.conftest import COMMANDS, Run

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("command", COMMANDS)
def test_help(run, command: str):
    result = run(command, "--help")
    assert result.status == 0
    assert f"usage: mimi-jax {command}" in result.stdout
    assert result.stderr == ""


def test_interrupt(fails, tiny: list[str], monkeypatch: pytest.MonkeyPatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("mimi_jax.streams.chunks.encode_step", interrupt)
    assert (
        fails("encode", "clip.wav", "-o", "out", *tiny, status=130) == "mimi-jax encode: error: interrupted\n"
    )


def test_a_name_of_two_lines_is_one_line(fails):
    assert fails("encode", "no\nwav") == "mimi-jax encode: error: no wav: No such file or directory\n"


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """The environment of a user whose cache is empty."""
    own = {key: value for key, value in os.environ.items() if not key.startswith(("JAX_", "XDG_", "TF_"))}
    return own | {"HOME": str(tmp_path / "home"), "PYTHONPATH": str(ROOT)}


def process(environment: dict[str, str], *words: str | Path) -> Run:
    command = [sys.executable, "-m", "mimi_jax.cli", *map(str, words)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    return Run(result.returncode, result.stdout, result.stderr)


def test_process_that_fails(place: Path, environment: dict[str, str], tiny: list[str]):
    environment["XDG_CACHE_HOME"] = "/dev/null"  # an unusable cache must not add a line
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
