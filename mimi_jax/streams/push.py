"""Streams that are pushed in pieces of any length, for the Python code around JAX.

Inside `jit`, use `encode_step` and `decode_step`. The classes here keep the state for them, cut what
comes into frames, flatten the model once instead of in each step, and let each step write its state into
the memory of the one before.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from mimi_jax.files.codes import check_range
from mimi_jax.model import Mimi, decode_step, encode_step

# Frames in a step, longest first. What has piled up goes eight at a time, several times as fast as one by
# one; longer steps gain little more, and each length is one more program to compile.
STEP_FRAMES = (8, 1)


class _Stream:
    """What both directions share: a batch of streams, which go on together, and may have stopped."""

    def __init__(self, model: Mimi, init_state: Callable[[int], Any], batch_size: int):
        if type(batch_size) is not int or batch_size < 1:
            raise ValueError(f"batch_size must be a positive integer, got {batch_size!r}")
        self.config, self.batch_size = model.config, batch_size
        self._parameters, self._structure = jax.tree.flatten(model)
        self._fresh_state = functools.partial(fresh_state, init_state, batch_size)
        self.reset()

    def reset(self) -> None:
        """Start anew, as if nothing had been pushed yet."""
        self._state, self._stopped = self._fresh_state(), None

    def _check_not_stopped(self) -> None:
        if self._stopped:
            raise RuntimeError(f"{self._stopped}; call reset() to start a new stream")

    @contextlib.contextmanager
    def _stepping(self) -> Iterator[None]:
        """Unless all steps inside succeed, the state is gone: its memory was given away."""
        self._stopped = "the stream broke off in the middle of a push"
        yield
        self._stopped = None


class StreamingEncoder(_Stream):
    """Encode a stream that is pushed in pieces of any length.

        encoder = StreamingEncoder(model)
        for piece in microphone:
            codes = encoder.push(piece)  # None while no frame is complete
        codes = encoder.flush()  # the last, partial frame, or None

    All codes together are those of `encode` on the whole clip, in float32.

    Args:
        model: a codec that can stream and has its encoder.
        batch_size: streams that are pushed together, in pieces of the same length.
        num_quantizers: how many codebooks to use, the first ones; None for all.

    Raises:
        ValueError: the model cannot stream, has no encoder, or not so many codebooks.
    """

    def __init__(self, model: Mimi, batch_size: int = 1, num_quantizers: int | None = None):
        if num_quantizers is None:
            num_quantizers = model.config.num_quantizers
        self.num_quantizers = model.quantizer.resolve_count(num_quantizers)
        super().__init__(model, model.init_encoder_state, batch_size)

    def reset(self) -> None:
        super().reset()
        self._pending = np.zeros((self.batch_size, self.config.audio_channels, 0), np.float32)

    def warmup(self) -> None:
        """Compile all that `push` and `flush` will run. The stream stays as it is."""
        for frames in STEP_FRAMES:
            num_samples = frames * self.config.frame_size
            silence = np.zeros((self.batch_size, self.config.audio_channels, num_samples), np.float32)
            state = self._fresh_state()
            for _ in range(2):  # where the arrays of a state lie may change with the first step
                state, _ = self._step(state, silence, num_samples)

    def push(self, audio: ArrayLike) -> np.ndarray | None:
        """Go on by some samples: none, or minutes of them.

        Args:
            audio: float [batch, channels, samples] in [-1, 1], at `config.sampling_rate`; or [samples],
                of one stream with one channel.

        Returns:
            int32 [batch, codebooks, frames], every frame that is complete now and was not before; None if
            there is none.

        Raises:
            ValueError: audio of another shape or dtype, or not finite; the stream stays as it was.
            RuntimeError: after `flush`, or after a push that broke off.
        """
        self._check_not_stopped()
        audio = np.concatenate([self._pending, self._check_audio(audio)], axis=2)
        size, start, codes = self.config.frame_size, 0, []
        with self._stepping():
            for frames in _steps(audio.shape[2] // size):
                stop = start + frames * size
                self._state, new = self._step(self._state, audio[:, :, start:stop], stop - start)
                codes.append(np.asarray(new))
                start = stop
            self._pending = audio[:, :, start:].copy()  # a copy, or it would keep all of `audio` alive
            return np.concatenate(codes, axis=2) if codes else None

    def flush(self) -> np.ndarray | None:
        """End the stream.

        Returns:
            int32 [batch, codebooks, 1], the last frame where it is not a whole one, as `encode` ends a
            clip; None if there is none.

        Raises:
            RuntimeError: after `flush`, or after a push that broke off.
        """
        self._check_not_stopped()
        length, codes = self._pending.shape[2], None
        if length:
            audio = np.pad(self._pending, [(0, 0), (0, 0), (0, self.config.frame_size - length)])
            with self._stepping():
                codes = np.asarray(self._step(self._state, audio, length)[1])
        self._stopped = "the stream has ended with flush()"
        return codes

    def _step(self, state: Any, audio: np.ndarray, length: int) -> tuple[Any, jax.Array]:
        """Step by whole frames, of which the first `length` samples are real."""
        # The mask of a step without an end is True everywhere: `flush` needs no program of its own.
        mask = np.broadcast_to(np.arange(audio.shape[2]) < length, (self.batch_size, audio.shape[2]))
        return _encode_step(self._structure, self._parameters, state, audio, mask, self.num_quantizers)

    def _check_audio(self, audio: ArrayLike) -> np.ndarray:
        """As float32 [batch, channels, samples]."""
        array = np.asarray(audio)
        batch, channels = self.batch_size, self.config.audio_channels
        if array.ndim == 1 and batch == channels == 1:
            array = array[None, None]
        if array.ndim != 3 or array.shape[:2] != (batch, channels):
            short = " or [samples]" if batch == channels == 1 else ""
            raise ValueError(
                f"audio must be [batch={batch}, channels={channels}, samples]{short}, got"
                f" {list(np.shape(audio))}"
            )
        if not jnp.issubdtype(array.dtype, np.floating):
            raise ValueError(
                f"audio must be floating point in [-1, 1], got {array.dtype}; divide int16 by 32768"
            )
        array = array.astype(np.float32)
        if not np.isfinite(array).all():
            raise ValueError("audio has samples that are NaN or infinite, which the stream would remember")
        return array


class StreamingDecoder(_Stream):
    """Decode a stream that is pushed in pieces of any number of frames.

        decoder = StreamingDecoder(model)
        audio = decoder.push(codes)

    All audio together is that of `decode` on the codes of the whole clip. There is nothing to flush: each
    frame gives its samples at once.

    Args:
        model: a codec that can stream and has its decoder.
        batch_size: streams that are pushed together.

    Raises:
        ValueError: the model cannot stream or has no decoder.
    """

    def __init__(self, model: Mimi, batch_size: int = 1):
        self._check_count = model.quantizer.resolve_count
        super().__init__(model, model.init_decoder_state, batch_size)

    def warmup(self, num_quantizers: int | None = None) -> None:
        """Compile all that `push` will run. The stream stays as it is.

        Args:
            num_quantizers: how many codebooks the codes will be of; None for all.
        """
        count = self._check_count(self.config.num_quantizers if num_quantizers is None else num_quantizers)
        for frames in STEP_FRAMES:
            state, codes = self._fresh_state(), np.zeros((self.batch_size, count, frames), np.int32)
            for _ in range(2):  # as in the encoder
                state, _ = _decode_step(self._structure, self._parameters, state, codes)

    def push(self, audio_codes: ArrayLike) -> np.ndarray | None:
        """Go on by some frames: none, or minutes of them.

        Args:
            audio_codes: int [batch, codebooks, frames], of all or the first codebooks; or
                [codebooks, frames], of one stream.

        Returns:
            float32 [batch, channels, frames * frame_size]; None for no frames.

        Raises:
            ValueError: codes of another shape or dtype, or codes or codebooks that the model does not
                have; the stream stays as it was.
            RuntimeError: after a push that broke off.
        """
        self._check_not_stopped()
        codes = self._check_codes(audio_codes)
        start, audio = 0, []
        with self._stepping():
            for frames in _steps(codes.shape[2]):
                piece = codes[:, :, start : start + frames]
                self._state, new = _decode_step(self._structure, self._parameters, self._state, piece)
                audio.append(np.asarray(new, np.float32))
                start += frames
            return np.concatenate(audio, axis=2) if audio else None

    def _check_codes(self, audio_codes: ArrayLike) -> np.ndarray:
        """As int32 [batch, codebooks, frames]."""
        codes = np.asarray(audio_codes)
        if codes.ndim == 2 and self.batch_size == 1:
            codes = codes[None]
        if codes.dtype.kind not in "iu" or codes.ndim != 3 or len(codes) != self.batch_size:
            short = " or [codebooks, frames]" if self.batch_size == 1 else ""
            raise ValueError(
                f"codes must be integers [batch={self.batch_size}, codebooks, frames]{short}, got"
                f" {codes.dtype} {list(np.shape(audio_codes))}"
            )
        self._check_count(codes.shape[1])
        check_range(codes, self.config.codebook_size)
        return codes.astype(np.int32)


def fresh_state(init_state: Callable[[int], Any], batch_size: int) -> Any:
    """The state of fresh streams, which is all zeros, without compiling a program for each array of it."""
    shapes = jax.eval_shape(lambda: init_state(batch_size))
    return jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)


def _steps(num_frames: int) -> Iterator[int]:
    """The sizes of the steps that make up so many frames."""
    for size in STEP_FRAMES:
        yield from [size] * (num_frames // size)
        num_frames %= size


# All streams of one structure share the compiled programs; the old state's memory becomes the new one's.


@functools.partial(jax.jit, static_argnums=(0, 5), donate_argnums=2)
def _encode_step(
    structure: Any,
    parameters: list,
    state: Any,
    audio: jax.Array,
    padding_mask: jax.Array,
    num_quantizers: int,
) -> tuple[Any, jax.Array]:
    return encode_step(jax.tree.unflatten(structure, parameters), state, audio, padding_mask, num_quantizers)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _decode_step(structure: Any, parameters: list, state: Any, codes: jax.Array) -> tuple[Any, jax.Array]:
    return decode_step(jax.tree.unflatten(structure, parameters), state, codes)
