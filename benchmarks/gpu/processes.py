"""One process with a time limit, whose output is shown, kept and written to a file."""

import contextlib
import os
import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import IO, NamedTuple

LARGEST_LOG = 16 * 2**20  # characters; after them, a log stops


class Outcome(NamedTuple):
    """How a process ended."""

    text: str  # "ok", or what went wrong
    seconds: float
    lines: list[str]  # that it printed


def run(command: list[str], seconds: float, log: Path, environment: dict[str, str]) -> Outcome:
    """Run a process, and end it with all processes that it started.

    Args:
        seconds: it is killed after this time.
        log: the file that gets what it prints.
        environment: variables that it gets besides those of this process.
    """
    start, lines = time.perf_counter(), []
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env={**os.environ, **environment},
        start_new_session=True,  # a process group, so that its own processes end with it
    )
    reader = threading.Thread(target=_show, args=(process.stdout, lines, log), daemon=True)
    reader.start()
    try:
        status = process.wait(seconds)
        text = "ok" if status == 0 else f"failed, exit status {status}"
    except subprocess.TimeoutExpired:
        text = f"stopped at its limit of {seconds:.0f} s"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    reader.join(5)  # a process that left the group may keep the pipe open, and the thread waits for it
    return Outcome(text, time.perf_counter() - start, lines)


def _show(output: IO[str], lines: list[str], log: Path) -> None:
    written = 0
    with output, log.open("w") as file:
        for line in output:
            print(line, end="", flush=True)
            lines.append(line.rstrip("\n"))
            written += len(line)
            if written < LARGEST_LOG:
                file.write(line)
                file.flush()
