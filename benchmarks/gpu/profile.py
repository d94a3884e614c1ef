"""Where the time of a device goes: a table by groups of device kernels, for each case.

    python -m benchmarks.gpu.profile [CASE ...] [--models FOLDER] [--csv FILE] [--small]

A case has a name such as `encode-32x30-bfloat16` or `decode-step-1-float32`. The times are those of the
device, from JAX's profiler. The bytes are counted from the compiled program (`benchmarks/hlo.py`), the FLOPs
from the configuration (`benchmarks/flops.py`). "Copies" are those between host and device and within the
device, and other layouts of the weights; "passes" are what is between the convolutions. Each speed is also
given as a share of what a copy and a product of matrices reach in the same process.
"""

import argparse
import csv
import statistics
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import mimi_jax
from benchmarks.compare.gemm import SIZE, make_gemm
from benchmarks.compare.systems import load_model_of_kind, make_bare_step, save_models
from benchmarks.flops import count_parts
from benchmarks.gpu.groups import GROUPS, PRODUCTS, RVQ, Program, read_program
from benchmarks.gpu.trace import Launch, trace
from benchmarks.inputs import CODEBOOKS, SMALL, make_clips, make_frames
from benchmarks.report import Report
from mimi_jax import Mimi
from mimi_jax.files.corpus import reason_of

CASES = [
    "encode-32x30-bfloat16",
    "decode-32x30-bfloat16",
    "encode-step-1-bfloat16",
    "decode-step-1-bfloat16",
    "encode-32x30-float32",
    "encode-step-64-bfloat16",
    "encode-step-1-float32",
]
SMALL_CASES = ["encode-2x1-float32", "decode-2x1-bfloat16", "encode-step-1-float32"]
AT_ONCE = 4  # cases that are compiled together, before any of them is measured
RUNS = 5
LARGEST = 8  # device kernels in the second table
COPIED = {"cpu": 10**7, "gpu": 10**9}  # numbers in bfloat16


class Ceilings(NamedTuple):
    """The most that this device does."""

    bytes: float  # a second, read and written
    flops: dict[str, float]  # a second, by kind


class Profile(NamedTuple):
    """What was measured of one case."""

    launches: list[Launch]  # of all runs
    program: Program
    flops: dict[str, int]  # of one run, by the keys of `PRODUCTS`; empty for steps


def measure_ceilings(device: str) -> Ceilings:
    numbers = jnp.ones(COPIED[device], jnp.bfloat16)
    add = jax.jit(lambda x: x + jnp.ones((), x.dtype))
    copied = 2 * numbers.nbytes / fastest(lambda: jax.block_until_ready(add(numbers)))
    product = 2 * SIZE[device] ** 3
    return Ceilings(
        copied, {kind: product / fastest(make_gemm(kind, device)) for kind in ("bfloat16", "float32")}
    )


def fastest(run: Callable[[], Any]) -> float:
    """Seconds of the fastest of some runs."""
    times = []
    run()
    for _ in range(RUNS):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def prepare(case: str, model: Mimi) -> tuple[Callable[[], Any], str, dict[str, int]]:
    """A function that runs a case once, the text of its program, and the FLOPs of its parts."""
    direction, *size, _ = case.split("-")
    if size[0] == "step":
        frames = make_frames(model.config, direction, int(size[1]))
        step, parameters, state = make_bare_step(model, direction, int(size[1]))
        frame = jax.device_put(frames[0].astype(np.float32 if direction == "encode" else np.int32))
        compiled: Any = step.lower(parameters, state, frame).compile()

        def run_step() -> Any:
            nonlocal state
            state, output = compiled(parameters, state, frame)
            return jax.block_until_ready(output)

        return run_step, compiled.as_text(), {}
    batch, seconds = map(int, size[0].split("x"))
    array = make_clips(model.config, direction, batch, seconds)
    x = jax.device_put(array.astype(np.float32 if direction == "encode" else np.int32))
    counts = [CODEBOOKS] if direction == "encode" else []
    compiled: Any = getattr(mimi_jax, direction).lower(model, x, None, *counts).compile()
    parts = count_parts(model.config, seconds, CODEBOOKS)[direction]
    flops = {part: batch * count for part, count in parts.items()}
    return lambda: jax.block_until_ready(compiled(model, x, None)), compiled.as_text(), flops


def measure(run: Callable[[], Any], text: str, flops: dict[str, int]) -> Profile:
    """Measure what `prepare` gives."""
    run()
    run()
    with tempfile.TemporaryDirectory() as folder:
        launches = trace(lambda: [run() for _ in range(RUNS)], Path(folder))
    try:
        program = read_program(text)
    except (IndexError, KeyError, ValueError):  # another version of XLA; the names of kernels still say much
        program = Program({}, {}, {})
    return Profile(launches, program, flops)


def show(case: str, profile: Profile, ceilings: Ceilings, report: Report) -> None:
    """Three tables of one case, for one run: groups, products, and the largest device kernels."""
    program = profile.program
    times, counts = defaultdict[str, float](float), Counter[str]()
    for launch in profile.launches:
        group = program.group_of(launch)
        times[group] += launch.duration / 1000 / RUNS
        counts[group] += 1
    moved = Counter[str]()
    for name, size in program.bytes.items():
        moved[program.groups[name]] += size
    busy, launches = sum(times.values()), len(profile.launches) / RUNS
    report.line(f"\n### {case}: {busy:.3f} ms of the device, {launches:g} launches")
    report.table(["group", "ms", "share", "launches", "GB", "TB/s", "of a copy"])
    for group in GROUPS:
        if not times[group]:
            continue
        speed = moved[group] / (times[group] / 1000)
        cells = [f"{moved[group] / 1e9:.3f}", f"{speed / 1e12:.3f}", f"{speed / ceilings.bytes:.0%}"]
        share = f"{times[group] / max(busy, 1e-9):.0%}"
        first = [group, f"{times[group]:.3f}", share, f"{counts[group] / RUNS:g}"]
        report.row([*first, *(cells if moved[group] else [""] * 3)])
    show_products(case, profile.flops, times, ceilings, report)
    show_largest(profile, report)


def show_products(
    case: str, flops: dict[str, int], times: dict[str, float], ceilings: Ceilings, report: Report
) -> None:
    if flops:
        report.table(["products of", "TFLOP", "in the ms of", "TFLOP/s", "of a product"])
    for part, count in flops.items():
        if seconds := sum(times[group] for group in PRODUCTS[part]) / 1000:
            speed = count / seconds
            ceiling = ceilings.flops["float32" if part == RVQ else case.rpartition("-")[2]]  # in every model
            cells = [f"{count / 1e12:.3f}", " and ".join(PRODUCTS[part]), f"{speed / 1e12:.1f}"]
            report.row([part, *cells, f"{speed / ceiling:.0%}"])


def show_largest(profile: Profile, report: Report) -> None:
    """The device kernels that take most of the time."""
    report.table(["device kernel", "group", "ms", "launches"])
    for (name, group), durations in by_kernel(profile)[:LARGEST]:
        cells = [f"`{name[:60]}`", group, f"{sum(durations) / 1000 / RUNS:.3f}", f"{len(durations) / RUNS:g}"]
        report.row(cells)


def by_kernel(profile: Profile) -> list[tuple[tuple[str, str], list[float]]]:
    """Microseconds of all launches, by the device kernel and its group, the longest first."""
    found: dict[tuple[str, str], list[float]] = defaultdict(list)
    for launch in profile.launches:
        found[launch.name, profile.program.group_of(launch)].append(launch.duration)
    return sorted(found.items(), key=lambda item: -sum(item[1]))


def write_csv(path: Path, profiles: dict[str, Profile]) -> None:
    """Write what each device kernel took in one run."""
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["case", "device kernel", "group", "launches", "microseconds", "median of a launch"])
        for case, profile in profiles.items():
            for (name, group), durations in by_kernel(profile):
                total, median = sum(durations) / RUNS, statistics.median(durations)
                count = len(durations) / RUNS
                rows.writerow([case, name, group, f"{count:g}", f"{total:.2f}", f"{median:.2f}"])


def run_cases(cases: list[str], models: Path, small: bool, csv_file: Path | None) -> Report:
    """Compile a few cases at once, then measure and print one after the other. One that fails is reported."""
    device = "gpu" if jax.default_backend() == "gpu" else "cpu"
    if not models.exists():
        save_models(models, SMALL if small else None)
    ceilings = measure_ceilings(device)
    flops = ", ".join(f"{speed / 1e12:.1f} in {kind}" for kind, speed in ceilings.flops.items())
    note = f"measured here: a copy {ceilings.bytes / 1e12:.2f} TB/s; products, in TFLOP/s: {flops}"
    report, profiles = Report(jax.devices()[0].device_kind, [note]), {}
    kinds = {case: case.rpartition("-")[2] for case in cases}
    loaded = {kind: load_model_of_kind(models, kind) for kind in set(kinds.values())}
    for first in range(0, len(cases), AT_ONCE):
        start, some = time.perf_counter(), cases[first : first + AT_ONCE]
        with ThreadPoolExecutor(AT_ONCE) as pool:
            prepared = {case: pool.submit(prepare, case, loaded[kinds[case]]) for case in some}
        report.line(f"\n{', '.join(some)} were compiled in {time.perf_counter() - start:.0f} s.")
        for case, program in prepared.items():
            try:
                profiles[case] = measure(*program.result())
                show(case, profiles[case], ceilings, report)
            except Exception as error:  # whatever it is, the other cases are worth their time
                report.line(f"\n### {case} failed: {reason_of(error)}")
                continue
            if csv_file:
                write_csv(csv_file, profiles)
    return report


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"by default {' '.join(CASES)}")
    parser.add_argument("--models", type=Path, metavar="FOLDER", help="as for benchmarks.compare")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write all device kernels to this file")
    parser.add_argument("--small", action="store_true", help="a tiny model, to try this on a CPU")
    options = parser.parse_args()
    cases = options.cases or (SMALL_CASES if options.small else CASES)
    with tempfile.TemporaryDirectory() as folder:
        run_cases(cases, options.models or Path(folder, "models"), options.small, options.csv)


if __name__ == "__main__":
    main()
