"""The cases `start` and `memory`: whole processes, from the shell to the codes."""

import tempfile
from pathlib import Path

from benchmarks import startup
from benchmarks.compare.results import Result
from benchmarks.compare.systems import BASELINE, REFERENCE, TORCH_DEVICE
from benchmarks.processes import Usage, run_python
from benchmarks.timing import Budget, Run, take_turns, timed, warm_up

MEMORY_CLIPS = 8

# What a user would write. Arguments: a model folder, a WAV file, how many rows of it, torch's device.
PROGRAMS = {
    "mimi_jax": """
import sys
import mimi_jax, numpy as np
folder, clip, rows, device = sys.argv[1:]
model = mimi_jax.Mimi.from_pretrained(folder)
audio = np.repeat(mimi_jax.load_audio(clip)[None], int(rows), axis=0)
np.asarray(mimi_jax.encode(model, audio, num_quantizers=8).audio_codes)
""",
    "transformers": """
import sys
import numpy as np, soundfile, torch, transformers
folder, clip, rows, device = sys.argv[1:]
model = transformers.MimiModel.from_pretrained(folder).to(device)
audio = np.repeat(soundfile.read(clip, dtype="float32")[0][None, None], int(rows), axis=0)
with torch.no_grad():
    model.encode(torch.from_numpy(audio).to(device), num_quantizers=8).audio_codes.cpu().numpy()
""",
}


def run_program(package: str, folder: Path, rows: int, device: str) -> Usage:
    """Run one of `PROGRAMS` on `rows` copies of the clip in `folder`."""
    arguments = [str(folder / "transformers"), str(folder / "clip.wav"), str(rows), TORCH_DEVICE[device]]
    return run_python(["-c", PROGRAMS[package], *arguments], folder / "cache")


def measure_start(folder: Path, names: list[str], device: str, budget: Budget) -> dict[str, Result]:
    """Milliseconds from the shell to the codes, for `mimi-jax encode` and for a script of transformers."""
    model, clip = str(folder / "transformers"), folder / "clip.wav"

    def cold() -> Usage:
        with tempfile.TemporaryDirectory() as cache:
            return startup.run(model, clip, cache)

    runs: dict[str, Run] = {}
    if REFERENCE in names:
        runs[f"{REFERENCE}-cold-cache"] = cold
        runs[f"{REFERENCE}-warm-cache"] = lambda: startup.run(model, clip, str(folder / "cache"))
    if BASELINE in names:
        runs[BASELINE] = lambda: run_program("transformers", folder, 1, device)
    warm_up("start", runs, 1)
    values = take_turns("start", {name: timed(run) for name, run in runs.items()}, budget)
    return {name: Result("ms", values[name]) for name in values}


def measure_memory(folder: Path, names: list[str], device: str, budget: Budget) -> dict[str, Result]:
    """The peak in MB of a process that encodes `MEMORY_CLIPS` clips, with a warm compilation cache."""

    def measure(package: str) -> Run:
        return lambda: run_program(package, folder, MEMORY_CLIPS, device).peak

    packages = {REFERENCE: "mimi_jax", BASELINE: "transformers"}
    runs = {name: measure(package) for name, package in packages.items() if name in names}
    warm_up("memory", runs, 1)
    return {name: Result("MB", values) for name, values in take_turns("memory", runs, budget).items()}
