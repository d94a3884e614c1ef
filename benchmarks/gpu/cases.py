"""The cases of `benchmarks.compare` that matter on a GPU, each with a time limit of its own.

    python -m benchmarks.gpu.cases [--models FOLDER] [--small]

One process measures many cases, since it takes long to start: it loads JAX, torch and all models. A case that
takes too long, or that the process does not survive, is given up, and another process goes on after it. Of
what `benchmarks.compare` prints, the rows are shown.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from benchmarks.compare.results import COLUMNS
from benchmarks.compare.systems import save_models
from benchmarks.inputs import SMALL

START = 60  # seconds until the first case begins
LIMIT = 75  # seconds of a case


class Group(NamedTuple):
    """Cases that one process measures, in these systems."""

    cases: list[str]
    systems: list[str]


OURS = ["mimi_jax-bfloat16", "mimi_jax-float32"]
STEPS = ["mimi_jax-step-bfloat16", "mimi_jax-step-float32"]
EAGER = ["transformers-eager-bfloat16", "transformers-eager-float32", "moshi-float32"]


def both(*sizes: str) -> list[str]:
    return [f"{direction}-{size}" for size in sizes for direction in ("encode", "decode")]


GROUPS = [
    Group(both("32x30"), [*OURS, *EAGER]),
    Group(both("32x30"), ["transformers-compile-bfloat16"]),
    Group(both("step-1", "step-64", "1x10", "step-256"), [*OURS, *STEPS, *EAGER]),
    Group(both("1x10"), ["transformers-compile-bfloat16"]),
]
SMALL_GROUPS = [Group(["encode-2x1", "decode-step-1"], ["mimi_jax-float32", "mimi_jax-step-float32"])]


def measure(group: Group, command: list[str], start: float = START, limit: float = LIMIT) -> None:
    """Print the rows of all cases of a group.

    Args:
        command: that prints rows as `benchmarks.compare` does, given `--only` and the cases.
        start: seconds that a process has more than a case.
        limit: seconds that each case has.
    """
    left = list(group.cases)
    while left:
        done, took, status = run_cases([*command, "--only", *left], left, start, limit)
        left = left[done:]
        if left and status:
            print(f"| {left[0]} | given up after {took:.0f} s, exit status {status} |", flush=True)
            left = left[1:]
        elif left:
            print(f"| {', '.join(left)} | no system gave a result; the log says why |", flush=True)
            return


def run_cases(command: list[str], cases: list[str], start: float, limit: float) -> tuple[int, float, int]:
    """Print the rows of these cases until the process ends, and kill it if one takes too long.

    Returns:
        How many cases were finished, the seconds since the last of them, and the exit status.
    """
    done, begun, rest = 0, time.perf_counter(), ""
    # A file, since processes that torch starts may keep a pipe open.
    with (
        tempfile.NamedTemporaryFile("w+") as file,
        open(file.name) as output,
        subprocess.Popen(command, stdout=file) as process,
    ):
        while True:
            has_ended = process.poll() is not None
            *lines, rest = (rest + output.read()).split("\n")
            for line in lines:
                case = line.split("|")[1].strip() if line.count("|") > 1 else ""
                if case in cases:
                    print(line, flush=True)
                if case in cases[done:]:
                    done, begun = cases.index(case) + 1, time.perf_counter()
            if has_ended:
                return done, time.perf_counter() - begun, process.returncode
            if time.perf_counter() - begun > limit + (0 if done else start):
                process.kill()
            time.sleep(0.1)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", type=Path, metavar="FOLDER", help="as for benchmarks.compare")
    parser.add_argument("--small", action="store_true", help="a tiny model, to try this on a CPU")
    options = parser.parse_args()
    device = "cpu" if options.small else "gpu"
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        models = options.models or Path(folder, "models")
        if options.small and not models.exists():
            save_models(models, SMALL)
        for group in SMALL_GROUPS if options.small else GROUPS:
            command = [sys.executable, "-u", "-m", "benchmarks.compare", "--device", device]
            command += ["--models", str(models), "--seconds", "2", "--systems", *group.systems]
            measure(group, command)


if __name__ == "__main__":
    main()
