"""When the streams of a pool are stepped: as soon as no other frame will come soon.

Steps follow each other without waiting for results. One thread starts steps and changes rows, so these never
meet; others wait for results.
"""

import asyncio
import collections
import concurrent.futures
import contextlib
import functools
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np

from mimi_jax.boundary import transfers_allowed
from mimi_jax.streams.batch import Batch

DEADLINE = 0.02  # seconds that a frame waits for those of other sessions
IN_FLIGHT = 2  # steps of one half that are started and have not given their results yet

Result = TypeVar("Result")


class Step(NamedTuple):
    """A step that has given its results, for those who watch a pool."""

    half: str  # "encoder" or "decoder"
    rows: int  # that were stepped, of which some may have had no frame
    frames: int
    seconds: float  # from the start of the step to its results
    delays: list[float]  # seconds from when each frame came to its result


class Threads:
    """Threads around the compiled programs, for all halves of a pool."""

    def __init__(self) -> None:
        self._starter = concurrent.futures.ThreadPoolExecutor(1, "mimi-step")
        self._waiters = concurrent.futures.ThreadPoolExecutor(2 * IN_FLIGHT, "mimi-result")

    def start(self, call: Callable[[], Result]) -> "asyncio.Future[Result]":
        """Make a call in the thread that starts steps, after the calls before it."""
        return asyncio.get_running_loop().run_in_executor(self._starter, call)

    def fetch(self, array: Any) -> "asyncio.Future[np.ndarray]":
        """The values of an array, when they are computed."""

        @transfers_allowed()
        def fetch() -> np.ndarray:
            return np.asarray(array)

        return asyncio.get_running_loop().run_in_executor(self._waiters, fetch)

    def close(self) -> None:
        self._starter.shutdown()
        self._waiters.shutdown()


class Frame(NamedTuple):
    values: np.ndarray
    came: float  # when, in seconds of `time.monotonic`
    result: "asyncio.Future[np.ndarray]"


class Session(Protocol):
    """What the loop knows of a session."""

    row: int
    frames: collections.deque[Frame]  # that wait for a step
    expected: float  # when the next frame may come, as `time.monotonic`


class Half:
    """The sessions of one half, and the loop that steps them.

    Args:
        name: "encoder" or "decoder".
        batch: the rows of the sessions.
        threads: which start steps and wait for them.
        frame_seconds: how long a frame lasts.
        on_step: is called after each step.
    """

    def __init__(
        self,
        name: str,
        batch: Batch,
        threads: Threads,
        frame_seconds: float,
        on_step: Callable[[Step], None],
    ):
        self.batch, self.frame_seconds = batch, frame_seconds
        self.sessions: set[Session] = set()
        self._threads, self._name, self._on_step = threads, name, on_step
        self._some, self._all, self._is_free = asyncio.Event(), asyncio.Event(), asyncio.Semaphore(IN_FLIGHT)
        self._missing: set[Session] = set()  # which have no frame yet, and soon will
        self._deliveries: set[asyncio.Task] = set()
        self._failure: Exception | None = None

    def check(self) -> None:
        """Refuse work after a failure."""
        if self._failure is not None:
            raise RuntimeError(f"the pool has stopped: {self._failure}") from self._failure

    def note(self, session: Session) -> None:
        """A session has a frame, or has ended."""
        self._some.set()
        self._missing.discard(session)
        if not self._missing:
            self._all.set()

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
            fail_frames(session.frames, self._failure)
            session.frames.clear()

    async def _wait_for_others(self) -> None:
        """Return when no session will have a frame soon but has none, or one has waited long enough."""
        ready = [session.frames[0].came for session in self.sessions if session.frames]
        until, now = min(ready, default=0.0) + DEADLINE, time.monotonic()
        self._missing = {s for s in self.sessions if not s.frames and now - DEADLINE < s.expected < until}
        if self._missing and until > now:
            self._all.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._all.wait(), until - now)

    async def _step(self) -> None:
        frames = {session.row: session.frames.popleft() for session in self.sessions if session.frames}
        if not any(session.frames for session in self.sessions):
            self._some.clear()
        if not frames:  # their sessions have ended
            self._is_free.release()
            return
        started, values = time.monotonic(), {row: frame.values for row, frame in frames.items()}
        try:
            outputs = await self._threads.start(functools.partial(self.batch.step, values))
        except BaseException as error:
            fail_frames(frames.values(), error)
            raise
        delivery = asyncio.create_task(self._deliver(outputs, list(frames.values()), started))
        self._deliveries.add(delivery)
        delivery.add_done_callback(self._deliveries.discard)

    async def _deliver(self, outputs: Any, frames: list[Frame], started: float) -> None:
        try:
            values = await self._threads.fetch(outputs)
        except Exception as error:
            fail_frames(frames, error)
            return self.fail(error)
        finally:
            self._is_free.release()
        now = time.monotonic()
        for frame, value in zip(frames, values, strict=False):
            if not frame.result.done():  # it is cancelled with the task that waits for it
                frame.result.set_result(value)
        delays = [now - frame.came for frame in frames]
        self._on_step(Step(self._name, len(values), len(frames), now - started, delays))


def fail_frames(frames: Iterable[Frame], error: BaseException) -> None:
    for frame in frames:
        if not frame.result.done():
            frame.result.set_exception(error)
