"""Standard input and output as pipes of audio or codes."""

import contextlib
import math
import os
import select
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from mimi_jax.cli.signals import Interrupt, handle_signals

if TYPE_CHECKING:
    import numpy as np

    # Codes [codebooks, frames], and the number of samples that they stand for.
    Pieces = Iterator[tuple["np.ndarray", int]]

PIPE = Path("-")
STDIN, STDOUT = 0, 1
# After a signal, seconds for which input is still read. Every process of a pipeline gets the same Ctrl-C. An
# encoder must have the time to end its stream before the decoder behind it stops reading.
AUDIO_GRACE, CODES_GRACE = 0.5, 3.0
PCM_FORMATS = ("s16le", "f32le")  # the names in mimi_jax.streams.wire.PCM_FORMATS, which is slow to import


class Stdin:
    """Live input that ends at the first signal that asks to stop.

    After the signal, input is read for `grace` more seconds, since the process before this one in the
    pipeline may have got the same signal and may still be writing. All that was read is then processed
    and written as usual. A second signal stops the command at once.
    """

    def __init__(self, grace: float):
        self.interrupt: Interrupt | None = None
        self._grace, self._end = grace, math.inf

    def read(self, size: int) -> bytes:
        """Return the bytes that have arrived, at most `size`; b"" at the end."""
        while True:
            if self.interrupt is not None:  # the grace starts at the first read after the signal
                self._end = min(self._end, time.monotonic() + self._grace)
            if time.monotonic() > self._end:
                return b""
            if select.select([STDIN], [], [], 0.1)[0]:
                return os.read(STDIN, size)

    def stop(self, number: int, _) -> None:
        if self.interrupt is not None:
            raise Interrupt(number)
        self.interrupt = Interrupt(number, "interrupted; all input before the signal was processed")

    def until_stopped(self, codes: "Pieces") -> "Pieces":
        """Yield from `codes`, and let a stream that a signal has ended stop anywhere."""
        try:
            yield from codes
        except ValueError:
            if self.interrupt is None:
                raise


@contextlib.contextmanager
def open_stdin(grace: float) -> Iterator[Stdin]:
    """Yield live input, and raise the `Interrupt` that ended it, if one did, once all is processed.

    Args:
        grace: seconds for which input is still read after a signal.
    """
    stdin = Stdin(grace)
    try:
        with handle_signals(stdin.stop):
            yield stdin
    except ValueError:
        if stdin.interrupt is None:
            raise
        raise Interrupt(stdin.interrupt.number) from None  # the signal came before any complete input
    if stdin.interrupt is not None:
        raise stdin.interrupt


def write_stdout(data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        with contextlib.suppress(BlockingIOError):  # a parent may hand down a pipe in non-blocking mode
            select.select([], [STDOUT], [])
            rest = rest[os.write(STDOUT, rest) :]
