"""What int8 weights change: the file, the speed, the codes and the audio, for either half and for both.

    python -m benchmarks.int8 FOLDER [--model MODEL] [--num-quantizers N] [--seconds 120] [--repeats 9]
        [--steps 100]

FOLDER holds speech (FLAC or WAV, joined). MODEL is what `Mimi.from_pretrained` takes, such as mini; without
it, the full-size random weights of the parity tests, which need what `make parity` installs. N, at least 8,
keeps only its first N codebooks.

Speeds are of a clip of ten seconds and of steps of 80 ms at batch 1, float32 and 8 codebooks; the models
take turns, and a number is the median. Loading is from a file that the system has in memory. Codes are
compared with those of the float32 model, in all codebooks; the audio is decoded from the float32 codes.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import numpy as np

import mimi_jax
from benchmarks.agreement import CLIP_SECONDS, compare, load_model, load_speech
from benchmarks.latency import CODEBOOKS, make_frames, make_step, measure
from mimi_jax.checkpoint import keep_codebooks
from mimi_jax.checkpoint.int8 import QUANTIZATIONS, quantize

COLUMNS = (
    "weights", "file", "of float32", "load", "encode", "decode", "encode step", "decode step",
    "equal codes", "first 8", "semantic", "audio error",
)  # fmt: skip
FLOAT = "float32"

Models = dict[str, mimi_jax.Mimi]


def alternate(runs: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Seconds that each run takes, the median after one that is not counted."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            jax.block_until_ready(run())
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def measure_files(models: Models, repeats: int) -> tuple[dict[str, int], dict[str, float]]:
    """Bytes of each model's weights, and seconds to load them."""
    with tempfile.TemporaryDirectory() as folder:
        paths = {name: Path(folder) / name for name in models}
        for name, model in models.items():
            model.save_pretrained(paths[name])
        runs = {name: lambda path=path: mimi_jax.Mimi.from_pretrained(path) for name, path in paths.items()}
        sizes = {name: (path / "model.safetensors").stat().st_size for name, path in paths.items()}
        return sizes, alternate(runs, repeats)


def measure_speed(models: Models, clip: np.ndarray, repeats: int, steps: int) -> list[dict[str, float]]:
    """Seconds of encode and decode, milliseconds of their steps."""
    codes = mimi_jax.encode(models[FLOAT], clip, num_quantizers=CODEBOOKS).audio_codes
    encode = {
        name: lambda model=model: mimi_jax.encode(model, clip, num_quantizers=CODEBOOKS)
        for name, model in models.items()
    }
    decode = {name: lambda model=model: mimi_jax.decode(model, codes) for name, model in models.items()}
    results = [alternate(encode, repeats), alternate(decode, repeats)]
    for direction in ("encode", "decode"):
        frames = make_frames(models[FLOAT].config, direction, 1)
        times = measure({name: make_step(m, direction, 1) for name, m in models.items()}, frames, steps)
        results.append({name: float(np.median(values)) for name, values in times.items()})
    return results


def measure_agreement(models: Models, name: str, clips: np.ndarray) -> list[str]:
    """The shares of equal codes, and the error of the audio."""
    results = [compare(models[FLOAT], models[name], clip[None]) for clip in clips]
    shares = np.concatenate([result[0] for result in results], axis=1).mean(axis=1)
    semantic = shares[: models[FLOAT].config.num_semantic_quantizers]
    cells = [f"{part.mean():.2%}" for part in (shares, shares[:8], semantic)]
    error = np.sqrt(sum(result[1] for result in results) / sum(result[2] for result in results))
    return [*cells, f"{error:.1e} ({-20 * np.log10(error):.1f} dB)" if error else "0"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument("--model", metavar="MODEL")
    parser.add_argument("--num-quantizers", type=int, metavar="N")
    parser.add_argument("--seconds", type=int, default=120)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--steps", type=int, default=100)
    options = parser.parse_args()
    if options.num_quantizers is not None and options.num_quantizers < CODEBOOKS:
        parser.error(f"the speeds are of {CODEBOOKS} codebooks, so N must be at least as many")
    model = load_model(options.model)
    if options.num_quantizers is not None:
        model = keep_codebooks(model, options.num_quantizers)
    models: Models = {FLOAT: model} | {name: quantize(model, name) for name in reversed(QUANTIZATIONS)}
    clips = load_speech(options.folder, options.seconds, model.config.sampling_rate)
    agreement = {name: measure_agreement(models, name, clips) for name in models}
    sizes, loads = measure_files(models, options.repeats)
    speeds = measure_speed(models, clips[:1], options.repeats, options.steps)
    name, device = options.model or "random weights", jax.devices()[0].device_kind
    codebooks = f"{model.config.num_quantizers} codebooks"
    print(f"{name}, {codebooks}, {len(clips) * CLIP_SECONDS} s of speech, {device}\n")
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
    for name in models:
        size = sizes[name]
        cells = [name, f"{size / 1e6:.1f} MB", f"{size / sizes[FLOAT]:.1%}", f"{loads[name]:.2f} s"]
        cells += [f"{CLIP_SECONDS / times[name]:.1f}x" for times in speeds[:2]]
        cells += [f"{times[name]:.1f} ms" for times in speeds[2:]]
        print(f"| {' | '.join([*cells, *agreement[name]])} |")


if __name__ == "__main__":
    main()
