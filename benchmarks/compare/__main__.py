"""Compare mimi_jax with other implementations of Mimi: speed, start-up and memory, same audio and weights.

    python -m benchmarks.compare [--device gpu] [--only CASE ...] [--systems SYSTEM ...]
        [--models FOLDER] [--markdown FILE] [--json FILE]

Full size, random weights, 8 codebooks in every system. A system that is not installed is left out
(`make parity` installs transformers and moshi, `pip install rustymimi` the other one). The systems take turns
in one process, so that a noisy machine is noisy for all of them, and a number is the median of the runs.
Cases:

    start                           a whole process that encodes 10 s, from start to end
    memory                          the peak (resident) of a whole process that encodes 8 clips of 10 s
    gemm                            products of square matrices: the most that this machine can do
    encode-8x10, decode-8x10, ...   8 clips of 10 s; on a GPU the input is there already; output to the host
    encode-step-8, ...              a frame of 80 ms of 8 streams, host to host, with the 99th percentile

The numbers in a case's name may be others than those of the default cases, for example `encode-step-64`.
Steps of this package are those of `push`, and the systems `mimi_jax-step-...` are `encode_step` and
`decode_step` alone, compiled with their state donated, host to host too.
"of the ceiling" is the speed of the matrix products that a case needs, counted from the configuration, as
a share of what `gemm` reaches in JAX in the same arithmetic, between the runs of the case.

Only an idle machine gives fair ratios: torch's threads wait for each other in every operation, and one busy
process beside two of them makes moshi ten times as slow, mimi_jax twice. The load average of the minute
before is in the report and should be near 0.
"""

import argparse
import multiprocessing
import os
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from benchmarks.compare import cases
from benchmarks.compare.programs import measure_memory, measure_start
from benchmarks.compare.results import COLUMNS, Result, is_step, table_rows, write_json
from benchmarks.compare.systems import (
    BASELINE,
    STEP_BASELINE,
    SYSTEMS,
    System,
    installed,
    load_system,
    save_models,
)
from benchmarks.inputs import CODEBOOKS
from benchmarks.report import Report, add_markdown_option
from benchmarks.timing import Budget, warn
from mimi_jax import MimiConfig
from mimi_jax.files.corpus import reason_of


def case_name(text: str) -> str:
    if not cases.CASE.fullmatch(text):
        raise argparse.ArgumentTypeError(
            f"a case has a name such as start, encode-8x10 or encode-step-8, got {text!r}"
        )
    return text


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    every = sorted({*SYSTEMS["cpu"], *SYSTEMS["gpu"]})
    parser.add_argument("--device", choices=list(SYSTEMS), default="cpu")
    parser.add_argument("--only", type=case_name, nargs="+", metavar="CASE", help="instead of all cases")
    parser.add_argument(
        "--systems", choices=every, nargs="+", metavar="SYSTEM", help=f"of {', '.join(every)}"
    )
    parser.add_argument("--repeats", type=int, default=7, help="turns of each system in each case")
    parser.add_argument("--steps", type=int, default=100, help="of each system in a case of steps")
    parser.add_argument(
        "--seconds", type=float, default=60.0, help="the most that each system may take in a case"
    )
    parser.add_argument("--json", metavar="FILE", help="also write all numbers to this file")
    parser.add_argument(
        "--models", type=Path, metavar="FOLDER", help="with the weights of all systems; made if there is none"
    )
    add_markdown_option(parser)
    options = parser.parse_args()
    options.systems = options.systems or list(SYSTEMS[options.device])
    if unknown := set(options.systems) - set(SYSTEMS[options.device]):
        parser.error(f"not on {options.device}: {', '.join(sorted(unknown))}")
    return options


def begin_report(systems: dict[str, System], options: argparse.Namespace) -> Report:
    import jax

    notes = [
        f"full size, {CODEBOOKS} codebooks",
        f"medians of at most {options.repeats} turns, or {options.steps} steps",
        f"ratios are to {BASELINE}, those of steps to {STEP_BASELINE}: 2x takes half the time",
    ]
    if any(name.startswith(("transformers", "moshi")) for name in systems):
        import torch

        notes.insert(0, f"torch with {torch.get_num_threads()} threads")
    return Report(jax.devices()[0].device_kind, notes)


def load_systems(names: list[str], folder: Path, device: str) -> dict[str, System]:
    """The systems that can be loaded. The others are reported."""
    systems = {}
    for name in names:
        try:
            systems[name] = load_system(name, folder, device)
        except Exception as error:  # whatever it is, the other systems are worth their time
            warn(f"without {name}: {reason_of(error)}")
    return systems


def check_gpu() -> None:
    """End this process if a fault has broken its GPU: no later case would give a result."""
    import jax

    try:
        jax.block_until_ready(jax.numpy.zeros(1) + 1)
    except jax.errors.JaxRuntimeError as error:
        sys.exit(f"the GPU does not compute any more: {reason_of(error)}")


def measure_all(folder: Path, options: argparse.Namespace) -> None:
    """Measure every case, and print each row as soon as it is measured."""
    names, budget = installed(options.systems), Budget(options.repeats, options.seconds)
    wanted = options.only or cases.default_cases(options.device)
    results: dict[str, dict[str, Result]] = {}
    if not folder.exists():
        # In a new process, for the sake of `start` and `memory`; see `systems`.
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            pool.submit(save_models, folder).result()
    config = MimiConfig.from_json(folder / "transformers" / "config.json")
    for case, measure in (("start", measure_start), ("memory", measure_memory)):
        if case in wanted:
            results[case] = measure(folder, names, options.device, budget)
    systems = load_systems(names, folder, options.device)
    report = begin_report(systems, options)
    report.table(COLUMNS)
    for case in sorted(wanted, key=lambda case: case not in ("start", "memory", "gemm")):
        if case == "gemm":
            results[case] = cases.measure_gemm(systems, options.device, budget)
        elif is_step(case):
            results[case] = cases.measure_steps(case, config, systems, options.steps, budget)
        elif case not in results:
            results[case] = cases.measure_clips(case, config, systems, options.device, budget)
        for row in table_rows(case, results[case]):
            report.row(row)
        if options.device == "gpu":
            check_gpu()
    report.save(options.markdown)
    if options.json:
        write_json(options.json, results)


def main() -> None:
    options = parse_options()
    os.environ["JAX_PLATFORMS"] = "cuda,cpu" if options.device == "gpu" else "cpu"
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # torch needs memory too
    with tempfile.TemporaryDirectory() as folder:
        measure_all(options.models or Path(folder, "models"), options)


if __name__ == "__main__":
    main()
