"""How long it takes to read ten seconds of audio from a file, by format: medians in ms.

    python -m benchmarks.reading [CHECKOUT]

With another checkout, both are measured in turns, and the last column is their ratio.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from mimi_jax.files.audio import FORMATS, load_audio, save_audio

RATE, SECONDS = 24_000, 10
ROUNDS, REPEATS = 8, 100  # processes, and files read in each
ROOT = Path(__file__).parents[1]
MEASURE = """
import json, statistics, sys, time
from mimi_jax.files.audio import load_audio

medians = {}
for path in sys.argv[1:]:
    times = []
    for _ in range(int(%d)):
        start = time.perf_counter()
        load_audio(path)
        times.append(1000 * (time.perf_counter() - start))
    medians[path.rsplit(".", 1)[1]] = statistics.median(times)
print(json.dumps(medians))
"""


def measure(checkout: Path, paths: list[str]) -> dict[str, float]:
    """Medians in ms, of a new process that imports the package of a checkout."""
    command = [sys.executable, "-c", MEASURE % REPEATS, *paths]
    environment = {**os.environ, "PYTHONPATH": str(checkout)}
    result = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True, cwd="/")
    return json.loads(result.stdout)


def main() -> None:
    checkouts = [ROOT, *[Path(name).resolve() for name in sys.argv[1:]]]
    speech = load_audio(ROOT / "mimi_jax/samples/speech.flac", RATE)[0]
    with tempfile.TemporaryDirectory() as folder:
        paths = [os.path.join(folder, f"clip{suffix}") for suffix in FORMATS]
        for path in paths:
            save_audio(path, np.resize(speech, RATE * SECONDS), RATE)
        rounds = [[measure(checkout, paths) for checkout in checkouts] for _ in range(ROUNDS)]
    for name in rounds[0][0]:
        times = [statistics.median(one[n][name] for one in rounds) for n in range(len(checkouts))]
        ratio = f"{times[0] / times[1]:8.3f}" if len(times) > 1 else ""
        print(f"{name:6}" + "".join(f"{time:8.2f}" for time in times) + ratio)


if __name__ == "__main__":
    main()
