"""When the streams of a pool are stepped: as soon as the device is free, with the frames that are there.

So frames gather while the device is busy, and no frame waits while it is not. To wait for frames that may
come soon would make steps larger, and late: a step of twice as many rows takes nearly twice as long.

Each half has steps of its own, beside those of the other one. On a CPU two steps at a time are faster than
one after the other, because much of a step is too small for all cores.
"""

import asyncio
import collections
import concurrent.futures
import functools
import time
from collections.abc import Awaitable, Callable, Iterable
from typing import NamedTuple, Protocol, TypeVar

import jax
import numpy as np

from mimi_jax.boundary import transfers_allowed
from mimi_jax.streams.batch import Batch

# Steps of a half that are started and have not given their results yet. The next step of an accelerator is
# ready when the one before it ends. On a CPU it would take the cores away from that one.
IN_FLIGHT, IN_FLIGHT_ON_CPU = 2, 1

Result = TypeVar("Result")


class Step(NamedTuple):
    """A step that has given its results, for those who watch a pool."""

    half: str  # "encoder" or "decoder"
    rows: int  # that were stepped, of which some may have had no frame
    frames: int
    seconds: float  # from the start of the step to its results
    delays: list[float]  # seconds from when each frame came to its result


class Threads:
    """Threads around the compiled programs of a half.

    One starts steps and changes rows, so these never meet. The others wait for results.
    """

    def __init__(self) -> None:
        steps = IN_FLIGHT_ON_CPU if jax.default_backend() == "cpu" else IN_FLIGHT
        self.slots = asyncio.Semaphore(steps)
        self._starter = concurrent.futures.ThreadPoolExecutor(1, "mimi-step")
        self._waiters = concurrent.futures.ThreadPoolExecutor(steps, "mimi-result") if steps > 1 else None

    def start(self, call: Callable[[], Result]) -> "asyncio.Future[Result]":
        """Make a call after the calls before it."""
        return asyncio.get_running_loop().run_in_executor(self._starter, call)

    def values(self, step: Callable[[], jax.Array]) -> Awaitable[np.ndarray]:
        """The values of the array that a call gives, when they are computed. It is made as in `start`."""
        if self._waiters is None:
            return self.start(lambda: _fetch(step()))
        return self._fetched(self.start(step))

    async def _fetched(self, outputs: Awaitable[jax.Array]) -> np.ndarray:
        return await asyncio.get_running_loop().run_in_executor(self._waiters, _fetch, await outputs)

    def close(self) -> None:
        self._starter.shutdown()
        if self._waiters is not None:
            self._waiters.shutdown()


@transfers_allowed()
def _fetch(array: jax.Array) -> np.ndarray:
    return np.asarray(array)


class Frame(NamedTuple):
    values: np.ndarray
    came: float  # when, in seconds of `time.monotonic`
    result: "asyncio.Future[np.ndarray]"


class Session(Protocol):
    """What the loop knows of a session."""

    row: int
    frames: collections.deque[Frame]  # that wait for a step


class Half:
    """The sessions of one half of a model, and their steps.

    Args:
        name: "encoder" or "decoder".
        batch: the rows of the sessions.
        on_step: is called after each step.
    """

    def __init__(self, name: str, batch: Batch, on_step: Callable[[Step], None]):
        self.name, self.batch = name, batch
        self.sessions: set[Session] = set()
        self.threads = Threads()
        self._on_step = on_step
        self._has_frame = asyncio.Event()
        self._steps: set[asyncio.Task] = set()
        self._failure: Exception | None = None

    def check(self) -> None:
        """Refuse work after a failure."""
        if self._failure is not None:
            raise RuntimeError(f"the pool has stopped: {self._failure}") from self._failure

    def fail(self, error: Exception) -> None:
        """End all sessions with an error."""
        self._failure = self._failure or error
        for session in self.sessions:
            fail_frames(session.frames, self._failure)
            session.frames.clear()

    def wake(self) -> None:
        """Say that a session has a frame."""
        self._has_frame.set()

    async def run(self) -> None:
        """Step for ever."""
        while True:
            await self._has_frame.wait()
            await self.threads.slots.acquire()
            frames = self._next_frames()
            if not frames:
                self._has_frame.clear()
                self.threads.slots.release()
                continue
            # It is started here and not in the task: if one of its sessions ends before the task runs, its
            # row must not be another session's already.
            inputs = {row: frame.values for row, frame in frames.items()}
            values = self.threads.values(functools.partial(self.batch.step, inputs))
            step = asyncio.create_task(self._deliver(values, list(frames.values())))
            self._steps.add(step)
            step.add_done_callback(self._steps.discard)

    def _next_frames(self) -> dict[int, Frame]:
        """Take the frames of a step, one of a session, those that came first. Returns them by row."""
        waiting = [session for session in self.sessions if session.frames]
        count = self.batch.frames_of_a_step(len(waiting))
        if count < len(waiting):
            waiting = sorted(waiting, key=lambda session: session.frames[0].came)[:count]
        return {session.row: session.frames.popleft() for session in waiting}

    async def _deliver(self, results: Awaitable[np.ndarray], frames: list[Frame]) -> None:
        started = time.monotonic()
        try:
            values = await results
        except Exception as error:  # the memory of the states was given away, so no session can go on
            fail_frames(frames, error)
            self.fail(error)
        else:
            now = time.monotonic()
            for frame, value in zip(frames, values, strict=False):
                if not frame.result.done():  # it is cancelled with the task that waits for it
                    frame.result.set_result(value)
            delays = [now - frame.came for frame in frames]
            self._on_step(Step(self.name, len(values), len(frames), now - started, delays))
            # Sessions that decode these codes push them now, before the device gets the next step of this
            # half.
            await asyncio.sleep(0)
        finally:
            self.threads.slots.release()


def fail_frames(frames: Iterable[Frame], error: BaseException) -> None:
    for frame in frames:
        if not frame.result.done():
            frame.result.set_exception(error)
