"""`mimi-jax encode` and `mimi-jax decode`.

Audio and codes go from file or pipe to file or pipe, in memory that does not grow with their length.
"""

import argparse
import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from mimi_jax.cli.checks import audio_output, check_format, check_num_quantizers, code_output
from mimi_jax.cli.pipes import AUDIO_GRACE, CODES_GRACE, PCM_FORMATS, PIPE, Stdin, open_stdin, write_stdout
from mimi_jax.cli.terminal import no_stderr, progress, report, without_stderr

if TYPE_CHECKING:
    import numpy as np

    from mimi_jax.cli.pipes import Pieces
    from mimi_jax.files.codes import CodeReader, CodeSpec
    from mimi_jax.model import Mimi
    from mimi_jax.streams.push import StreamingDecoder, StreamingEncoder


def run_encode(arguments: argparse.Namespace) -> None:
    source, output = arguments.input, code_output(arguments.input, arguments.output)
    check_format(arguments.format, source)
    from mimi_jax.checkpoint import code_spec
    from mimi_jax.model import Mimi

    model = Mimi.from_pretrained(arguments.model, decoder=False)
    check_num_quantizers(model, arguments.num_quantizers)
    spec = code_spec(model, arguments.num_quantizers)
    with contextlib.ExitStack() as stack:
        if source == PIPE:
            from mimi_jax.streams.push import StreamingEncoder

            encoder = StreamingEncoder(model, num_quantizers=spec.num_codebooks)
            pieces = _encode_pipe(encoder, stack.enter_context(open_stdin(AUDIO_GRACE)), arguments.format)
        else:
            pieces = _encode_file(model, source, spec.num_codebooks)
        start, num_samples = time.perf_counter(), 0
        with _code_target(output, spec) as write:
            for codes, count in pieces:
                write(codes, count)
                num_samples += count
        report(output, spec, num_samples, time.perf_counter() - start)


def run_decode(arguments: argparse.Namespace) -> None:
    source, output = arguments.input, audio_output(arguments.input, arguments.output)
    check_format(arguments.format, output)
    from mimi_jax.files.codes import open_codes
    from mimi_jax.model import Mimi

    with contextlib.ExitStack() as stack:
        if source == PIPE:
            from mimi_jax.streams.push import STEP_FRAMES, StreamingDecoder
            from mimi_jax.streams.wire import CodeStreamReader

            # Load the model first: the encoder in front of this pipe is loading its own meanwhile.
            model = Mimi.from_pretrained(arguments.model, encoder=False)
            stdin = stack.enter_context(open_stdin(CODES_GRACE))
            reader = CodeStreamReader(stdin.read, max_frames=STEP_FRAMES[0])
            codes, length = stdin.until_stopped(iter(reader)), 0
            pieces = _decode_pipe(StreamingDecoder(model), codes, reader.spec)
        else:
            reader = stack.enter_context(open_codes(source))
            model = Mimi.from_pretrained(arguments.model, encoder=False)
            pieces, length = _decode_file(model, reader), reader.num_samples
        _check_model(source, reader.spec, model, arguments.model)
        start, num_samples = time.perf_counter(), 0
        with _audio_target(output, arguments.format, model, length) as write:
            for audio in pieces:
                write(audio)
                num_samples += audio.shape[1]
        report(output, reader.spec, num_samples, time.perf_counter() - start)


def _check_model(path: Path, spec: "CodeSpec", model: "Mimi", name: str) -> None:
    from mimi_jax.checkpoint import check_same_codes

    try:
        check_same_codes(spec, model)
    except ValueError as error:
        source = "the code stream" if path == PIPE else path
        raise ValueError(f"{name} cannot decode {source}: {error}; name the right one with --model") from None


def _encode_pipe(encoder: "StreamingEncoder", stdin: Stdin, pcm_format: str | None) -> "Pieces":
    from mimi_jax.streams.push import STEP_FRAMES
    from mimi_jax.streams.wire import read_pcm

    channels, frame_size = encoder.config.audio_channels, encoder.config.frame_size
    encoder.warmup()  # the header has been written, so a decoder behind this pipe warms up at the same time
    num_samples = 0
    for audio in read_pcm(stdin.read, pcm_format, channels, frame_size, max_frames=STEP_FRAMES[0]):
        num_samples += audio.shape[1]
        if (codes := encoder.push(audio[None])) is not None:
            yield codes[0], codes.shape[2] * frame_size
    if (codes := encoder.flush()) is not None:
        yield codes[0], num_samples % frame_size


def _encode_file(model: "Mimi", path: Path, num_quantizers: int) -> "Pieces":
    from mimi_jax.files.audio import AudioReader
    from mimi_jax.streams.chunks import encode_chunks

    config = model.config
    with path.open("rb") as file:
        with no_stderr():
            reader = AudioReader(file, str(path), config.sampling_rate, config.audio_channels)
        with progress("encoding", reader.num_samples, config.sampling_rate) as update:
            for codes, num_samples in encode_chunks(model, without_stderr(reader), num_quantizers):
                update(num_samples)
                yield codes, num_samples


def _decode_pipe(decoder: "StreamingDecoder", pieces: "Pieces", spec: "CodeSpec") -> "Iterator[np.ndarray]":
    decoder.warmup(spec.num_codebooks)
    for codes, num_samples in pieces:
        audio = decoder.push(codes)
        assert audio is not None
        yield audio[0, :, :num_samples]


def _decode_file(model: "Mimi", reader: "CodeReader") -> "Iterator[np.ndarray]":
    from mimi_jax.streams.chunks import decode_chunks

    left = reader.num_samples
    with progress("decoding", left, reader.spec.sampling_rate) as update:
        for audio in decode_chunks(model, (codes for codes, _ in reader)):
            yield audio[:, :left]
            update(min(left, audio.shape[1]))
            left -= audio.shape[1]


@contextlib.contextmanager
def _code_target(path: Path, spec: "CodeSpec") -> "Iterator[Callable[[np.ndarray, int], None]]":
    """Yield a function that writes the next codes, and takes their number of samples, to a file or a pipe."""
    from mimi_jax.files.codes import code_writer
    from mimi_jax.streams.wire import CodeStreamWriter

    if path == PIPE:
        writer = CodeStreamWriter(write_stdout, spec)
        yield writer.write
        writer.close()
    else:
        with code_writer(path, spec) as writer:
            yield writer.write


@contextlib.contextmanager
def _audio_target(
    path: Path, pcm_format: str | None, model: "Mimi", num_samples: int
) -> "Iterator[Callable[[np.ndarray], None]]":
    """Yield a function that writes the next audio to a file or a pipe."""
    from mimi_jax.files.audio import audio_writer
    from mimi_jax.streams.wire import to_pcm

    if path == PIPE:
        yield lambda audio: write_stdout(to_pcm(audio, pcm_format or PCM_FORMATS[0]))
    else:
        config = model.config
        with audio_writer(path, config.sampling_rate, config.audio_channels, num_samples) as write:
            yield write
