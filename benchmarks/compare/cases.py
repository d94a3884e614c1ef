"""The cases that are measured within one process: clips, streaming steps, and products of matrices."""

import contextlib
import itertools
import math
import re
import sys

import numpy as np

from benchmarks.compare.gemm import gemm_speed, make_gemm, make_torch_gemm
from benchmarks.compare.results import Result
from benchmarks.compare.systems import KINDS, REFERENCE, Step, System
from benchmarks.flops import count_flops
from benchmarks.inputs import CODEBOOKS, make_clips, make_frames
from benchmarks.timing import STEPS_IN_TURN, WARMUP, Budget, Run, take_turns, timed, warm_up
from mimi_jax import MimiConfig

CASE = re.compile(r"start|memory|gemm|(encode|decode)-(step-\d+|\d+x\d+)")
CLIPS = {"cpu": ("1x10", "8x10", "1x60"), "gpu": ("1x10", "8x10", "1x60", "64x30")}
STREAMS = (1, 8)
DIRECTIONS = ("encode", "decode")
SHORT = 10  # seconds of audio. So short a run is slower while it finds what another system left behind.


def default_cases(device: str) -> list[str]:
    clips = [f"{direction}-{clip}" for clip in CLIPS[device] for direction in DIRECTIONS]
    steps = [f"{direction}-step-{batch}" for batch in STREAMS for direction in DIRECTIONS]
    return ["start", "memory", "gemm", *clips, *steps]


def measure_clips(
    case: str, config: MimiConfig, systems: dict[str, System], device: str, budget: Budget
) -> dict[str, Result]:
    """Milliseconds of a case such as `encode-8x10`, with the ceiling measured between its runs."""
    direction, clips = case.split("-")
    batch, seconds = map(int, clips.split("x"))
    array = make_clips(config, direction, batch, seconds)
    if device == "gpu" and (torch := sys.modules.get("torch")):
        torch.cuda.empty_cache()  # of the case before
    runs: dict[str, Run] = {}
    for name, system in systems.items():
        if system.clip is None:
            continue
        runs[name] = system.clip(direction, array)
        package, kind = name.split("-")[0], name.split("-")[-1]
        if package == "mimi_jax":  # right after it, when no thread of another library spins
            runs[f"gemm-{kind}"] = make_gemm(kind, device)
    outputs = warm_up(case, runs, WARMUP if device == "gpu" else 1)
    equal = {}
    if direction == "encode" and REFERENCE in outputs:
        equal = {
            name: float(np.mean(outputs[name] == outputs[REFERENCE])) for name in systems if name in runs
        }
    measures = {name: timed(run) for name, run in runs.items()}
    values = take_turns(case, measures, budget, uncounted=int(batch * seconds <= SHORT))
    flops = batch * count_flops(config, seconds, CODEBOOKS)[direction]
    gemms = [name for name in values if name.startswith("gemm")]
    ceilings = {name.replace("gemm", "mimi_jax"): gemm_speed(values.pop(name), device) for name in gemms}
    return {
        name: Result("ms", times, batch * seconds, flops, equal.get(name), ceilings.get(name))
        for name, times in values.items()
    }


def measure_steps(
    case: str, config: MimiConfig, systems: dict[str, System], num_steps: int, budget: Budget
) -> dict[str, Result]:
    """Milliseconds of the steps of a case such as `encode-step-8`: one frame of each stream, host to host.

    Each step attends to a whole window of 10 s, however young the streams are, in this package and in moshi.
    """
    direction, _, batch = case.split("-")
    frames = make_frames(config, direction, int(batch))

    def run_of(step: Step) -> Run:
        endless = itertools.cycle(frames)
        return lambda: step(next(endless))

    with contextlib.ExitStack() as stack:
        runs = {
            name: run_of(stack.enter_context(system.stream(direction, int(batch))))
            for name, system in systems.items()
            if system.stream is not None
        }
        warm_up(case, runs, WARMUP)
        values = time_steps(case, runs, num_steps, budget.seconds)
    return {name: Result("ms", values[name]) for name in values}


def time_steps(case: str, runs: dict[str, Run], num_steps: int, seconds: float) -> dict[str, list[float]]:
    """Milliseconds of each step: `num_steps` of each system, or fewer if its `seconds` are over before."""
    turns = Budget(math.ceil(num_steps / STEPS_IN_TURN), seconds)
    measures = {name: timed(run) for name, run in runs.items()}
    return take_turns(case, measures, turns, STEPS_IN_TURN, uncounted=1)


def measure_gemm(systems: dict[str, System], device: str, budget: Budget) -> dict[str, Result]:
    """GFLOP/s of square products, in the kinds of arithmetic of these systems."""
    # Only the kinds that are compared: torch takes minutes for bfloat16 on a CPU without such instructions.
    kinds = [kind for kind in KINDS[device] if any(name.endswith(kind) for name in systems)]
    runs = {f"jax-{kind}": make_gemm(kind, device) for kind in kinds}
    if any(name.startswith(("transformers", "moshi")) for name in systems):
        runs |= {f"torch-{kind}": make_torch_gemm(kind, device) for kind in kinds}
    warm_up("gemm", runs, WARMUP)
    measures = {name: timed(run) for name, run in runs.items()}
    values = take_turns("gemm", measures, budget, STEPS_IN_TURN, uncounted=1)
    return {
        name: Result("GFLOP/s", [gemm_speed([time], device) for time in times])
        for name, times in values.items()
    }
