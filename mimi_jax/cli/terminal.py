"""What the commands print, and how libraries are kept quiet."""

import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from mimi_jax.cli.pipes import PIPE

if TYPE_CHECKING:
    import numpy as np

    from mimi_jax.files.codes import CodeSpec


def print_table(rows: dict[str, str]) -> None:
    width = max(map(len, rows)) + 2
    for name, value in rows.items():
        print(f"{name:<{width}}{value}")


def code_rows(spec: "CodeSpec", num_samples: int) -> dict[str, str]:
    """Return the rows of a table that describe the codes of a clip."""
    return {
        "duration": f"{num_samples / spec.sampling_rate:.2f} s, {num_samples} samples",
        "frames": f"{spec.num_frames(num_samples)}, {spec.frame_rate:g} Hz",
        "codebooks": f"{spec.num_codebooks} x {spec.codebook_size} codes",
        "bitrate": f"{spec.kbits:.2f} kbit/s",
    }


def summary(spec: "CodeSpec", num_samples: int) -> str:
    frames = spec.num_frames(num_samples)
    return f"{frames} frames x {spec.num_codebooks} codebooks, {spec.kbits:.2f} kbit/s"


def speed(spec: "CodeSpec", num_samples: int, seconds: float) -> str:
    return f"{num_samples / spec.sampling_rate / seconds:.3g} x realtime"


def report(output: Path, spec: "CodeSpec", num_samples: int, seconds: float) -> None:
    """Say what was written to a file; a pipe carries the output itself, so nothing is said there."""
    if output != PIPE:
        text = f"{summary(spec, num_samples)}; {speed(spec, num_samples, seconds)}"
        print(f"wrote {output}: {text} (start-up included)")


@contextlib.contextmanager
def progress(title: str, num_samples: int | None, sampling_rate: int) -> Iterator[Callable[[int], object]]:
    """Show a bar in seconds of audio, on a terminal only, if the work takes more than a second.

    Args:
        title: what the command is doing.
        num_samples: length of the audio; None if it is not known.
        sampling_rate: Hz.

    Yields:
        A function that takes the number of samples done since the last call.
    """
    from tqdm import tqdm

    layout, total = "{desc}: {n:.0f} s [{elapsed}]", None
    if num_samples is not None:
        layout = "{l_bar}{bar}| {n:.0f} of {total:.0f} s [{elapsed}<{remaining}]"
        total = num_samples / sampling_rate
    with tqdm(desc=title, total=total, delay=1, leave=False, disable=None, bar_format=layout) as bar:
        yield lambda count: bar.update(count / sampling_rate)


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Keep the warnings of libraries off stderr, such as one about a cache that cannot be written."""
    disabled = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


@contextlib.contextmanager
def no_stderr() -> Iterator[None]:
    """Keep C libraries off stderr: the MP3 decoder prints comments on damaged files there."""
    sys.stderr.flush()
    stderr = os.dup(2)
    try:
        with open(os.devnull, "wb") as null:
            os.dup2(null.fileno(), 2)
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)


def without_stderr(pieces: "Iterable[np.ndarray]") -> "Iterator[np.ndarray]":
    """Yield from `pieces`, and drop what C libraries write to stderr while they make each piece."""
    iterator = iter(pieces)
    while True:
        with no_stderr():
            piece = next(iterator, None)
        if piece is None:
            return
        yield piece
