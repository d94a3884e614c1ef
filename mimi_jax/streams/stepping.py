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
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, Protocol, TypeVar

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
        self.steps = IN_FLIGHT_ON_CPU if jax.default_backend() == "cpu" else IN_FLIGHT
        self._starter = concurrent.futures.ThreadPoolExecutor(1, "mimi-step")
        waiters = concurrent.futures.ThreadPoolExecutor(self.steps, "mimi-result")
        self._waiters = waiters if self.steps > 1 else None

    def start(self, call: Callable[[], Result]) -> "asyncio.Future[Result]":
        """Make a call after the calls before it."""
        return asyncio.get_running_loop().run_in_executor(self._starter, call)

    def step(self, call: Callable[[], jax.Array], deliver: Callable[[np.ndarray | Exception], None]) -> None:
        """Make a call as in `start`. When its array is computed, the event loop calls `deliver` with the
        values, or with what went wrong.
        """
        give = functools.partial(asyncio.get_running_loop().call_soon_threadsafe, deliver)
        if self._waiters is None:
            self._starter.submit(_give, give, lambda: _fetch(call()))
        else:
            started = self._starter.submit(call)
            self._waiters.submit(_give, give, lambda: _fetch(started.result()))

    def close(self) -> None:
        self._starter.shutdown()
        if self._waiters is not None:
            self._waiters.shutdown()


def _give(give: Callable[[Any], object], call: Callable[[], np.ndarray]) -> None:
    try:
        result = call()
    except Exception as error:
        give(error)
    else:
        give(result)


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
        self._free_slots = self.threads.steps
        self._is_awake = False
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
        """Say that a session may have a frame.

        The step starts after all callbacks that the event loop has now. So sessions that decode what the
        last step gave push it before the device gets the next step.
        """
        if self._free_slots and not self._is_awake:
            self._is_awake = True
            asyncio.get_running_loop().call_soon(self._start_step)

    def _start_step(self) -> None:
        self._is_awake = False
        if not (frames := self._next_frames()):
            return
        self._free_slots -= 1
        # It is handed over at once: a row that is given back from here on is another session's only after it.
        inputs = {row: frame.values for row, frame in frames.items()}
        deliver = functools.partial(self._deliver, list(frames.values()), time.monotonic())
        self.threads.step(functools.partial(self.batch.step, inputs), deliver)
        self.wake()

    def _next_frames(self) -> dict[int, Frame]:
        """Take the frames of a step, one of a session, those that came first. Returns them by row."""
        waiting = [session for session in self.sessions if session.frames]
        count = self.batch.frames_of_a_step(len(waiting))
        if count < len(waiting):
            waiting = sorted(waiting, key=lambda session: session.frames[0].came)[:count]
        return {session.row: session.frames.popleft() for session in waiting}

    def _deliver(self, frames: list[Frame], started: float, result: np.ndarray | Exception) -> None:
        self._free_slots += 1
        if isinstance(result, Exception):  # the memory of the states was given away, so no session can go on
            fail_frames(frames, result)
            return self.fail(result)
        now = time.monotonic()
        for frame, value in zip(frames, result, strict=False):
            if not frame.result.done():  # it is cancelled with the task that waits for it
                frame.result.set_result(value)
        self.wake()
        delays = [now - frame.came for frame in frames]
        self._on_step(Step(self.name, len(result), len(frames), now - started, delays))


def fail_frames(frames: Iterable[Frame], error: BaseException) -> None:
    for frame in frames:
        if not frame.result.done():
            frame.result.set_exception(error)
