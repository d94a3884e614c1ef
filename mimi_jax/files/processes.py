"""Worker processes: each runs one function after another, without JAX, its threads and its memory."""

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

MAX_WORKERS = 16  # by default; one core reads thousands of seconds of audio per second


def default_num_workers() -> int:
    """One less than the CPUs that this process may use, from 1 to MAX_WORKERS."""
    num_cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(max(num_cpus - 1, 1), MAX_WORKERS)


class Worker:
    """A process that ends when its parent does, and writes nothing to stderr.

    Args:
        prepare: is called first in the process, with `arguments`.
    """

    def __init__(self, prepare: Callable[..., None], *arguments: Any):
        context = multiprocessing.get_context("spawn")  # a fork of a process with JAX's threads may hang
        self._pool = ProcessPoolExecutor(1, context, initializer=_start, initargs=(prepare, *arguments))
        self._pid = self._pool.submit(os.getpid)  # and a sign that it has started

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Future:
        """Call a function in the process. The result raises BrokenProcessPool if the process dies."""
        try:
            return self._pool.submit(function, *arguments)
        except BrokenProcessPool as error:  # the process died a moment ago
            future = Future()
            future.set_exception(error)
            return future

    def check_started(self) -> None:
        """To be called when the process has died.

        Raises:
            ChildProcessError: it died as it started.
        """
        if self._pid.exception() is not None:
            raise ChildProcessError(
                "the worker processes die as they start; they import the script that started them,"
                ' so it must be a file and do its work under if __name__ == "__main__":'
            )

    def stop(self) -> None:
        """Kill the process: it may be stuck in a file, and Python would wait for it when it exits."""
        if self._pid.done() and self._pid.exception() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._pid.result(), signal.SIGKILL)
        self._pool.shutdown(wait=False, cancel_futures=True)


def _start(prepare: Callable[..., None], *arguments: Any) -> None:
    """Set up a new worker process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # C libraries write to stderr about damaged files
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
    prepare(*arguments)
