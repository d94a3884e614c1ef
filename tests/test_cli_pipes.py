"""`mimi-jax encode -` and `decode -`, as processes on real pipes: live, cut short, interrupted, abandoned."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import numpy as np
import pytest
import soundfile

import mimi_jax
from mimi_jax import cli
from mimi_jax.pipes import CodeStreamReader, read_pcm, to_pcm
from tests.models import load_fixture

ROOT = Path(__file__).parents[1]
FRAME, CODEBOOKS = 16, 4  # of the fixtures
NUM_SAMPLES = 50 * FRAME + 5
FRAME_PACKET = 1 + 2  # bytes: four codes of four bits

Start = Callable[..., subprocess.Popen[bytes]]


def speech(channels: int = 1, num_samples: int = NUM_SAMPLES) -> np.ndarray:
    """float32 [channels, samples], of 16-bit numbers."""
    samples = np.random.default_rng(0).normal(0, 0.2, (channels, num_samples))
    return np.rint(samples * 32768).astype(np.float32) / 32768


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for name in ("base", "stereo", "noncausal", "groups1"):
        load_fixture(name).model.save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The processes share what they compile."""
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def start(models: Path, cache: str, tmp_path: Path) -> Iterator[Start]:
    """Start `mimi-jax` in an empty folder, with all three pipes."""
    processes = []

    def start(command: str, *words: str, model: str = "base", stdin: int | IO[bytes] = subprocess.PIPE):
        own = {key: value for key, value in os.environ.items() if not key.startswith("JAX_")}
        process = subprocess.Popen(
            [sys.executable, "-m", "mimi_jax.cli", command, *words, "--model", str(models / model)],
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=tmp_path,
            env=own | {"PYTHONPATH": str(ROOT), "JAX_COMPILATION_CACHE_DIR": cache},
        )
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout, process.stderr):
            if stream is not None:
                stream.close()


def parse(data: bytes) -> tuple[np.ndarray, int]:
    """The codes [codebooks, frames] and the number of samples of a whole code stream."""
    rest = data

    def read(count: int) -> bytes:
        nonlocal rest
        piece, rest = rest[:count], rest[count:]
        return piece

    codes, counts = zip(*CodeStreamReader(read, 1), strict=True)
    return np.concatenate(codes, axis=1), sum(counts)


def codes_of(audio: np.ndarray, model: str = "base") -> np.ndarray:
    return np.asarray(mimi_jax.encode(load_fixture(model).model, audio[None]).audio_codes[0])


def pipe(stream: IO[bytes] | None) -> IO[bytes]:
    assert stream is not None
    return stream


def finish(process: subprocess.Popen[bytes], data: bytes | None = None) -> tuple[int, bytes, str]:
    """Feed a process the rest of its input; its exit status, and what it says."""
    out, err = process.communicate(data, timeout=60)
    assert "Traceback" not in err.decode()
    return process.returncode, out, err.decode()


@pytest.mark.parametrize(("model", "pcm_format"), [("base", "s16le"), ("stereo", "f32le")])
def test_a_pipeline_gives_what_files_give(start: Start, model: str, pcm_format: str):
    audio = speech(2 if model == "stereo" else 1)
    encoder = start("encode", "-", "--format", pcm_format, model=model)
    decoder = start("decode", "-", "--format", pcm_format, model=model, stdin=pipe(encoder.stdout))
    pipe(encoder.stdin).write(to_pcm(audio, pcm_format))
    pipe(encoder.stdin).close()
    status, out, err = finish(decoder)
    assert (status, err, encoder.wait(60)) == (0, "", 0)
    rest = iter([out, b""])
    (decoded,) = read_pcm(lambda _: next(rest), pcm_format, len(audio), 1 << 20)
    codes = codes_of(audio, model)
    expected = mimi_jax.decode(load_fixture(model).model, codes[None]).audio_values[0, :, :NUM_SAMPLES]
    assert decoded.shape == expected.shape
    tolerance = 2 / 32768 if pcm_format == "s16le" else 1e-4
    clipped = np.clip(expected, -1, 1) if pcm_format == "s16le" else expected
    assert np.abs(decoded - clipped).max() < tolerance


def test_files_to_pipes_and_pipes_to_files(start: Start, tmp_path: Path):
    audio = speech()
    mimi_jax.save_audio(tmp_path / "in.wav", audio)
    status, stream, err = finish(start("encode", "in.wav", "-o", "-"))
    assert (status, err) == (0, "")
    codes, num_samples = parse(stream)
    np.testing.assert_array_equal(codes, codes_of(audio))
    assert num_samples == NUM_SAMPLES

    status, out, err = finish(start("encode", "-", "-o", "codes.safetensors"), to_pcm(audio, "s16le"))
    assert (status, err) == (0, "")
    assert out.startswith(b"wrote codes.safetensors: 51 frames x 4 codebooks")
    file = mimi_jax.load_codes(tmp_path / "codes.safetensors")
    np.testing.assert_array_equal(file.audio_codes, codes)
    assert file.num_samples == NUM_SAMPLES

    assert finish(start("decode", "-", "-o", "out.wav"), stream)[0] == 0
    status, pcm, err = finish(start("decode", "codes.safetensors", "-o", "-"))
    assert (status, err) == (0, "")
    written, _ = soundfile.read(tmp_path / "out.wav", dtype="int16")
    assert np.abs(np.frombuffer(pcm, "<i2").astype(int) - written).max() <= 1
    assert len(written) == NUM_SAMPLES


def test_each_frame_leaves_at_once(start: Start):
    """Nothing more is fed until the frame has come out; a reader that waited would wait for ever."""
    audio = speech(num_samples=2 * FRAME + 3)
    encoder, decoder = start("encode", "-"), start("decode", "-")
    data = to_pcm(audio, "s16le")
    stdin, stdout = pipe(encoder.stdin), pipe(encoder.stdout)
    header = stdout.read(8)
    header += stdout.read(int.from_bytes(header, "little"))
    pipe(decoder.stdin).write(header)
    for frame in range(2):
        stdin.write(data[frame * 2 * FRAME : (frame + 1) * 2 * FRAME])
        stdin.flush()
        packet = stdout.read(FRAME_PACKET)
        assert packet[:1] == b"F"
        pipe(decoder.stdin).write(packet)
        pipe(decoder.stdin).flush()
        assert len(pipe(decoder.stdout).read(2 * FRAME)) == 2 * FRAME
    status, last, err = finish(encoder, data[4 * FRAME :])
    assert (status, last[:1], err) == (0, b"L", "")
    status, out, err = finish(decoder, last)
    assert (status, len(out), err) == (0, 3 * 2, "")


def test_audio_that_ends_inside_a_sample_makes_no_file(start: Start, tmp_path: Path):
    status, out, err = finish(start("encode", "-", "-o", "codes.safetensors"), to_pcm(speech(), "s16le")[:-1])
    assert (status, out) == (1, b"")
    assert err == (
        "mimi-jax encode: error: the input ends in the middle of a sample: 1 of 2 bytes (s16le, 1 channel)\n"
    )
    assert list(tmp_path.iterdir()) == []


def test_a_stream_cut_short_gives_its_whole_frames_and_no_file(start: Start, tmp_path: Path):
    status, stream, _ = finish(start("encode", "-"), to_pcm(speech(), "s16le"))
    cut = stream[:-20]
    status, out, err = finish(start("decode", "-"), cut)
    assert status == 1
    assert err == "mimi-jax decode: error: the code stream was cut short: it ends inside a frame\n"
    header = 8 + int.from_bytes(stream[:8], "little")
    assert len(out) == (len(cut) - header) // FRAME_PACKET * FRAME * 2
    status, out, err = finish(start("decode", "-", "-o", "out.wav"), cut)
    assert (status, out, err.count("\n")) == (1, b"", 1)
    assert list(tmp_path.iterdir()) == []


def test_codes_of_another_model(start: Start):
    _, stream, _ = finish(start("encode", "-"), to_pcm(speech(), "s16le"))
    status, out, err = finish(start("decode", "-", model="groups1"), stream)
    assert (status, out, err.count("\n")) == (1, b"", 1)
    assert "the stream holds codes of another model: its model_id is" in err


def test_silence_that_never_came(start: Start, tmp_path: Path):
    status, stream, err = finish(start("encode", "-"), b"")
    assert (status, err, stream[-1:]) == (0, "", b"E")
    assert finish(start("decode", "-"), stream) == (0, b"", "")
    status, _, err = finish(start("encode", "-", "-o", "codes.safetensors"), b"")
    assert (status, err.count("\n")) == (1, 1)
    assert "there is nothing to write" in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["encode", "decode"])
def test_a_reader_that_goes_away_ends_it_quietly(start: Start, command: str):
    data = to_pcm(speech(num_samples=100_000), "s16le")
    if command == "decode":
        _, data, _ = finish(start("encode", "-"), data)
    process = start(command, "-")
    pipe(process.stdout).close()
    process.stdout = None  # or communicate() would read it
    status, _, err = finish(process, data)
    assert (status, err) == (141, "")


def test_an_interrupt_ends_the_audio_and_keeps_what_was_heard(start: Start, tmp_path: Path):
    audio = speech(num_samples=3 * FRAME + 5)
    process = start("encode", "-")
    stdin, stdout = pipe(process.stdin), pipe(process.stdout)
    stdin.write(to_pcm(audio, "s16le"))
    stdin.flush()
    header = stdout.read(8)
    data = header + stdout.read(int.from_bytes(header, "little") + 3 * FRAME_PACKET)
    process.send_signal(signal.SIGINT)
    data += stdout.read()
    assert process.wait(60) == 130
    codes, num_samples = parse(data)
    np.testing.assert_array_equal(codes, codes_of(audio))
    assert num_samples == audio.shape[1]
    assert pipe(process.stderr).read() == (
        b"mimi-jax encode: error: interrupted; what had come in by then is whole\n"
    )

    process = start("encode", "-", "-o", "codes.safetensors")
    stdin = pipe(process.stdin)
    stdin.write(to_pcm(audio, "s16le"))
    stdin.flush()
    wait_for(lambda: list(tmp_path.glob(".tmp-*")))  # the file has been begun: it listens
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    assert [path.name for path in tmp_path.iterdir()] == ["codes.safetensors"]
    file = mimi_jax.load_codes(tmp_path / "codes.safetensors")
    np.testing.assert_array_equal(file.audio_codes, codes)


def wait_for(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_an_interrupted_decoder_writes_no_part_of_a_file(start: Start, tmp_path: Path):
    _, stream, _ = finish(start("encode", "-"), to_pcm(speech(), "s16le"))
    process = start("decode", "-", "-o", "out.wav")
    pipe(process.stdin).write(stream[:-20])
    pipe(process.stdin).flush()
    wait_for(lambda: list(tmp_path.glob(".tmp-*")))
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    assert pipe(process.stderr).read() == b"mimi-jax decode: error: interrupted\n"
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, models: Path):
    """Run a command that must be refused for its words, and return its one line."""
    monkeypatch.chdir(tmp_path)
    mimi_jax.save_audio("in.wav", speech())
    monkeypatch.setattr(os, "isatty", lambda descriptor: False)

    def fails(*words: str, status: int = 2) -> str:
        assert cli.main([*words, "--model", str(models / "base")]) == status
        output = capsys.readouterr()
        assert (output.out, output.err.count("\n")) == ("", 1)
        return output.err

    return fails


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (
            ("encode", "in.wav", "--format", "s16le"),
            "--format is of raw audio on a pipe; in.wav tells its own",
        ),
        (("encode", "in.wav", "-o", "-", "--format", "s16le"), "--format is of raw audio on a pipe"),
        (("decode", "-", "-o", "out.wav", "--format", "f32le"), "out.wav tells its own"),
        (("encode", "-", "--format", "wav"), "argument --format: invalid choice: 'wav'"),
        (("encode", "-", "--num-quantizers", "5"), "num_quantizers must be an integer from 1 to 4"),
        (("decode", "-", "-o", "out.aac"), "the name of an audio file must end in"),
    ],
)
def test_words_that_make_no_sense(fails, words: tuple[str, ...], error: str):
    assert error in fails(*words)


def test_terminals_are_no_pipes(fails, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "isatty", lambda descriptor: descriptor == 0)
    assert "nothing is piped in" in fails("encode", "-")
    assert "nothing is piped in" in fails("decode", "-", "-o", "out.wav")
    monkeypatch.setattr(os, "isatty", lambda descriptor: descriptor == 1)
    assert "the output is binary and would garble the terminal" in fails("encode", "in.wav", "-o", "-")
    assert "the output is binary and would garble the terminal" in fails("encode", "-")


def test_a_model_that_looks_ahead_takes_no_pipe(start: Start):
    status, _, err = finish(start("encode", "-", model="noncausal"), to_pcm(speech(), "s16le"))
    assert (status, err.count("\n")) == (1, 1)
    assert "looks ahead and cannot stream" in err
