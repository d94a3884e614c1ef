"""Many independent streams on one model: each session is a row of a batch, and a step takes all of them on.

    async with Pool(model, rows=64) as pool:
        async with pool.encoder(num_quantizers=8) as session:
            codes = await session.push(audio)  # any number of samples; the frames that they complete
            codes = await session.flush()  # the last, partial frame

Sessions come and go at any time, and share nothing but the program: each gets exactly what it would get
alone. A step runs as soon as all sessions have a frame, or `DEADLINE` after the first of them had one. Steps
follow each other without waiting for results; a session has at most `WAITING` frames in the pool, so one that
sends faster than the pool steps waits in `push`.
"""

import asyncio
import collections
import concurrent.futures
import contextlib
import functools
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import ArrayLike

from mimi_jax.boundary import check_streamable, transfers_allowed
from mimi_jax.model import DecoderState, EncoderState, Mimi
from mimi_jax.streams.batch import Batch, Row
from mimi_jax.streams.push import audio_as_numpy, codes_as_numpy

DEADLINE = 0.02  # seconds that a frame waits for those of other sessions
WAITING = 8  # frames of a session
IN_FLIGHT = 2  # steps of one half that are started and have not given their results yet

StreamState = EncoderState | DecoderState
Result = TypeVar("Result")


class Step(NamedTuple):
    """A step that has given its results, for those who watch a pool."""

    half: str  # "encoder" or "decoder"
    rows: int  # of the batch
    frames: int  # how many rows had one
    seconds: float  # from the start of the step to its results
    delays: list[float]  # seconds from when each frame came to its result


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
        # One thread starts steps and changes rows, so these never meet. Others wait for results.
        self._starter = concurrent.futures.ThreadPoolExecutor(1, "mimi-step")
        self._waiters = concurrent.futures.ThreadPoolExecutor(2 * IN_FLIGHT, "mimi-result")
        halves = [
            half
            for half, part in (("encoder", model.encoder), ("decoder", model.decoder))
            if part is not None
        ]
        self._halves = {half: _Half(self, half, rows, on_step) for half in halves}
        self._loops: list[asyncio.Task] = []

    async def __aenter__(self) -> "Pool":
        self._loops = [asyncio.create_task(half.run()) for half in self._halves.values()]
        return self

    async def __aexit__(self, *_: object) -> None:
        for loop in self._loops:
            loop.cancel()
        await asyncio.gather(*self._loops, return_exceptions=True)
        for half in self._halves.values():
            half.fail(RuntimeError("the pool was closed"))
        self._starter.shutdown()
        self._waiters.shutdown()

    async def warmup(self) -> None:
        """Compile all programs, before the first session."""
        for half in self._halves.values():
            await self.start(half.batch.warmup)

    def encoder(
        self, num_quantizers: int | None = None, state: StreamState | None = None
    ) -> "EncoderSession":
        """A session that encodes, to be used with `async with`.

        Args:
            num_quantizers: codebooks, the first ones; None for all of the pool's.
            state: of a stream that continues, from `detach` or `take_rows`; None for a fresh one.
        """
        return EncoderSession(self, self._half("encoder"), num_quantizers, state)

    def decoder(self, state: StreamState | None = None) -> "DecoderSession":
        """A session that decodes, as `encoder`."""
        return DecoderSession(self, self._half("decoder"), state)

    def num_sessions(self) -> dict[str, int]:
        """How many sessions each half has."""
        return {half: len(each.sessions) for half, each in self._halves.items()}

    def num_waiting(self) -> dict[str, int]:
        """How many frames wait for a step of each half."""
        return {half: sum(len(s.frames) for s in each.sessions) for half, each in self._halves.items()}

    def _half(self, half: str) -> "_Half":
        if half not in self._halves:
            raise ValueError(f"the model was loaded without its {half}")
        return self._halves[half]

    def start(self, call: Callable[[], Result]) -> "asyncio.Future[Result]":
        """Make a call in the thread that starts steps, after the calls before it."""
        return asyncio.get_running_loop().run_in_executor(self._starter, call)

    def fetch(self, array: Any) -> "asyncio.Future[np.ndarray]":
        """The values of an array, when they are computed."""

        @transfers_allowed()
        def fetch() -> np.ndarray:
            return np.asarray(array)

        return asyncio.get_running_loop().run_in_executor(self._waiters, fetch)


class _Frame(NamedTuple):
    values: np.ndarray
    came: float  # when, in seconds of `time.monotonic`
    result: "asyncio.Future[np.ndarray]"


class _Half:
    """The sessions of one half, and the loop that steps them."""

    def __init__(self, pool: Pool, half: str, rows: int, on_step: Callable[[Step], None]):
        self.batch = Batch(pool.model, half, rows, pool.num_quantizers)
        self.sessions: set[_Session] = set()
        self._pool, self._name, self._on_step = pool, half, on_step
        self.ready = 0  # sessions that have a frame
        self._some, self._all, self._is_free = asyncio.Event(), asyncio.Event(), asyncio.Semaphore(IN_FLIGHT)
        self._deliveries: set[asyncio.Task] = set()
        self._failure: Exception | None = None

    def check(self) -> None:
        """Refuse work after a failure."""
        if self._failure is not None:
            raise RuntimeError(f"the pool has stopped: {self._failure}") from self._failure

    def look(self) -> None:
        """See which sessions have a frame."""
        self.ready = sum(bool(session.frames) for session in self.sessions)
        self.tell()

    def tell(self) -> None:
        """Tell the loop whether there is a frame, and whether all sessions have one."""
        (self._some.set if self.ready else self._some.clear)()
        (self._all.set if self.ready == len(self.sessions) else self._all.clear)()

    async def run(self) -> None:
        """Step for ever."""
        try:
            while True:
                await self._some.wait()
                await self._is_free.acquire()
                await self._wait_for_others()
                await self._step()
        except Exception as error:  # the memory of the states was given away, so no session can go on
            self.fail(error)

    def fail(self, error: Exception) -> None:
        """End all sessions with an error."""
        self._failure = self._failure or error
        for session in self.sessions:
            _fail(session.frames, self._failure)
            session.frames.clear()

    async def _wait_for_others(self) -> None:
        """Return when all sessions have a frame, or the oldest frame has waited long enough."""
        oldest = min((session.frames[0].came for session in self.sessions if session.frames), default=0.0)
        if (left := oldest + DEADLINE - time.monotonic()) > 0:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._all.wait(), left)

    async def _step(self) -> None:
        frames = {session.row: session.frames.popleft() for session in self.sessions if session.frames}
        self.look()
        if not frames:  # their sessions have ended
            self._is_free.release()
            return
        started = time.monotonic()

        def start() -> tuple[Any, dict[Row, int]]:
            numbers = {row: row.number for row in frames}  # of this step; rows may move after it
            return self.batch.step({row: frame.values for row, frame in frames.items()}), numbers

        try:
            outputs, numbers = await self._pool.start(start)
        except BaseException as error:
            _fail(frames.values(), error)
            raise
        delivery = asyncio.create_task(self._deliver(outputs, numbers, frames, started))
        self._deliveries.add(delivery)
        delivery.add_done_callback(self._deliveries.discard)

    async def _deliver(
        self, outputs: Any, numbers: dict[Row, int], frames: dict[Row, _Frame], started: float
    ) -> None:
        try:
            values = await self._pool.fetch(outputs)
        except Exception as error:
            _fail(frames.values(), error)
            return self.fail(error)
        finally:
            self._is_free.release()
        now = time.monotonic()
        for row, frame in frames.items():
            if not frame.result.done():  # it is cancelled with the task that waits for it
                frame.result.set_result(values[numbers[row]].copy())
        delays = [now - frame.came for frame in frames.values()]
        self._on_step(Step(self._name, len(values), len(frames), now - started, delays))


def _fail(frames: Iterable[_Frame], error: BaseException) -> None:
    for frame in frames:
        if not frame.result.done():
            frame.result.set_exception(error)


class _Session:
    """What both halves share: a row, its frames that wait, and its end."""

    row: Row

    def __init__(self, pool: Pool, half: _Half, state: StreamState | None):
        self._pool, self._half, self._first_state = pool, half, state
        self.frames: collections.deque[_Frame] = collections.deque()
        self._is_pushing = False
        self._end = "the session is not open; use `async with`"

    async def __aenter__(self):
        self._half.check()
        self.row = await self._pool.start(functools.partial(self._half.batch.take, self._first_state))
        self._half.sessions.add(self)
        self._half.tell()
        self._end = ""
        return self

    async def __aexit__(self, *_: object) -> None:
        self._end = "the session has ended"
        self._half.sessions.discard(self)
        self._half.look()  # the others need not wait for this one
        await asyncio.shield(self._pool.start(functools.partial(self._half.batch.give_back, self.row)))

    async def detach(self) -> StreamState:
        """End the session. Returns the state of its stream, of one row, for a session of another pool."""
        self._check()
        self._end = "the session was detached"
        return await self._pool.start(functools.partial(self._half.batch.copy, self.row))

    def _check(self) -> None:
        self._half.check()
        if self._end:
            raise RuntimeError(self._end)

    async def _submit(self, frames: np.ndarray) -> list[np.ndarray]:
        """The results of frames [count, ...], which take part in as many steps."""
        if self._is_pushing:
            raise RuntimeError("another push of this session is not done; await it first")
        loop, self._is_pushing = asyncio.get_running_loop(), True
        waiting: collections.deque[asyncio.Future[np.ndarray]] = collections.deque()
        results = []
        try:
            for values in frames:
                if len(waiting) == WAITING:
                    results.append(await waiting.popleft())
                    self._half.check()
                waiting.append(loop.create_future())
                self.frames.append(_Frame(values, time.monotonic(), waiting[-1]))
                if len(self.frames) == 1:
                    self._half.ready += 1
                    self._half.tell()
            results += [await result for result in waiting]
        except BaseException:
            self._end = self._end or "the stream broke off in the middle of a push"
            for result in waiting:
                if not result.cancel() and not result.cancelled():
                    result.exception()  # asyncio reports errors that nobody has looked at
            raise
        self._is_pushing = False
        return results


class EncoderSession(_Session):
    """A stream of audio into codes; see `Pool.encoder`.

    Attributes:
        num_quantizers: codebooks of the frames that `push` gives. It may change at any time.
        pending: float32 [channels, samples], what does not make a frame yet.
    """

    def __init__(self, pool: Pool, half: _Half, num_quantizers: int | None, state: StreamState | None):
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
        self.pending = np.zeros((pool.model.config.audio_channels, 0), np.float32)

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
        config = self._pool.model.config
        array = np.asarray(audio)
        array = audio_as_numpy(config, array if array.ndim == 1 else array[None])
        audio = np.concatenate([self.pending, array[0]], axis=1)
        length = audio.shape[1] // config.frame_size * config.frame_size
        self.pending = audio[:, length:].copy()
        frames = audio[:, :length].reshape(len(audio), -1, config.frame_size).swapaxes(0, 1)
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
        return self._join(await self._submit(frame[None]))

    def _join(self, codes: list[np.ndarray]) -> np.ndarray:
        whole = np.concatenate([np.zeros((self._pool.num_quantizers, 0), np.int32), *codes], axis=1)
        return whole[: self.num_quantizers]


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
        padded = np.pad(array, [(0, missing), (0, 0)], constant_values=self._half.batch.nothing)
        audio = await self._submit(np.moveaxis(padded, 1, 0)[..., None])
        empty = np.zeros((pool.model.config.audio_channels, 0), np.float32)
        return np.concatenate([empty, *audio], axis=1)
