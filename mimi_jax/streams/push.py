"""Streams that take pieces of any length, for the Python code around JAX.

Inside `jit`, use `encode_step` and `decode_step`. The classes here keep the state for these functions and cut
the pieces into frames. They flatten half of the model once, instead of all of it in each step.

A step takes one array from the host and starts one program. A push first starts all of its steps and then
waits for their results, which is the only time that it waits for the device.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, Generic

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from numpy.typing import ArrayLike

from mimi_jax.boundary import as_numpy, check_batch_size, check_is_floating, transfers_allowed
from mimi_jax.config import MimiConfig
from mimi_jax.files.codes import check_range
from mimi_jax.model import HALVES, DecoderState, EncoderState, Mimi, decode_step, encode_step
from mimi_jax.nn.streaming import State

# Frames per step, longest first. If many frames are waiting, eight at a time are several times as fast as one
# at a time. Longer steps would gain little, and each length is one more program to compile.
STEP_FRAMES = (8, 1)


class _Stream(Generic[State]):
    """What both directions share: a batch of streams that continue together, and that may have stopped."""

    def __init__(self, model: Mimi, half: str, init_state: Callable[[int], State], batch_size: int):
        self.config, self.batch_size, self._model = model.config, check_batch_size(batch_size), model
        self._parameters, self._structure = jax.tree.flatten(half_of(model, half))
        self._init_state = init_state
        self.reset()

    def reset(self) -> None:
        """Start new streams, as if nothing had been pushed yet."""
        self._state, self._stopped = self._fresh_state(), ""

    def _fresh_state(self) -> tuple[State, State]:
        return split_rings(fresh_state(self._init_state, self.batch_size))

    def _check_not_stopped(self) -> None:
        if self._stopped:
            raise RuntimeError(f"{self._stopped}; call reset() to start a new stream")

    @contextlib.contextmanager
    def _stepping(self) -> Iterator[None]:
        """Stop the stream unless all steps inside succeed: each step donates the old state.

        What is pushed comes from the host, and what is returned goes there, so transfers are allowed.
        """
        self._stopped = "the stream broke off in the middle of a push"
        with transfers_allowed():
            yield
        self._stopped = ""


class StreamingEncoder(_Stream[EncoderState]):
    """Encode a stream that arrives in pieces of any length.

        encoder = StreamingEncoder(model)
        for piece in microphone:
            codes = encoder.push(piece)  # None while no frame is complete
        codes = encoder.flush()  # the last, partial frame, or None

    In float32, all codes together are those of `encode` on the whole clip.

    Args:
        model: a model with an encoder, that can stream.
        batch_size: how many streams are pushed together, in pieces of the same length.
        num_quantizers: how many codebooks to use, the first ones; None for all.

    Raises:
        ValueError: the model cannot stream, has no encoder, or has fewer codebooks.
    """

    def __init__(self, model: Mimi, batch_size: int = 1, num_quantizers: int | None = None):
        self.num_quantizers = model.quantizer.resolve_count(num_quantizers)
        super().__init__(model, "encoder", model.init_encoder_state, batch_size)

    def reset(self) -> None:
        super().reset()
        self._pending = np.zeros((self.batch_size, self.config.audio_channels, 0), np.float32)

    @transfers_allowed()
    def warmup(self) -> None:
        """Compile everything that `push` and `flush` run. The stream does not change."""
        for frames in STEP_FRAMES:
            num_samples = frames * self.config.frame_size
            silence = np.zeros((self.batch_size, self.config.audio_channels, num_samples), np.float32)
            state = self._fresh_state()
            for _ in range(2):  # the first step may change on which devices the arrays of a state are
                state, _ = self._step(state, silence)

    def push(self, audio: ArrayLike) -> np.ndarray | None:
        """Continue the streams by any number of samples, from none to minutes.

        Args:
            audio: float [batch, channels, samples] in [-1, 1], at `config.sampling_rate`. A single stream
                with one channel may be [samples].

        Returns:
            int32 [batch, codebooks, frames], the frames that these samples complete; None if there are none.

        Raises:
            ValueError: the audio has another shape or dtype, or is not finite. The stream does not change.
            RuntimeError: the stream was flushed, or broke off in an earlier push.
        """
        self._check_not_stopped()
        audio = np.concatenate([self._pending, audio_as_numpy(self.config, audio, self.batch_size)], axis=2)
        size, start, codes = self.config.frame_size, 0, []
        with self._stepping():
            for frames in _steps(audio.shape[2] // size):
                stop = start + frames * size
                self._state, new = self._step(self._state, audio[:, :, start:stop])
                codes.append(new)
                start = stop
            self._pending = audio[:, :, start:].copy()  # a copy, or it would keep all of `audio` alive
            return _fetch(codes)

    def flush(self) -> np.ndarray | None:
        """End the streams.

        Returns:
            int32 [batch, codebooks, 1], the last frame if it is not complete, with the codes that `encode`
            gives it; None if the last frame was complete.

        Raises:
            RuntimeError: the stream was flushed already, or broke off in an earlier push.
        """
        self._check_not_stopped()
        length, codes = self._pending.shape[2], None
        if length:
            missing = [(0, 0), (0, 0), (0, self.config.frame_size - length)]
            audio = np.pad(self._pending, missing, constant_values=np.nan)
            with self._stepping():
                codes = _fetch([self._step(self._state, audio)[1]])
        self._stopped = "the stream has ended with flush()"
        return codes

    def _step(self, state: tuple, audio: np.ndarray) -> tuple[tuple, jax.Array]:
        """Step by whole frames, in which samples that do not exist are NaN."""
        return encode_frames(self._structure, self._parameters, *state, audio, self.num_quantizers)


class StreamingDecoder(_Stream[DecoderState]):
    """Decode a stream that arrives in pieces of any number of frames.

        decoder = StreamingDecoder(model)
        audio = decoder.push(codes)

    All audio together is that of `decode` on the codes of the whole clip. Each frame gives its samples at
    once, so there is no `flush`.

    Args:
        model: a model with a decoder, that can stream.
        batch_size: how many streams are pushed together.

    Raises:
        ValueError: the model cannot stream, or has no decoder.
    """

    def __init__(self, model: Mimi, batch_size: int = 1):
        super().__init__(model, "decoder", model.init_decoder_state, batch_size)

    @transfers_allowed()
    def warmup(self, num_quantizers: int | None = None) -> None:
        """Compile everything that `push` runs. The stream does not change.

        Args:
            num_quantizers: how many codebooks the pushed codes will have; None for all.
        """
        count = self._model.quantizer.resolve_count(num_quantizers)
        for frames in STEP_FRAMES:
            state, codes = self._fresh_state(), np.zeros((self.batch_size, count, frames), np.int32)
            for _ in range(2):  # as in the encoder
                state, _ = decode_frames(self._structure, self._parameters, *state, codes)

    def push(self, audio_codes: ArrayLike) -> np.ndarray | None:
        """Continue the streams by any number of frames, from none to minutes.

        Args:
            audio_codes: int [batch, codebooks, frames], of all codebooks or the first ones. A single stream
                may be [codebooks, frames].

        Returns:
            float32 [batch, channels, frames * frame_size]; None if there are no frames.

        Raises:
            ValueError: the codes have another shape or dtype, or the model does not have such codes or
                codebooks. The stream does not change.
            RuntimeError: the stream broke off in an earlier push.
        """
        self._check_not_stopped()
        codes = codes_as_numpy(self._model, audio_codes, self.batch_size)
        start, audio = 0, []
        with self._stepping():
            for frames in _steps(codes.shape[2]):
                piece = codes[:, :, start : start + frames]
                self._state, new = decode_frames(self._structure, self._parameters, *self._state, piece)
                audio.append(new)
                start += frames
            return _fetch(audio)


def audio_as_numpy(config: MimiConfig, audio: ArrayLike, batch_size: int = 1) -> np.ndarray:
    """Audio as float32 [batch, channels, samples], with its values checked.

    Args:
        config: of the model to encode the audio with.
        audio: float [batch, channels, samples]. A single stream with one channel may be [samples].
        batch_size: how many streams there must be.

    Raises:
        ValueError: the audio has another shape or dtype, or is not finite.
    """
    array, channels = as_numpy("audio", audio), config.audio_channels
    if array.ndim == 1 and batch_size == channels == 1:
        array = array[None, None]
    if array.ndim != 3 or array.shape[:2] != (batch_size, channels):
        short = " or [samples]" if batch_size == channels == 1 else ""
        expected = f"[batch={batch_size}, channels={channels}, samples]{short}"
        raise ValueError(f"audio must be {expected}, got {list(array.shape)}")
    return samples_as_float32(array)


def samples_as_float32(audio: np.ndarray) -> np.ndarray:
    """Audio of any shape as float32. Refuses integers and what is not finite."""
    if audio.dtype != np.float32:
        check_is_floating(audio)
        audio = audio.astype(np.float32)
    # If a sample is not finite, the sum of squares is not either. It is faster to compute, but may overflow.
    samples = audio.ravel()
    if not math.isfinite(samples.dot(samples)) and not np.isfinite(samples).all():
        raise ValueError(
            "audio has samples that are NaN or infinite, which would spoil the state of the stream"
        )
    return audio


def codes_as_numpy(model: Mimi, audio_codes: ArrayLike, batch_size: int = 1) -> np.ndarray:
    """Codes as int32 [batch, codebooks, frames], with their values checked, which compiled functions cannot
    do.

    Args:
        model: the model to decode the codes with.
        audio_codes: int [batch, codebooks, frames]. A single stream may be [codebooks, frames].
        batch_size: how many streams there must be.

    Raises:
        ValueError: the codes have another shape or dtype, or the model does not have such codes or codebooks.
    """
    codes = as_numpy("codes", audio_codes)
    shape = list(codes.shape)
    if codes.ndim == 2 and batch_size == 1:
        codes = codes[None]
    if codes.dtype.kind not in "iu" or codes.ndim != 3 or len(codes) != batch_size:
        short = " or [codebooks, frames]" if batch_size == 1 else ""
        raise ValueError(
            f"codes must be integers [batch={batch_size}, codebooks, frames]{short}, got"
            f" {codes.dtype} {shape}"
        )
    model.quantizer.resolve_count(codes.shape[1])
    check_range(codes, model.config.codebook_size)
    return codes.astype(np.int32)


def fresh_state(init_state: Callable[[int], State], batch_size: int) -> State:
    """The state of fresh streams: zeros, made without compiling a program for each array."""
    shapes = jax.eval_shape(lambda: init_state(batch_size))
    return jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)


def _steps(num_frames: int) -> Iterator[int]:
    """The lengths of the steps that make up `num_frames` frames."""
    for size in STEP_FRAMES:
        yield from [size] * (num_frames // size)
        num_frames %= size


def _fetch(results: list[jax.Array]) -> np.ndarray | None:
    """The results of steps, one after the other in time, as an array that its user may change.

    Here a push waits for the device.
    """
    return np.concatenate([np.asarray(result) for result in results], axis=2) if results else None


def half_of(model: Mimi, half: str) -> Mimi:
    """The model without its other half: every leaf that a program is called with takes time."""
    model = nnx.clone(model)
    for other, parts in HALVES.items():
        for part in parts if other != half else ():
            setattr(model, part, None)
    return model


def split_rings(state: State) -> tuple[State, State]:
    """The rings of keys and values, and the rest of a state, each with None where the other has arrays.

    The rings are donated, so a step writes into them in place. The rest is small and is not donated, or XLA
    would copy what the step still reads after it has written.
    """
    rings = jax.tree.map(lambda leaf: leaf if leaf.ndim == 4 else None, state)
    return rings, jax.tree.map(lambda leaf: None if leaf.ndim == 4 else leaf, state)


def join_rings(rings: State, rest: State) -> State:
    """The inverse of `split_rings`."""
    return jax.tree.map(lambda a, b: b if a is None else a, rings, rest, is_leaf=lambda leaf: leaf is None)


# All streams of models with the same structure share these programs.


@functools.partial(jax.jit, static_argnums=(0, 5), donate_argnums=2)
def encode_frames(
    structure: Any,
    parameters: list,
    rings: EncoderState,
    rest: EncoderState,
    audio: jax.Array,
    num_quantizers: int,
) -> tuple[tuple[EncoderState, EncoderState], jax.Array]:
    # Every step has a mask, so that `flush` does not need a program of its own.
    model, mask = jax.tree.unflatten(structure, parameters), ~jnp.isnan(audio[:, 0])
    state, codes = encode_step(model, join_rings(rings, rest), audio, mask, num_quantizers)
    return split_rings(state), codes


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def decode_frames(
    structure: Any, parameters: list, rings: DecoderState, rest: DecoderState, codes: jax.Array
) -> tuple[tuple[DecoderState, DecoderState], jax.Array]:
    model = jax.tree.unflatten(structure, parameters)
    state, audio = decode_step(model, join_rings(rings, rest), codes)
    return split_rings(state), audio.astype(jnp.float32)
