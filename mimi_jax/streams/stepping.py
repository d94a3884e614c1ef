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
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

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
    delays: list[float]  # seconds that each frame waited, and was stepped


class Threads:
    """Threads around the compiled programs of a half.

    One starts steps and changes rows, so these never meet. If two steps may be in flight, another one waits
    for results. It is one thread for all steps, so their results come in the order of the steps.
    """

    def __init__(self) -> None:
        self.steps = IN_FLIGHT_ON_CPU if jax.default_backend() == "cpu" else IN_FLIGHT
        self._starter = concurrent.futures.ThreadPoolExecutor(1, "mimi-step")
        self._waiter = None
        if self.steps > 1:
            self._waiter = concurrent.futures.ThreadPoolExecutor(1, "mimi-result")

    def start(self, call: Callable[[], Result]) -> "asyncio.Future[Result]":
        """Make a call after the calls before it."""
        return asyncio.get_running_loop().run_in_executor(self._starter, call)

    def step(self, call: Callable[[], jax.Array], deliver: Callable[[np.ndarray | Exception], None]) -> None:
        """Make a call as in `start`. When its array is computed, the event loop calls `deliver` with the
        values, or with what went wrong.
        """
        give = functools.partial(asyncio.get_running_loop().call_soon_threadsafe, deliver)
        if self._waiter is None:
            self._starter.submit(_give, give, lambda: _fetch(call()))
        else:
            started = self._starter.submit(call)
            self._waiter.submit(_give, give, lambda: _fetch(started.result()))

    def close(self) -> None:
        self._starter.shutdown()
        if self._waiter is not None:
            self._waiter.shutdown()


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


class Stream:
    """A row of a batch, and what is pushed to it. Each frame takes part in a step, one after the other.

    Attributes:
        row: of the batch.
        frames: those that wait for a step.
        since: when the first of them began to wait, in seconds of `time.monotonic`. A frame that came with
            others begins when the one before it is taken.
    """

    def __init__(self, row: int):
        self.row, self.since = row, 0.0
        self.frames: collections.deque[np.ndarray] = collections.deque()
        self._results: list[np.ndarray] = []
        self._num_pushed = 0
        self._done: asyncio.Future[list[np.ndarray]] | None = None

    @property
    def is_pushing(self) -> bool:
        return self._done is not None and not self._done.done()

    def push(self, frames: list[np.ndarray]) -> "asyncio.Future[list[np.ndarray]]":
        """Returns the results of frames, of which there is at least one, when all of them are there.

        The push before must be done.
        """
        self.frames.extend(frames)
        self._results, self._num_pushed, self.since = [], len(frames), time.monotonic()
        self._done = asyncio.get_running_loop().create_future()
        return self._done

    def take(self, now: float) -> np.ndarray:
        """The first frame that waits, which a step takes now."""
        self.since = now
        return self.frames.popleft()

    def give(self, result: np.ndarray) -> None:
        """The result of the frame that was taken first among those without one."""
        self._results.append(result)
        # A push that is done already was cancelled with its task, or has failed.
        if len(self._results) == self._num_pushed and self._done is not None and not self._done.done():
            self._done.set_result(self._results)

    def fail(self, error: Exception) -> None:
        """End the push that is not done, if there is one."""
        self.frames.clear()
        if self._done is not None and not self._done.done():
            self._done.set_exception(error)


class Half:
    """The streams of one half of a model, and their steps.

    Args:
        name: "encoder" or "decoder".
        batch: the rows of the streams.
        on_step: is called after each step.
    """

    def __init__(self, name: str, batch: Batch, on_step: Callable[[Step], None]):
        self.name, self.batch = name, batch
        self.streams: set[Stream] = set()
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
        """End all streams with an error."""
        self._failure = self._failure or error
        for stream in self.streams:
            stream.fail(self._failure)

    def wake(self) -> None:
        """Say that a stream may have a frame.

        The step starts after all callbacks that the event loop has now. So sessions that decode what the
        last step gave push it before the device gets the next step.
        """
        if self._free_slots and not self._is_awake:
            self._is_awake = True
            asyncio.get_running_loop().call_soon(self._start_step)

    def _start_step(self) -> None:
        self._is_awake = False
        if not (streams := self._next_streams()):
            return
        self._free_slots -= 1
        now, since = time.monotonic(), [stream.since for stream in streams]
        # The step is queued at once. If a row is given back later, its next stream starts after this step.
        frames = {stream.row: stream.take(now) for stream in streams}
        deliver = functools.partial(self._deliver, streams, since, now)
        self.threads.step(functools.partial(self.batch.step, frames), deliver)
        self.wake()

    def _next_streams(self) -> list[Stream]:
        """The streams that the next step takes a frame of: those that have waited longest."""
        waiting = [stream for stream in self.streams if stream.frames]
        count = self.batch.frames_of_a_step(len(waiting))
        if count < len(waiting):
            waiting = sorted(waiting, key=lambda stream: stream.since)[:count]
        return waiting

    def _deliver(
        self, streams: list[Stream], since: list[float], started: float, result: np.ndarray | Exception
    ) -> None:
        self._free_slots += 1
        if isinstance(result, Exception):  # the states were donated, so no stream can go on
            return self.fail(result)
        for stream, value in zip(streams, result, strict=False):
            stream.give(value)
        self.wake()
        now = time.monotonic()
        delays = [now - begin for begin in since]
        self._on_step(Step(self.name, len(result), len(streams), now - started, delays))
