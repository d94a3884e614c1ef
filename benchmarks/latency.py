"""How long one streaming step takes: 80 ms of audio to codes, and back, beside Kyutai's own `moshi`.

    python -m benchmarks.latency [--batch 1 4 16 64] [--steps 100] [--no-moshi]

Full size, float32, 8 codebooks, the same random weights in both. A step is timed from an array on the host
to an array on the host. The two take turns in one process, so that a noisy machine is noisy for both. Each
step of either attends to a whole window of 10 s, however young the stream. moshi needs what `make parity`
installs, and is measured on a CPU only. It all takes about six minutes, and 4 GiB of memory.

Only an idle machine gives a fair ratio: torch's threads wait for each other in every operation, and one busy
process beside two of them makes moshi ten times as slow, mimi_jax twice. The load average of the minute
before is printed, and should be near 0.
"""

import argparse
import contextlib
import importlib.metadata
import itertools
import os
import platform
import re
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from tqdm import tqdm

import mimi_jax
from mimi_jax.checkpoint import save

SAMPLE = Path(mimi_jax.__file__).parent / "samples" / "speech.flac"
CODEBOOKS = 8
WARMUP = 3  # steps, the first of which compile
TURN = 5  # steps of one system before it is the other's turn
SECONDS = 20.0  # that the steps of one system may take, for each batch and direction

Step = Callable[[np.ndarray], object]


def load_moshi(model: mimi_jax.Mimi) -> Any:
    """Kyutai's model with the same weights, by their own loader; None where it is not installed."""
    try:
        from moshi.models.loaders import get_mimi
    except ImportError as error:
        print(f"without moshi, which `make parity` installs: {error}", file=sys.stderr)
        return None
    with tempfile.TemporaryDirectory() as folder:
        save(model, folder, "kyutai")
        return get_mimi(Path(folder) / "model.safetensors", num_codebooks=CODEBOOKS)


def make_step(model: mimi_jax.Mimi, direction: str, batch: int) -> Step:
    if direction == "encode":
        return mimi_jax.StreamingEncoder(model, batch, CODEBOOKS).push
    return mimi_jax.StreamingDecoder(model, batch).push


def make_moshi_step(moshi: Any, direction: str) -> Step:
    import torch

    @torch.no_grad()
    def step(frame: np.ndarray) -> np.ndarray:
        return getattr(moshi, direction)(torch.from_numpy(frame)).numpy()

    return step


def make_frames(config: mimi_jax.MimiConfig, direction: str, batch: int) -> np.ndarray:
    """One frame after the other of speech, float32 [frames, batch, 1, samples], or of random codes,
    int64 [frames, batch, codebooks, 1]. Each row is one frame ahead of the row before it."""
    audio = mimi_jax.load_audio(SAMPLE)[0]
    frames = audio[: audio.size // config.frame_size * config.frame_size].reshape(-1, 1, config.frame_size)
    if direction == "decode":
        codes = np.random.default_rng(0).integers(config.codebook_size, size=(len(frames), CODEBOOKS))
        frames = codes[:, :, None]
    return np.stack([np.roll(frames, -row, axis=0) for row in range(batch)], axis=1)


def measure(steps: dict[str, Step], frames: np.ndarray, num_steps: int) -> dict[str, np.ndarray]:
    """Milliseconds of each step: `num_steps` of each system, or fewer where `SECONDS` are over."""
    times = {name: [] for name in steps}
    inputs = {name: itertools.cycle(frames) for name in steps}

    def take(name: str, count: int) -> list[float]:
        clock = [time.perf_counter()]
        for frame in itertools.islice(inputs[name], count):
            steps[name](frame)
            clock.append(time.perf_counter())
        return list(1000 * np.diff(clock))

    for name in steps:
        take(name, WARMUP)
    end = time.perf_counter() + SECONDS * len(steps)
    with tqdm(total=num_steps, leave=False, disable=None, unit="step") as progress:
        for start in range(0, num_steps, TURN):
            turn = min(TURN, num_steps - start)
            for name in steps:
                times[name] += take(name, 1 + turn)[1:]  # the first finds the other's data in the caches
            progress.update(turn)
            if time.perf_counter() > end:
                break
    return {name: np.array(values) for name, values in times.items()}


def heading(moshi: Any, load: float) -> str:
    """The machine and its load average, the versions, and how it was measured."""
    cpuinfo = Path("/proc/cpuinfo")
    name = re.search(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else None
    machine = f"{name[1] if name else platform.machine()}, {os.cpu_count()} threads, load {load:.1f}"
    systems = [f"{package} {importlib.metadata.version(package)}" for package in ("mimi_jax", "jax")]
    systems[-1] += f" on {jax.devices()[0].device_kind}"
    how = f"{WARMUP} steps to warm up"
    if moshi is not None:
        import torch

        systems.append(f"moshi {importlib.metadata.version('moshi')}")
        systems.append(f"torch {torch.__version__} on {torch.get_num_threads()} threads")
        how += f", then turns of {TURN} steps, after one that is not counted"
    return (
        f"{machine}; {', '.join(systems)}; full size, float32, {CODEBOOKS} codebooks, one frame of 80 ms a"
        f" step, host to host; {how}; in ms"
    )


def table_row(batch: int, direction: str, times: dict[str, np.ndarray]) -> str:
    cells = [str(batch), direction, str(len(times["mimi_jax"]))]
    for values in times.values():
        cells += [f"{np.median(values):.1f}", f"{np.percentile(values, 99):.1f}"]
    if "moshi" in times:
        cells.append(f"{np.median(times['mimi_jax']) / np.median(times['moshi']):.2f}")
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--steps", type=int, default=100, help="of each system, for each batch and direction")
    parser.add_argument("--no-moshi", action="store_true")
    arguments = parser.parse_args()
    load = os.getloadavg()[0]  # before this process adds to it
    model = mimi_jax.Mimi(mimi_jax.MimiConfig(), rngs=nnx.Rngs(0))
    moshi = None if arguments.no_moshi or jax.default_backend() != "cpu" else load_moshi(model)
    columns = ["batch", "step", "steps", "mimi_jax median", "mimi_jax p99"]
    if moshi is not None:
        columns += ["moshi median", "moshi p99", "ratio of medians"]
    print(f"{heading(moshi, load)}\n\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}", flush=True)
    for batch, direction in itertools.product(arguments.batch, ("encode", "decode")):
        steps = {"mimi_jax": make_step(model, direction, batch)}
        with contextlib.ExitStack() as stack:
            if moshi is not None:
                stack.enter_context(moshi.streaming(batch))
                steps["moshi"] = make_moshi_step(moshi, direction)
            times = measure(steps, make_frames(model.config, direction, batch), arguments.steps)
        print(table_row(batch, direction, times), flush=True)


if __name__ == "__main__":
    main()
