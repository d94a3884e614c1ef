"""How many seconds of audio one second of training takes in.

    python -m benchmarks.training [configs/mini.toml] [--steps 20] [--device gpu]
        [--precisions highest default bfloat16] [--markdown FILE]

Measures steps alone, on batches of noise that are already in memory; the first two are not counted. A recipe
with `steps_at_once` does so many at once. On Linux CPUs, try it with `GLIBC_TUNABLES=glibc.malloc.hugetlb=1`.
"""

import argparse
import dataclasses
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from benchmarks.report import Report, add_markdown_option
from mimi_jax.train import Recipe, Trainer, start_model
from mimi_jax.train.recipe import CHOICES

WARMUP = 2  # steps; the first one compiles


def time_steps(recipe: Recipe, steps: int, device: Any) -> list[float]:
    """Seconds of each step, those of the warm-up first."""
    # On a GPU, each of the many small programs of this would be compiled.
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        model = start_model(recipe)
        recipe = dataclasses.replace(recipe, model=model.config)
        trainer, at_once = Trainer(recipe, model), recipe.steps_at_once
        state = trainer.init()
    trainer.model, state = jax.device_put((trainer.model, state), device)
    shape = recipe.data.batch_size, trainer.model.config.audio_channels, recipe.num_samples
    noise = np.random.default_rng(0).normal(0, 0.1, shape).astype(np.float32)
    batch, times = jax.device_put({"audio": noise if at_once == 1 else np.stack([noise] * at_once)}), []
    step, phase = trainer.step if at_once == 1 else trainer.steps, trainer.phase(recipe.steps - 1)
    for _ in tqdm(range(WARMUP + steps), disable=None, leave=False):
        start = time.perf_counter()
        state, logs = step(state, batch, phase=phase)
        jax.block_until_ready((state, logs))
        times.append((time.perf_counter() - start) / at_once)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", nargs="?", type=Path, default=Path("configs/mini.toml"))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--device", choices=["cpu", "gpu", "tpu"], help="the kind of device (default: JAX's)")
    parser.add_argument(
        "--precisions", choices=CHOICES["precision"], nargs="+", help="instead of the recipe's"
    )
    add_markdown_option(parser)
    options = parser.parse_args()
    device = jax.devices(options.device)[0]
    jax.config.update("jax_default_device", device)
    recipe = Recipe.from_toml(options.recipe)
    audio = recipe.data.batch_size * recipe.data.seconds
    size = f"{recipe.data.batch_size} x {recipe.data.seconds:g} s"
    report = Report(device.device_kind, [f"{options.recipe.name}, {options.steps} steps"])
    report.table(["batch", "precision", "ms a step", "seconds of audio a second", "seconds to compile"])
    for precision in options.precisions or [recipe.precision]:
        times = time_steps(dataclasses.replace(recipe, precision=precision), options.steps, device)
        median = statistics.median(times[WARMUP:])
        cells = [f"{1000 * median:.0f}", f"{audio / median:.1f}", f"{times[0] * recipe.steps_at_once:.0f}"]
        report.row([size, precision, *cells])
    report.save(options.markdown)


if __name__ == "__main__":
    main()
