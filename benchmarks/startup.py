"""How long `mimi-jax encode` takes from the shell, with an empty compilation cache and with a warm one.

    python -m benchmarks.startup [MODEL] [CLIP] [--markdown FILE]

Whole processes, from start to end.
"""

import argparse
import statistics
import tempfile
from pathlib import Path

from benchmarks.inputs import SAMPLE
from benchmarks.processes import Usage, run_python
from benchmarks.report import Report, add_markdown_option, device_of_new_processes

RUNS = {"cold": 3, "warm": 5}


def run(model: str, clip: Path, cache: str) -> Usage:
    """What one command takes."""
    with tempfile.TemporaryDirectory() as folder:
        words = ["encode", str(clip), "-o", f"{folder}/codes.safetensors", "--model", model]
        return run_python(["-m", "mimi_jax.cli", *words], cache)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", default="mini")
    parser.add_argument("clip", nargs="?", type=Path, default=SAMPLE)
    add_markdown_option(parser)
    options = parser.parse_args()
    times: dict[str, list[float]] = {"cold": [], "warm": []}
    for _ in range(RUNS["cold"]):
        with tempfile.TemporaryDirectory() as cache:
            times["cold"].append(run(options.model, options.clip, cache).seconds)
    with tempfile.TemporaryDirectory() as cache:
        run(options.model, options.clip, cache)
        times["warm"] = [run(options.model, options.clip, cache).seconds for _ in range(RUNS["warm"])]
    report = Report(device_of_new_processes(), [f"{options.model}, {options.clip.name}"])
    report.table(["cache", "median", "runs"])
    for cache, seconds in times.items():
        report.row([cache, f"{statistics.median(seconds):.1f} s", str(len(seconds))])
    report.save(options.markdown)


if __name__ == "__main__":
    main()
