"""Decoded clips are compared with their originals in worker processes, since some measures take seconds."""

import math
import os
from collections.abc import Sequence
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from typing import NamedTuple

import numpy as np

from mimi_jax.files.corpus import reason_of
from mimi_jax.files.processes import Worker
from mimi_jax.quality.metrics import si_sdr, stoi, visqol


class Scores(NamedTuple):
    """How close one decoded clip is to its original."""

    si_sdr: float  # dB
    stoi: float  # 0 to 1
    visqol: float | None  # 1 to 5; None if it was not asked for


class Scorer:
    """A context with one worker process, which scores one clip after another.

    A process that dies is started again, since a clip may crash a C library or be too long for the memory.

    Args:
        with_visqol: whether to compute ViSQOL, which takes longer than all the rest.
    """

    def __init__(self, with_visqol: bool):
        self._with_visqol, self._worker = with_visqol, Worker(_prepare)

    def submit(self, original: np.ndarray, decoded: Sequence[np.ndarray], sampling_rate: int) -> Future:
        """Begin to score a clip. The clip before must have been waited for.

        Args:
            original: float [channels, samples].
            decoded: what is compared with it, of the same shape.
            sampling_rate: Hz.
        """
        return self._worker.submit(score, original, decoded, sampling_rate, self._with_visqol)

    def wait(self, future: Future) -> list[Scores]:
        """Wait for the scores of each decoded clip.

        Raises:
            ValueError: the clip cannot be scored, with the reason.
            ChildProcessError: the process dies as it starts.
        """
        try:
            return future.result()
        except BrokenProcessPool:
            self._worker.check_started()
            self._restart()
            raise ValueError("the process that compared it with the original has died") from None

    def _restart(self) -> None:
        self._worker.stop()
        self._worker = Worker(_prepare)

    def __enter__(self) -> "Scorer":
        return self

    def __exit__(self, *_: object) -> None:
        self._worker.stop()


def _prepare() -> None:
    os.environ["NUMBA_NUM_THREADS"] = "1"  # ViSQOL would share one clip out among all CPUs


def score(
    original: np.ndarray, decoded: Sequence[np.ndarray], sampling_rate: int, with_visqol: bool
) -> list[Scores]:
    """Score a clip, in this process; see `Scorer`.

    Raises:
        ValueError: the clip cannot be scored, with the reason.
    """
    try:
        scores = [
            Scores(
                si_sdr(original, fake),
                stoi(original, fake, sampling_rate),
                visqol(original, fake, sampling_rate) if with_visqol else None,
            )
            for fake in decoded
        ]
    except Exception as error:  # of libraries; one clip must not cost the scores of all others
        raise ValueError(reason_of(error)) from error
    for name in Scores._fields:
        if any(getattr(row, name) is not None and math.isnan(getattr(row, name)) for row in scores):
            raise ValueError(f"{name} is NaN; the model may decode it to silence")
    return scores
