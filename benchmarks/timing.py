"""Measures systems in turns within one process, so that a noisy machine is noisy for all of them."""

import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from tqdm import tqdm

from mimi_jax.files.corpus import reason_of

Run = Callable[[], Any]

STEPS_IN_TURN = 5  # streaming steps of one system before the next system's turn
WARMUP = 3  # uncounted runs of steps, and on a GPU of clips: torch records CUDA graphs in the second run


class Budget(NamedTuple):
    """How long a case may be measured."""

    turns: int  # of each system
    seconds: float  # for each system, at most


def warn(message: str) -> None:
    tqdm.write(message, file=sys.stderr)


def warm_up(case: str, runs: dict[str, Run], count: int) -> dict[str, Any]:
    """Run each system `count` times and return its first output.

    A system that fails here, for example because memory is short, is reported and removed from `runs`.
    """
    outputs = {}
    for name, run in tqdm(list(runs.items()), desc=f"{case}: warm-up", leave=False, disable=None):
        try:
            outputs[name] = run()
            for _ in range(count - 1):
                run()
        except Exception as error:  # whatever it is, the other systems are worth their time
            warn(f"{case} without {name}: {reason_of(error)}")
            del runs[name]
    return outputs


def timed(run: Run) -> Callable[[], float]:
    """The same run, which returns the milliseconds it took."""

    def measure() -> float:
        start = time.perf_counter()
        run()
        return 1000 * (time.perf_counter() - start)

    return measure


def take_turns(
    case: str,
    measures: dict[str, Callable[[], float]],
    budget: Budget,
    counted: int = 1,
    uncounted: int = 0,
) -> dict[str, list[float]]:
    """Measure the systems in turns, until the turns or the time are used up.

    Args:
        case: the label of the progress bar.
        measures: by system, what runs it once and returns the number to keep.
        counted: how many numbers a system gives in its turn.
        uncounted: how many runs go before them. At the first run the caches still hold the other system's
            data, and the threads of some libraries spin on the cores for a while after their work.

    Returns:
        The numbers of each system.
    """
    values: dict[str, list[float]] = {name: [] for name in measures}
    end = time.perf_counter() + budget.seconds * len(measures)
    for _ in tqdm(range(budget.turns), desc=case, leave=False, disable=None, unit="turn"):
        for name, measure in measures.items():
            values[name] += [measure() for _ in range(uncounted + counted)][uncounted:]
        if time.perf_counter() > end:
            break
    return values
