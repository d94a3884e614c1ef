"""Ctrl-C and the other signals that ask a command to stop."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupt(KeyboardInterrupt):
    """A signal asked the command to stop."""

    def __init__(self, number: int, reason: str = "interrupted"):
        super().__init__(reason)
        self.number = number
        self.status = 128 + number


def interrupt(number: int, _) -> None:
    raise Interrupt(number)


@contextlib.contextmanager
def handle_signals(handler: Callable[[int, object], None]) -> Iterator[None]:
    """Call `handler` on a signal that asks to stop.

    A signal that is ignored stays ignored: a shell starts background jobs so.
    """
    if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
        yield
        return
    previous = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    for number, old in previous.items():
        if old not in (signal.SIG_IGN, None):
            signal.signal(number, handler)
    try:
        yield
    finally:
        for number, old in previous.items():
            if old is not None:
                signal.signal(number, old)
