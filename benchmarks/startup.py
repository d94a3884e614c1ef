"""How long `mimi-jax encode` takes from the shell: with an empty compilation cache, then with a warm one.

    python -m benchmarks.startup [MODEL] [CLIP]

Whole processes, by the clock; medians of 3 cold and 5 warm runs.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import mimi_jax

SAMPLE = Path(mimi_jax.__file__).parent / "samples" / "speech.flac"


def run(model: str, clip: Path, cache: str) -> float:
    """Seconds that one command takes."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            "-m",
            "mimi_jax.cli",
            "encode",
            str(clip),
            "-o",
            f"{folder}/codes.safetensors",
            "--model",
            model,
        ]
        environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": cache}
        start = time.perf_counter()
        subprocess.run([sys.executable, *command], env=environment, check=True, stdout=subprocess.DEVNULL)
        return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="mini")
    parser.add_argument("clip", nargs="?", type=Path, default=SAMPLE)
    model, clip = vars(parser.parse_args()).values()
    cold = []
    for _ in range(3):
        with tempfile.TemporaryDirectory() as cache:
            cold.append(run(model, clip, cache))
    with tempfile.TemporaryDirectory() as cache:
        warm = [run(model, clip, cache) for _ in range(6)][1:]
    print(f"cold {statistics.median(cold):.1f} s, warm {statistics.median(warm):.1f} s")


if __name__ == "__main__":
    main()
