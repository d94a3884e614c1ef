"""Many independent streams on one model: each session is a row of a batch, and a step takes all of them on.

    async with Pool(model, rows=64) as pool:
        async with pool.encoder(num_quantizers=8) as session:
            codes = await session.push(audio)  # any number of samples; the frames that they complete
            codes = await session.flush()  # the last, partial frame

Sessions come and go at any time, and share nothing but the program: each gets exactly what it would get
alone. Each has one push in progress at a time. One that sends faster than the pool steps delays only itself.
"""

import asyncio
import functools
from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike

from mimi_jax.boundary import as_numpy, check_streamable
from mimi_jax.model import Mimi
from mimi_jax.streams.batch import Batch, StreamState
from mimi_jax.streams.push import codes_as_numpy, samples_as_float32
from mimi_jax.streams.stepping import Half, Step, Stream


class Pool:
    """Steps the streams of many sessions together.

    Use it as an asynchronous context manager. When it is left, sessions that are still open end with an
    error.

    Args:
        model: a model that can stream.
        rows: the most sessions of each half at a time, a power of two.
        num_quantizers: the most codebooks that a session may use; None for all.
        on_step: is called after each step.

    Raises:
        ValueError: the model cannot stream or has fewer codebooks, or `rows` is no power of two.
    """

    def __init__(
        self,
        model: Mimi,
        rows: int = 64,
        num_quantizers: int | None = None,
        on_step: Callable[[Step], None] = lambda step: None,
    ):
        if rows < 1 or rows & (rows - 1):
            raise ValueError(f"rows must be a power of two, such as 64, got {rows}")
        check_streamable(model.config)
        self.model, self.num_quantizers = model, model.quantizer.resolve_count(num_quantizers)
        self._halves = {
            half: Half(half, Batch(model, half, rows, self.num_quantizers), on_step)
            for half, part in (("encoder", model.encoder), ("decoder", model.decoder))
            if part is not None
        }

    async def __aenter__(self) -> "Pool":
        return self

    async def __aexit__(self, *_: object) -> None:
        for half in self._halves.values():
            half.fail(RuntimeError("the pool was closed"))
            half.threads.close()

    async def warmup(self) -> None:
        """Compile all programs, before the first session."""
        halves = self._halves.values()
        for half in halves:
            await half.threads.start(half.batch.warmup)
        # Together they need more memory. It is asked for here, and not in the middle of a stream.
        await asyncio.gather(*(half.threads.start(half.batch.warmup) for half in halves))

    def encoder(
        self,
        num_quantizers: int | None = None,
        state: StreamState | None = None,
        pending: np.ndarray | None = None,
    ) -> "EncoderSession":
        """A session that encodes, to be used with `async with`.

        Args:
            num_quantizers: codebooks, the first ones; None for all of the pool's.
            state: of a stream that continues, from `detach` or `take_rows`; None for a fresh one. If it
                does not fit, `async with` raises ValueError.
            pending: `session.pending` of the session that was detached: its samples after the last frame.
        """
        return EncoderSession(self, self._half("encoder"), num_quantizers, state, pending)

    def decoder(self, state: StreamState | None = None) -> "DecoderSession":
        """A session that decodes, as `encoder`."""
        return DecoderSession(self, self._half("decoder"), state)

    def check(self) -> None:
        """Raise RuntimeError if a step has failed, since no session can go on after that."""
        for half in self._halves.values():
            half.check()

    def num_sessions(self) -> dict[str, int]:
        """How many sessions each half has."""
        return {half: len(each.streams) for half, each in self._halves.items()}

    def num_waiting(self) -> dict[str, int]:
        """How many frames wait for a step of each half."""
        return {half: sum(len(s.frames) for s in each.streams) for half, each in self._halves.items()}

    def _half(self, half: str) -> Half:
        if half not in self._halves:
            raise ValueError(f"the model was loaded without its {half}")
        return self._halves[half]


NOT_OPEN = "the session is not open; use `async with`"


class _Session:
    """What both halves share: a stream in a row, and its end."""

    _stream: Stream

    def __init__(self, pool: Pool, half: Half, state: StreamState | None):
        self._pool, self._half, self._first_state = pool, half, state
        self._end = NOT_OPEN

    async def __aenter__(self):
        self._half.check()
        if self._end != NOT_OPEN:
            raise RuntimeError("a session is used once; ask the pool for a new one")
        self._end = "the session is not open yet"
        taking = self._half.threads.start(functools.partial(self._half.batch.take, self._first_state))
        try:
            self._stream = Stream(await asyncio.shield(taking))
        except asyncio.CancelledError:  # the row is taken all the same
            taking.add_done_callback(self._give_back)
            raise
        self._half.streams.add(self._stream)
        self._end = ""
        return self

    async def __aexit__(self, *_: object) -> None:
        self._end = "the session has ended"
        self._stream.fail(RuntimeError(self._end))  # a push of another task
        self._half.streams.discard(self._stream)
        self._half.batch.give_back(self._stream.row)

    def _give_back(self, taking: "asyncio.Future[int]") -> None:
        if taking.exception() is None:
            self._half.batch.give_back(taking.result())

    async def detach(self) -> StreamState:
        """End the session. Returns the state of its stream, of one row, for a session of another pool.

        An encoder's state ends with the last whole frame. The samples after it stay in `pending`: give both
        to `Pool.encoder`.

        Raises:
            RuntimeError: the session has ended, or a push of it is not done.
        """
        self._check()
        self._end = "the session was detached"
        return await self._half.threads.start(functools.partial(self._half.batch.copy, self._stream.row))

    def _check(self) -> None:
        self._half.check()
        if self._end:
            raise RuntimeError(self._end)
        if self._stream.is_pushing:
            raise RuntimeError("another push of this session is not done; await it first")

    async def _submit(self, frames: list[np.ndarray]) -> list[np.ndarray]:
        """The results of frames, which take part in as many steps."""
        if not frames:
            return []
        results = self._stream.push(frames)
        self._half.wake()
        try:
            return await results
        except BaseException:
            self._end = self._end or "the stream broke off in the middle of a push"
            self._stream.frames.clear()
            raise


class EncoderSession(_Session):
    """A stream of audio into codes; see `Pool.encoder`.

    Attributes:
        num_quantizers: codebooks of the frames that `push` gives. It may change at any time.
        pending: float32 [channels, samples], what does not make a frame yet.
    """

    def __init__(
        self,
        pool: Pool,
        half: Half,
        num_quantizers: int | None,
        state: StreamState | None,
        pending: np.ndarray | None,
    ):
        super().__init__(pool, half, state)
        count = (
            pool.num_quantizers
            if num_quantizers is None
            else pool.model.quantizer.resolve_count(num_quantizers)
        )
        if count > pool.num_quantizers:
            raise ValueError(
                f"num_quantizers must be at most {pool.num_quantizers} in this pool, got {count}"
            )
        self.num_quantizers = count
        nothing = np.zeros((pool.model.config.audio_channels, 0), np.float32)
        self.pending = nothing if pending is None else pending

    async def push(self, audio: ArrayLike) -> np.ndarray:
        """Continue the stream by any number of samples.

        Args:
            audio: float [channels, samples] in [-1, 1], at the model's rate. It may be [samples] if there is
                one channel.

        Returns:
            int32 [codebooks, frames], the frames that these samples complete, which may be none.

        Raises:
            ValueError: the audio has another shape or dtype, or is not finite. The stream does not change.
            RuntimeError: the session or the pool has ended.
        """
        self._check()
        config, array = self._pool.model.config, as_numpy("audio", audio)
        channels, size = config.audio_channels, config.frame_size
        if array.ndim == 1 and channels == 1:
            array = array[None]
        if array.ndim != 2 or len(array) != channels:
            expected = f"[channels={channels}, samples]{' or [samples]' if channels == 1 else ''}"
            raise ValueError(f"audio must be {expected}, got {list(array.shape)}")
        array = samples_as_float32(array)
        if not self.pending.shape[1] and array.shape[1] == size:  # as most sessions push
            return self._join(await self._submit([array]))
        array = np.concatenate([self.pending, array], axis=1)
        frames = _in_frames(array, size)
        self.pending = array[:, len(frames) * size :].copy()
        return self._join(await self._submit(frames))

    async def flush(self) -> np.ndarray:
        """End the stream.

        Returns:
            int32 [codebooks, 1], the last frame if it is not complete; otherwise [codebooks, 0].
        """
        self._check()
        self._end = "the stream has ended with flush()"
        size, length = self._pool.model.config.frame_size, self.pending.shape[1]
        if not length:
            return self._join([])
        frame = np.pad(self.pending, [(0, 0), (0, size - length)], constant_values=np.nan)
        return self._join(await self._submit([frame]))

    def _join(self, codes: list[np.ndarray]) -> np.ndarray:
        if len(codes) == 1:
            return codes[0][: self.num_quantizers].copy()  # it would keep the results of the whole step
        empty = np.zeros((self._pool.num_quantizers, 0), np.int32)
        return np.concatenate([empty, *codes], axis=1)[: self.num_quantizers]


def _in_frames(array: np.ndarray, size: int) -> list[np.ndarray]:
    """The whole frames of an array [rows, at least frames * size]."""
    return [array[:, start : start + size] for start in range(0, array.shape[1] - size + 1, size)]


class DecoderSession(_Session):
    """A stream of codes into audio; see `Pool.decoder`."""

    async def push(self, codes: ArrayLike) -> np.ndarray:
        """Continue the stream by any number of frames.

        Args:
            codes: int [codebooks, frames], of the first codebooks. Their number may change from call to call.

        Returns:
            float32 [channels, frames * frame_size].

        Raises:
            ValueError: the codes have another shape or dtype, or the model does not have such codes or more
                codebooks than the pool. The stream does not change.
            RuntimeError: the session or the pool has ended.
        """
        self._check()
        pool = self._pool
        array = codes_as_numpy(pool.model, codes)[0]
        missing = pool.num_quantizers - len(array)
        if missing < 0:
            raise ValueError(
                f"codes must have at most {pool.num_quantizers} codebooks in this pool, got {len(array)}"
            )
        padded = np.full((pool.num_quantizers, array.shape[1]), self._half.batch.nothing, np.int32)
        padded[: len(array)] = array
        audio = await self._submit(_in_frames(padded, 1))
        if len(audio) == 1:
            return audio[0].copy()  # as above
        empty = np.zeros((pool.model.config.audio_channels, 0), np.float32)
        return np.concatenate([empty, *audio], axis=1)
