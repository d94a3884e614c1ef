"""What was measured, and the rows of the table that show it."""

import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks.compare.systems import BASELINE, STEP_BASELINE
from benchmarks.report import LOAD, command, machine, versions

COLUMNS = ("case", "system", "median", "p99", "runs", "ratio", "x realtime", "of the ceiling", "equal codes")


class Result(NamedTuple):
    """What was measured of one system in one case."""

    unit: str
    values: list[float]
    audio_seconds: float | None = None  # in all clips of the batch
    flops: int | None = None  # of the matrix products that these clips need
    equal_codes: float | None = None  # the share of codes that equal those of `REFERENCE`
    ceiling: float | None = None  # GFLOP/s of `gemm` in the same turns

    @property
    def median(self) -> float:
        return statistics.median(self.values)


def is_step(case: str) -> bool:
    return "-step-" in case


def table_rows(case: str, results: dict[str, Result]) -> Iterator[list[str]]:
    """A row for each system, with the columns `COLUMNS`; what does not apply stays empty."""
    baseline = results.get(STEP_BASELINE if is_step(case) else BASELINE)
    for name, result in results.items():
        p99 = number(np.percentile(result.values, 99), result.unit) if is_step(case) else ""
        median, count = number(result.median, result.unit), str(len(result.values))
        cells = [case, name, median, p99, count, *[""] * 4]
        if baseline:
            cells[5] = f"{baseline.median / result.median:.2f}x"
        if result.audio_seconds:
            cells[6] = f"{1000 * result.audio_seconds / result.median:,.1f}"
        if result.flops and result.ceiling:
            cells[7] = f"{result.flops / 1e6 / result.median / result.ceiling:.0%}"
        if result.equal_codes is not None:
            cells[8] = f"{result.equal_codes:.2%}"
        yield cells


def number(value: float, unit: str) -> str:
    return f"{value:,.1f} {unit}" if value >= 10 else f"{value:.3f} {unit}"


def write_json(path: str, results: dict[str, dict[str, Result]]) -> None:
    """Write all numbers, with what the header of the report says."""
    cases = {
        case: {name: {"median": result.median, **result._asdict()} for name, result in by_system.items()}
        for case, by_system in results.items()
    }
    header = {"command": command(), "machine": machine(), "load": LOAD, "versions": versions()}
    Path(path).write_text(json.dumps({**header, "results": cases}, indent=2) + "\n")
