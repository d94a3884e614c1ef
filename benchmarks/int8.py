"""What int8 weights change: the file, the speed, the codes and the audio, for either half and for both.

    python -m benchmarks.int8 FOLDER [--model MODEL] [--num-quantizers N] [--seconds 120] [--repeats 9]
        [--steps 100] [--markdown FILE]

FOLDER holds speech (FLAC or WAV, joined). MODEL is what `Mimi.from_pretrained` takes, such as mini; without
it, the random weights of full size that the parity tests use, which need what `make parity` installs. N, at
least 8, keeps only the first N codebooks.

Speeds are those of a clip of ten seconds and of steps of 80 ms at batch 1, in float32 with 8 codebooks. The
models take turns, and a number is the median. The file that is loaded is in the system's memory already.
Codes of all codebooks are compared with those of the float32 model; the audio is decoded from the float32
codes.
"""

import argparse
import itertools
import statistics
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import numpy as np

import mimi_jax
from benchmarks.agreement import agreement, decibels
from benchmarks.compare.cases import DIRECTIONS, time_steps
from benchmarks.compare.systems import make_step
from benchmarks.inputs import CLIP_SECONDS, CODEBOOKS, load_model, load_speech, make_frames
from benchmarks.report import Report, add_markdown_option
from benchmarks.timing import WARMUP, Budget, Run, take_turns, timed, warm_up
from mimi_jax.checkpoint import keep_codebooks
from mimi_jax.checkpoint.int8 import WEIGHTS, to_int8

COLUMNS = (
    "weights", "file", "of float32", "load", "encode", "decode", "encode step", "decode step",
    "equal codes", "first 8", "semantic", "audio error",
)  # fmt: skip
FLOAT = "float32"
STEP_SECONDS = 20.0  # that the steps of one model may take, in each direction

Models = dict[str, mimi_jax.Mimi]


def medians(label: str, runs: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Milliseconds that each run takes, after one that is not counted."""
    waiting = {name: lambda run=run: jax.block_until_ready(run()) for name, run in runs.items()}
    warm_up(label, waiting, 1)
    measures = {name: timed(run) for name, run in waiting.items()}
    values = take_turns(label, measures, Budget(repeats, float("inf")))
    return {name: statistics.median(times) for name, times in values.items()}


def measure_files(models: Models, repeats: int) -> tuple[dict[str, int], dict[str, float]]:
    """Bytes of each model's weights, and milliseconds to load them."""
    with tempfile.TemporaryDirectory() as folder:
        paths = {name: Path(folder) / name for name in models}
        for name, model in models.items():
            model.save_pretrained(paths[name])
        runs = {name: lambda path=path: mimi_jax.Mimi.from_pretrained(path) for name, path in paths.items()}
        sizes = {name: (path / "model.safetensors").stat().st_size for name, path in paths.items()}
        return sizes, medians("load", runs, repeats)


def measure_speed(models: Models, clip: np.ndarray, repeats: int, steps: int) -> list[dict[str, float]]:
    """Milliseconds of encode, decode, and their streaming steps."""
    codes = mimi_jax.encode(models[FLOAT], clip, num_quantizers=CODEBOOKS).audio_codes
    encode = {
        name: lambda model=model: mimi_jax.encode(model, clip, num_quantizers=CODEBOOKS)
        for name, model in models.items()
    }
    decode = {name: lambda model=model: mimi_jax.decode(model, codes) for name, model in models.items()}
    results = [medians("encode", encode, repeats), medians("decode", decode, repeats)]
    for direction in DIRECTIONS:
        frames = make_frames(models[FLOAT].config, direction, 1)
        runs: dict[str, Run] = {}
        for name, model in models.items():
            step, endless = make_step(model, direction, 1), itertools.cycle(frames)
            runs[name] = lambda step=step, endless=endless: step(next(endless))
        warm_up(f"{direction} step", runs, WARMUP)
        times = time_steps(f"{direction} step", runs, steps, STEP_SECONDS)
        results.append({name: statistics.median(values) for name, values in times.items()})
    return results


def agreement_cells(models: Models, name: str, clips: np.ndarray) -> list[str]:
    """The shares of equal codes and the error of the audio."""
    shares, error = agreement(models[FLOAT], models[name], clips)
    semantic = shares[: models[FLOAT].config.num_semantic_quantizers]
    cells = [f"{part.mean():.2%}" for part in (shares, shares[:8], semantic)]
    return [*cells, f"{error:.1e} ({decibels(error)})" if error else "0"]


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument("--model", metavar="MODEL")
    parser.add_argument("--num-quantizers", type=int, metavar="N")
    parser.add_argument("--seconds", type=int, default=120)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--steps", type=int, default=100)
    add_markdown_option(parser)
    options = parser.parse_args()
    if options.num_quantizers is not None and options.num_quantizers < CODEBOOKS:
        parser.error(f"N must be at least {CODEBOOKS}, with which speeds are measured")
    return options


def main() -> None:
    options = parse_options()
    model = load_model(options.model)
    if options.num_quantizers is not None:
        model = keep_codebooks(model, options.num_quantizers)
    models: Models = {FLOAT: model} | {weights: to_int8(model, weights) for weights in reversed(WEIGHTS)}
    clips = load_speech(options.folder, options.seconds, model.config.sampling_rate)
    agreements = {name: agreement_cells(models, name, clips) for name in models}
    sizes, loads = measure_files(models, options.repeats)
    speeds = measure_speed(models, clips[:1], options.repeats, options.steps)
    title, codebooks = options.model or "random weights", model.config.num_quantizers
    notes = [f"{title}, {codebooks} codebooks, {len(clips) * CLIP_SECONDS} s of speech"]
    report = Report(jax.devices()[0].device_kind, notes)
    report.table(COLUMNS)
    for name, size in sizes.items():
        cells = [name, f"{size / 1e6:.1f} MB", f"{size / sizes[FLOAT]:.1%}", f"{loads[name] / 1000:.2f} s"]
        cells += [f"{1000 * CLIP_SECONDS / times[name]:.1f}x" for times in speeds[:2]]
        cells += [f"{times[name]:.1f} ms" for times in speeds[2:]]
        report.row([*cells, *agreements[name]])
    report.save(options.markdown)


if __name__ == "__main__":
    main()
