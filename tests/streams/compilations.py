"""Count what XLA compiles."""

import contextlib
from collections.abc import Iterator

import jax.monitoring


@contextlib.contextmanager
def count_compilations() -> Iterator[list[str]]:
    """A list that gets an entry for each program that XLA compiles, or loads from its cache."""
    compiled: list[str] = []

    def listen(event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield compiled
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
