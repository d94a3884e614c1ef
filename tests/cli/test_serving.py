"""mimi-jax serve, as a person runs it."""

import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from mimi_jax.cli import main


@pytest.mark.parametrize(
    ("arguments", "status", "error"),
    [
        (["--rows", "12"], 2, "--rows must be a power of two, such as 64, got 12"),
        (["--port", "70000"], 2, "--port must be from 0 to 65535, got 70000"),
        (["--key-file", "short"], 2, "a key must have at least 16 bytes, got 5"),
        (["--token-file", "empty"], 1, "empty: the file is empty"),
        (["--token-file", "none"], 1, "none"),
        (["--token-file", "umlaut"], 2, "a token must be ASCII"),
        (["nowhere"], 1, "nowhere"),
    ],
)
def test_what_cannot_be_served(
    arguments: list[str],
    status: int,
    error: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "short").write_text("short\n")
    (tmp_path / "empty").write_text("\n")
    (tmp_path / "umlaut").write_text("schlüssel")
    assert main(["serve", *arguments]) == status
    message = capsys.readouterr().err
    assert message.startswith("mimi-jax serve: error: ") and error in message and message.count("\n") == 1


def test_a_port_that_is_taken_is_refused_before_anything_is_compiled(
    models: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    monkeypatch.setattr("mimi_jax.streams.pool.Pool.warmup", None)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert main(["serve", str(models / "tiny"), "--port", port, "--rows", "1"]) == 1
    error = f"mimi-jax serve: error: cannot listen on 127.0.0.1, port {port}: Address already in use"
    assert error in capsys.readouterr().err


def test_it_serves_until_it_is_interrupted(models: Path):
    command = [
        sys.executable,
        "-m",
        "mimi_jax.cli",
        "serve",
        str(models / "tiny"),
        "--port",
        "0",
        "--rows",
        "1",
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        try:
            line = process.stdout.readline()
            assert line.endswith("(Ctrl-C to stop)\n"), process.stderr.read()
            with urllib.request.urlopen(line.split()[0]) as answer:
                assert b"<title>Mimi, live" in answer.read()
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 0
    assert errors == "compiling the steps of 1 streams\n"
