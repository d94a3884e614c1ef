"""`main`: run one command and return its exit status.

Results go to stdout. A command that fails prints one line to stderr, leaves no output behind and exits
with status 1 (bad input) or 2 (bad usage). `tokenize` and `train` keep what is done, and `tokenize` exits
with 1 if clips could not be encoded. A status of 128 or more stands for a signal: 130 for Ctrl-C, 141 for a
pipe whose reader has gone away.
"""

import gc
import io
import os
import sys
from pathlib import Path

from mimi_jax.cli.checks import UsageError
from mimi_jax.cli.parser import make_parser
from mimi_jax.cli.pipes import STDOUT
from mimi_jax.cli.signals import Interrupt, handle_signals, interrupt
from mimi_jax.cli.terminal import quiet_libraries

BROKEN_PIPE = 141


def main(argv: list[str] | None = None) -> int:
    """Run a command and return its exit status.

    Args:
        argv: the words after `mimi-jax`; None for those of this process.
    """
    try:
        arguments, unknown = make_parser().parse_known_args(argv)
    except SystemExit as stop:  # argparse has printed its help or an error
        return int(stop.code or 0)
    _set_environment()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files may be no text
    try:
        if unknown:
            options = f"see mimi-jax {arguments.command} --help"
            raise UsageError(f"unrecognized arguments: {' '.join(unknown)}; {options}")
        with handle_signals(interrupt), quiet_libraries():
            arguments.run(arguments)
        sys.stdout.flush()  # a reader that has gone away shows only now
        return 0
    except BrokenPipeError:
        # Python flushes stdout when it exits, and would complain about the broken pipe.
        os.dup2(os.open(os.devnull, os.O_WRONLY), STDOUT)
        return BROKEN_PIPE
    except Interrupt as error:
        status, reason = error.status, str(error)
    except KeyboardInterrupt:
        status, reason = 130, "interrupted"
    except (ImportError, OSError, ValueError) as error:
        status, reason = 2 if isinstance(error, UsageError) else 1, _reason(error)
    print(f"mimi-jax {arguments.command}: error: {reason}", file=sys.stderr)
    return status


def _set_environment() -> None:
    """Make JAX quiet, and let it keep compiled programs for the next run, unless the user set otherwise."""
    # Objects created at start-up live on. Searching them for garbage takes 5 % of the start-up time.
    gc.set_threshold(100_000)
    if "jax" in sys.modules:  # JAX has read its environment already
        return
    caches = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(caches / "mimi_jax" / "xla"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "0")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")


def _reason(error: Exception) -> str:
    """Return what went wrong, in one line."""
    text = str(error) or type(error).__name__
    if isinstance(error, OSError) and error.strerror and error.filename:
        text = f"{error.filename}: {error.strerror}"
    return " ".join(text.splitlines())
