"""How many seconds of audio one second of training takes in.

    python -m benchmarks.training [configs/mini.toml] [--steps 20] [--markdown FILE]

Measures steps alone, on batches of noise that are already in memory; the first two are not counted. On Linux
CPUs, try it with `GLIBC_TUNABLES=glibc.malloc.hugetlb=1`.
"""

import argparse
import statistics
import time
from pathlib import Path

import jax
import numpy as np
from tqdm import tqdm

from benchmarks.report import Report, add_markdown_option
from mimi_jax.train import Recipe, Trainer, start_model

WARMUP = 2  # steps; the first one compiles


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", nargs="?", type=Path, default=Path("configs/mini.toml"))
    parser.add_argument("--steps", type=int, default=20)
    add_markdown_option(parser)
    options = parser.parse_args()
    recipe = Recipe.from_toml(options.recipe)
    trainer = Trainer(recipe, start_model(recipe))
    state = trainer.init()
    shape = recipe.data.batch_size, trainer.model.config.audio_channels, recipe.num_samples
    noise = np.random.default_rng(0).normal(0, 0.1, shape).astype(np.float32)
    batch, times = jax.device_put({"audio": noise}), []
    for _ in tqdm(range(WARMUP + options.steps), disable=None, leave=False):
        start = time.perf_counter()
        state, logs = trainer.step(state, batch, adversarial=recipe.adversarial)
        jax.block_until_ready((state, logs))
        times.append(time.perf_counter() - start)
    median = statistics.median(times[WARMUP:])
    audio = recipe.data.batch_size * recipe.data.seconds
    size = f"{recipe.data.batch_size} x {recipe.data.seconds:g} s"
    report = Report(jax.devices()[0].device_kind, [f"{options.recipe.name}, {options.steps} steps"])
    report.table(["batch", "ms a step", "seconds of audio a second", "seconds to compile"])
    report.row([size, f"{1000 * median:.0f}", f"{audio / median:.1f}", f"{times[0]:.0f}"])
    report.save(options.markdown)


if __name__ == "__main__":
    main()
