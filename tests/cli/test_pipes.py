"""`mimi-jax encode -` and `decode -` on real pipes that are live, cut short, interrupted or closed early."""

import fcntl
import functools
import os
import signal
import subprocess
import sys
import tempfile
import termios
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import soundfile

import mimi_jax
from mimi_jax import checkpoint, cli
from mimi_jax.files.codes import CodeSpec
from mimi_jax.streams.push import StreamingEncoder
from mimi_jax.streams.wire import CodeStreamWriter, to_pcm
from tests.models import load_fixture

ROOT = Path(__file__).parents[2]
FRAME = 16  # samples, in the models here
NUM_FRAMES, NUM_LAST = 11, 5  # whole frames, and samples after them
NUM_SAMPLES = NUM_FRAMES * FRAME + NUM_LAST
PACKET = 3  # bytes per frame of a code stream: a letter, and four codes of four bits
DTYPES = {"s16le": "<i2", "f32le": "<f4"}
INTERRUPTED = "error: interrupted; all input before the signal was processed\n"


class Run(NamedTuple):
    status: int
    stdout: bytes
    stderr: str


class Clip(NamedTuple):
    """Audio, and what the commands should make of it."""

    audio: np.ndarray  # [channels, samples], exact in 16 bits
    codes: np.ndarray  # [codebooks, frames]
    stream: bytes
    decoded: np.ndarray  # [channels, samples]

    @property
    def pcm(self) -> bytes:
        return to_pcm(self.audio, "s16le")

    @property
    def header(self) -> bytes:
        return self.stream[: 8 + int.from_bytes(self.stream[:8], "little")]


@functools.cache
def make_clip(name: str = "base") -> Clip:
    model = load_fixture(name).model
    config = model.config
    noise = np.random.default_rng(0).normal(0, 0.2, (config.audio_channels, NUM_SAMPLES))
    audio = np.rint(noise * 32768).astype(np.float32) / 32768
    codes = np.asarray(mimi_jax.encode(model, audio[None]).audio_codes[0])
    decoded = np.asarray(mimi_jax.decode(model, codes[None]).audio_values[0, :, :NUM_SAMPLES])
    sizes = (config.sampling_rate, config.frame_size, config.codebook_size, config.num_quantizers)
    written: list[bytes] = []
    writer = CodeStreamWriter(written.append, CodeSpec(checkpoint.model_id(model), *sizes))
    writer.write(codes, NUM_SAMPLES)
    return Clip(audio, codes, b"".join(written), decoded)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for name in ("base", "stereo", "noncausal", "groups1"):
        load_fixture(name).model.save_pretrained(folder / name)
    return folder


@pytest.fixture
def run(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfdbinary):
    """Run a command in this process, in an empty folder, with these bytes on stdin."""
    monkeypatch.chdir(tmp_path)

    def run(*words: str, stdin: bytes = b"", model: str = "base") -> Run:
        capfdbinary.readouterr()
        old = os.dup(0)
        with tempfile.TemporaryFile() as file:
            file.write(stdin)
            file.seek(0)
            os.dup2(file.fileno(), 0)
        try:
            status = cli.main([*words, "--model", str(models / model)])
        finally:
            os.dup2(old, 0)
            os.close(old)
        output = capfdbinary.readouterr()
        return Run(status, output.out, output.err.decode())

    return run


# processes


class Process(subprocess.Popen[bytes]):
    """`mimi-jax` with pipes that are not buffered."""

    def feed(self, data: bytes) -> None:
        assert self.stdin is not None
        self.stdin.write(data)

    def end_input(self) -> None:
        assert self.stdin is not None
        self.stdin.close()
        self.stdin = None  # communicate() would close it again

    def read(self, size: int) -> bytes:
        """Read `size` bytes of its output, or what is left if it ends earlier."""
        assert self.stdout is not None
        data = b""
        while len(data) < size and (more := self.stdout.read(size - len(data))):
            data += more
        return data

    def close_output(self) -> None:
        assert self.stdout is not None
        self.stdout.close()

    def interrupt(self, number: int = signal.SIGINT) -> None:
        """Send a signal, such as Ctrl-C, as soon as the process has read all its input."""
        assert self.stdin is not None
        while self.poll() is None and fcntl.ioctl(self.stdin, termios.FIONREAD, bytes(4)) != bytes(4):
            time.sleep(0.01)
        self.send_signal(number)
        self.wait()

    def finish(self) -> Run:
        """End its input, and return its status and the rest of its output."""
        stdout, stderr = self.communicate()
        return Run(self.returncode, stdout, stderr.decode())


Start = Callable[..., Process]
StartPipeline = Callable[..., tuple[Process, Process]]


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment in which the processes share compiled programs."""
    own = {key: value for key, value in os.environ.items() if not key.startswith("JAX_")}
    cache = str(tmp_path_factory.mktemp("cache"))
    return own | {"PYTHONPATH": str(ROOT), "JAX_COMPILATION_CACHE_DIR": cache}


@pytest.fixture
def start(models: Path, environment: dict[str, str], tmp_path: Path) -> Iterator[Start]:
    """Start commands in an empty folder. A command that hangs is killed after five minutes."""
    processes: list[Process] = []

    def start(*words: str, model: str = "base", stdin=subprocess.PIPE) -> Process:
        process = Process(
            [sys.executable, "-m", "mimi_jax.cli", *words, "--model", str(models / model)],
            bufsize=0,
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=tmp_path,
            env=environment,
        )
        processes.append(process)
        return process

    def kill() -> None:
        for process in processes:
            process.kill()

    timer = threading.Timer(300, kill)
    timer.start()
    yield start
    timer.cancel()
    kill()
    for process in processes:
        with process:
            pass


@pytest.fixture
def start_pipeline(start: Start) -> StartPipeline:
    """Start `encode - | decode -`."""

    def start_pipeline(*words: str, **options) -> tuple[Process, Process]:
        encoder = start("encode", "-", *words, **options)
        decoder = start("decode", "-", *words, **{**options, "stdin": encoder.stdout})
        encoder.close_output()  # now only the decoder holds it
        return encoder, decoder

    return start_pipeline


@pytest.mark.parametrize(
    ("model", "pcm_format"), [("stereo", "f32le"), pytest.param("base", "s16le", marks=pytest.mark.slow)]
)
def test_a_pipeline_gives_what_files_give(
    run, start_pipeline: StartPipeline, tmp_path: Path, model: str, pcm_format: str
):
    clip = make_clip(model)
    encoder, decoder = start_pipeline("--format", pcm_format, model=model)
    encoder.feed(to_pcm(clip.audio, pcm_format))
    encoder.end_input()
    status, pcm, stderr = decoder.finish()
    assert (status, stderr) == (0, "")
    assert encoder.finish() == (0, b"", "")

    mimi_jax.save_audio(tmp_path / "in.wav", clip.audio)
    assert run("encode", "in.wav", model=model).status == 0
    assert run("decode", "in.safetensors", "-o", "out.wav", model=model).status == 0
    expected, _ = soundfile.read(tmp_path / "out.wav", dtype="int16", always_2d=True)
    samples = np.frombuffer(pcm, DTYPES[pcm_format]).reshape(-1, len(clip.audio))
    assert samples.shape == expected.shape == (NUM_SAMPLES, len(clip.audio))
    steps = samples if pcm_format == "s16le" else samples.clip(-1, 1) * 32768
    assert np.abs(steps.astype(float) - expected).max() <= 1


def test_each_frame_comes_out_before_the_next_goes_in(start: Start):
    clip, frame_bytes = make_clip(), 2 * FRAME
    encoder, decoder = start("encode", "-"), start("decode", "-")
    decoder.feed(encoder.read(len(clip.header)))
    stream = pcm = b""
    for i in range(NUM_FRAMES):
        encoder.feed(clip.pcm[i * frame_bytes : (i + 1) * frame_bytes])
        stream += (packet := encoder.read(PACKET))
        decoder.feed(packet)
        pcm += decoder.read(frame_bytes)
    encoder.feed(clip.pcm[NUM_FRAMES * frame_bytes :])
    status, last, stderr = encoder.finish()
    assert (status, stderr) == (0, "")
    assert clip.header + stream + last == clip.stream
    decoder.feed(last)
    status, tail, stderr = decoder.finish()
    assert (status, stderr) == (0, "")
    expected = np.frombuffer(to_pcm(clip.decoded, "s16le"), "<i2")
    assert np.abs(np.frombuffer(pcm + tail, "<i2").astype(int) - expected).max() <= 1


def test_an_incomplete_sample_is_left_out(run):
    clip = make_clip()
    status, stream, stderr = run("encode", "-", stdin=clip.pcm + b"\1")
    assert (status, stream, stderr) == (0, clip.stream, "")


def test_a_closed_output_ends_the_pipeline_quietly(start_pipeline: StartPipeline):
    with open("/dev/zero", "rb") as silence:
        encoder, decoder = start_pipeline(stdin=silence)
    assert len(decoder.read(1000)) == 1000
    decoder.close_output()
    assert decoder.finish() == (141, b"", "")
    assert encoder.finish() == (141, b"", "")


# interrupts


def test_an_interrupt_ends_an_idle_stream(start: Start):
    process = start("encode", "-")
    process.feed(make_clip().pcm)
    process.interrupt()
    assert process.finish() == (130, make_clip().stream, f"mimi-jax encode: {INTERRUPTED}")


def test_an_interrupt_keeps_a_recording(start: Start, tmp_path: Path):
    clip, process = make_clip(), start("encode", "-", "-o", "codes.safetensors")
    process.feed(clip.pcm)
    process.interrupt()
    status, stdout, stderr = process.finish()
    assert stdout.startswith(b"wrote codes.safetensors: 12 frames x 4 codebooks, ")
    assert (status, stderr) == (130, f"mimi-jax encode: {INTERRUPTED}")
    assert [path.name for path in tmp_path.iterdir()] == ["codes.safetensors"]
    file = mimi_jax.load_codes(tmp_path / "codes.safetensors")
    np.testing.assert_array_equal(file.audio_codes, clip.codes)
    assert file.num_samples == NUM_SAMPLES


def test_an_interrupted_decoder_keeps_the_frames_that_came(start: Start, tmp_path: Path):
    """Like a recording, although the end of the stream is missing."""
    process = start("decode", "-", "-o", "out.wav")
    process.feed(make_clip().stream[:-PACKET])
    process.interrupt()
    status, stdout, stderr = process.finish()
    assert stdout.startswith(b"wrote out.wav: 11 frames x 4 codebooks, ")
    assert (status, stderr) == (130, f"mimi-jax decode: {INTERRUPTED}")
    assert soundfile.info(tmp_path / "out.wav").frames == NUM_FRAMES * FRAME


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGHUP, marks=pytest.mark.slow)])
def test_other_signals_that_ask_to_stop(start: Start, tmp_path: Path, number: signal.Signals):
    process = start("encode", "-", "-o", "codes.safetensors")
    process.feed(make_clip().pcm)
    process.interrupt(number)
    assert process.finish().status == 128 + number
    assert [path.name for path in tmp_path.iterdir()] == ["codes.safetensors"]
    assert mimi_jax.load_codes(tmp_path / "codes.safetensors").num_samples == NUM_SAMPLES


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_the_work_on_a_file(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int):
    mimi_jax.save_audio(tmp_path / "in.wav", make_clip().audio)
    monkeypatch.setattr("mimi_jax.streams.chunks.encode_step", lambda *_, **__: os.kill(os.getpid(), number))
    status, stdout, stderr = run("encode", "in.wav")
    assert (status, stdout, stderr) == (128 + number, b"", "mimi-jax encode: error: interrupted\n")
    assert [path.name for path in tmp_path.iterdir()] == ["in.wav"]


def test_a_signal_that_is_ignored_stays_ignored(run, monkeypatch: pytest.MonkeyPatch):
    """A shell ignores Ctrl-C in this way for a program in the background."""
    warmup = StreamingEncoder.warmup

    def interrupt(encoder: StreamingEncoder) -> None:
        warmup(encoder)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(StreamingEncoder, "warmup", interrupt)
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert run("encode", "-", stdin=make_clip().pcm) == (0, make_clip().stream, "")
    finally:
        signal.signal(signal.SIGINT, previous)


def test_an_interrupt_of_a_pipeline_loses_nothing(start_pipeline: StartPipeline):
    """The decoder gets the signal first. It must still wait for the encoder, whose input does not end."""
    encoder, decoder = start_pipeline()
    encoder.feed(make_clip().pcm)
    assert len(decoder.read(2 * NUM_FRAMES * FRAME)) == 2 * NUM_FRAMES * FRAME
    decoder.send_signal(signal.SIGINT)
    encoder.send_signal(signal.SIGINT)
    status, pcm, stderr = decoder.finish()
    assert (status, len(pcm), stderr) == (130, 2 * NUM_LAST, f"mimi-jax decode: {INTERRUPTED}")
    assert encoder.finish() == (130, b"", f"mimi-jax encode: {INTERRUPTED}")


def test_an_interrupt_during_the_warm_up_keeps_what_has_come_in(
    run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    warmup = StreamingEncoder.warmup

    def slow(encoder: StreamingEncoder) -> None:
        warmup(encoder)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.6)

    monkeypatch.setattr(StreamingEncoder, "warmup", slow)
    status, _, stderr = run("encode", "-", "-o", "codes.safetensors", stdin=make_clip().pcm)
    assert (status, stderr) == (130, f"mimi-jax encode: {INTERRUPTED}")
    assert mimi_jax.load_codes(tmp_path / "codes.safetensors").num_samples == NUM_SAMPLES


# between files and pipes


def test_files_to_pipes(run, tmp_path: Path):
    clip = make_clip()
    mimi_jax.save_audio(tmp_path / "in.wav", clip.audio)
    assert run("encode", "in.wav", "-o", "-") == (0, clip.stream, "")
    assert run("encode", "in.wav").status == 0
    status, pcm, stderr = run("decode", "in.safetensors", "-o", "-", "--format", "f32le")
    assert (status, stderr) == (0, "")
    np.testing.assert_allclose(np.frombuffer(pcm, "<f4"), clip.decoded[0], rtol=0, atol=1e-5)


def test_pipes_to_files(run, tmp_path: Path):
    clip = make_clip()
    status, stdout, stderr = run("encode", "-", "-o", "codes.safetensors", stdin=clip.pcm)
    assert stdout.startswith(b"wrote codes.safetensors: 12 frames x 4 codebooks, ")
    assert (status, stderr) == (0, "")
    file = mimi_jax.load_codes(tmp_path / "codes.safetensors")
    np.testing.assert_array_equal(file.audio_codes, clip.codes)
    assert file.num_samples == NUM_SAMPLES

    status, stdout, stderr = run("decode", "-", "-o", "out.wav", stdin=clip.stream)
    assert stdout.startswith(b"wrote out.wav: 12 frames x 4 codebooks, ")
    assert (status, stderr) == (0, "")
    samples, rate = soundfile.read(tmp_path / "out.wav", dtype="int16")
    expected = np.frombuffer(to_pcm(clip.decoded, "s16le"), "<i2")
    assert rate == 24_000
    assert np.abs(samples.astype(int) - expected).max() <= 1


def test_fewer_codebooks_on_pipes(run):
    status, stream, stderr = run("encode", "-", "--num-quantizers", "2", stdin=make_clip().pcm)
    assert (status, stderr) == (0, "")
    status, pcm, stderr = run("decode", "-", stdin=stream)
    assert (status, len(pcm), stderr) == (0, 2 * NUM_SAMPLES, "")


def test_no_audio_makes_an_empty_stream_but_no_file(run, tmp_path: Path):
    assert run("encode", "-") == (0, make_clip().header + b"E", "")
    assert run("decode", "-", stdin=make_clip().header + b"E") == (0, b"", "")
    error = "mimi-jax encode: error: a code file must hold the codes of at least one sample, got none\n"
    assert run("encode", "-", "-o", "codes.safetensors") == (1, b"", error)
    assert not list(tmp_path.iterdir())


# failures


@pytest.mark.parametrize("end", [-1, -PACKET])
def test_a_stream_cut_short_gives_its_whole_frames_and_no_file(run, tmp_path: Path, end: int):
    stream = make_clip().stream[:end]
    error = "mimi-jax decode: error: the code stream was cut short: it ends inside a frame\n"
    status, pcm, stderr = run("decode", "-", stdin=stream)
    assert (status, len(pcm), stderr) == (1, 2 * NUM_FRAMES * FRAME, error)
    assert run("decode", "-", "-o", "out.wav", stdin=stream) == (1, b"", error)
    assert not list(tmp_path.iterdir())


def test_an_audio_file_is_not_raw_audio(run, tmp_path: Path):
    mimi_jax.save_audio(tmp_path / "in.wav", make_clip().audio)
    status, stdout, stderr = run(
        "encode", "-", "-o", "codes.safetensors", stdin=(tmp_path / "in.wav").read_bytes()
    )
    assert (status, stdout, stderr.count("\n")) == (1, b"", 1)
    assert "raw audio must have no header, got a WAV file; give its path" in stderr
    assert [path.name for path in tmp_path.iterdir()] == ["in.wav"]


def test_nan_ends_a_stream(run):
    nan = np.full((1, FRAME), np.nan, np.float32)
    audio = np.concatenate([make_clip().audio[:, : NUM_FRAMES * FRAME], nan], axis=1)
    status, stream, stderr = run("encode", "-", "--format", "f32le", stdin=to_pcm(audio, "f32le"))
    assert (status, stderr.count("\n")) == (1, 1)
    assert "raw audio in f32le must be finite and near [-1, 1], got nan" in stderr
    assert stream == make_clip().stream[: len(make_clip().header) + 8 * PACKET]


@pytest.mark.parametrize("stdin", [b"RIFF\x24\0\0\0WAVEfmt ", bytes(1000)])
def test_input_that_is_not_a_code_stream(run, stdin: bytes):
    error = "mimi-jax decode: error: the input is not a code stream from `mimi-jax encode -`"
    assert run("decode", "-", stdin=stdin) == (1, b"", f"{error}; give the path of a code file\n")


def test_no_input(run, tmp_path: Path):
    assert "error: the input is empty: the program before this one" in run("decode", "-").stderr
    error = "mimi-jax decode: error: cannot write out.wav: there is no audio to write\n"
    assert run("decode", "-", "-o", "out.wav", stdin=make_clip().header + b"E") == (1, b"", error)
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_is_not_overwritten_by_default(run, models: Path, tmp_path: Path):
    mimi_jax.save_audio(tmp_path / "model.wav", make_clip().audio)
    weights = (models / "base" / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(weights)
    status, _, stderr = run("encode", "model.wav")
    assert status == 2
    assert "model.safetensors exists; name the output with -o to replace it" in stderr
    assert (tmp_path / "model.safetensors").read_bytes() == weights


def test_codes_of_another_model(run):
    status, stdout, stderr = run("decode", "-", stdin=make_clip().stream, model="groups1")
    assert (status, stdout, stderr.count("\n")) == (1, b"", 1)
    assert "cannot decode the code stream: another model made the codes: their model_id is " in stderr
    assert "name the right one with --model" in stderr


@pytest.mark.parametrize("command", ["encode", "decode"])
def test_a_model_that_looks_ahead_takes_no_pipe(run, command: str):
    clip = make_clip("noncausal")
    stdin = clip.pcm if command == "encode" else clip.stream
    status, stdout, stderr = run(command, "-", stdin=stdin, model="noncausal")
    assert (status, stdout, stderr.count("\n")) == (1, b"", 1)
    assert "looks ahead and cannot stream" in stderr


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (
            ["encode", "in.wav", "--format", "s16le"],
            "--format describes raw audio on a pipe, but in.wav is a file; leave it out",
        ),
        (["encode", "in.wav", "-o", "-", "--format", "s16le"], "on a pipe, but in.wav is a file"),
        (["decode", "in.wav", "--format", "s16le"], "on a pipe, but in.decoded.wav is a file"),
        (["decode", "-", "-o", "out.wav", "--format", "f32le"], "on a pipe, but out.wav is a file"),
        (["encode", "-", "--format", "wav"], "argument --format: invalid choice: 'wav'"),
        (["decode", "-", "--format", "s16be"], "argument --format: invalid choice: 's16be'"),
        (["encode", "-", "--num-quantizers", "5"], "num_quantizers must be an integer from 1 to 4"),
        (["decode", "-", "-o", "out.txt"], "must end in .flac, .mp3"),
    ],
)
def test_bad_usage(run, tmp_path: Path, words: list[str], error: str):
    (tmp_path / "in.wav").touch()
    status, stdout, stderr = run(*words)
    assert (status, stdout, stderr.count("\n")) == (2, b"", 1)
    assert error in stderr
    assert [path.name for path in tmp_path.iterdir()] == ["in.wav"]


@pytest.mark.parametrize("words", [["encode", "-"], ["decode", "-", "-o", "out.wav"]])
def test_a_terminal_is_not_an_input(run, monkeypatch: pytest.MonkeyPatch, words: list[str]):
    monkeypatch.setattr(os, "isatty", lambda descriptor: descriptor == 0)
    error = "- reads from a pipe, but standard input is a terminal; name a file"
    assert run(*words) == (2, b"", f"mimi-jax {words[0]}: error: {error}\n")


@pytest.mark.parametrize("words", [["encode", "-"], ["decode", "-"], ["encode", "in.wav", "-o", "-"]])
def test_a_terminal_is_not_an_output(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str]):
    (tmp_path / "in.wav").touch()
    monkeypatch.setattr(os, "isatty", lambda descriptor: descriptor == 1)
    error = "the output is binary, but standard output is a terminal; name a file with -o"
    assert run(*words) == (2, b"", f"mimi-jax {words[0]}: error: {error}\n")
