"""Whole processes: how long each takes, and the peak of its memory. Linux and macOS."""

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

MAXRSS_BYTES = 1 if sys.platform == "darwin" else 1024  # the unit of `ru_maxrss`


class Usage(NamedTuple):
    """What one process took."""

    seconds: float
    peak: float  # MB of resident memory. On Linux it includes what the parent process had resident.


def run_python(words: list[str], cache: str | Path) -> Usage:
    """Run `python` with these arguments in a new process.

    Args:
        cache: the folder where JAX keeps its compiled programs.

    Raises:
        subprocess.CalledProcessError: the process failed.
    """
    environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(cache)}
    command = [sys.executable, *words]
    start = time.perf_counter()
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return Usage(seconds, usage.ru_maxrss * MAXRSS_BYTES / 1e6)
