"""How many seconds of audio a second of training takes in.

    python -m benchmarks.training [configs/mini.toml] [--steps 20]

Steps alone, of batches of noise that are in memory already, the first two not counted. On a CPU with Linux,
try `GLIBC_TUNABLES=glibc.malloc.hugetlb=1`.
"""

import argparse
import statistics
import time
from pathlib import Path

import jax
import numpy as np
from tqdm import tqdm

from mimi_jax.train import Recipe, Trainer
from mimi_jax.train.step import start_model

WARMUP = 2  # steps: the first compiles


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("recipe", nargs="?", type=Path, default=Path("configs/mini.toml"))
    parser.add_argument("--steps", type=int, default=20)
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
    print(
        f"{jax.devices()[0].device_kind}: {1000 * median:.0f} ms a step of {recipe.data.batch_size} x"
        f" {recipe.data.seconds:g} s, {audio / median:.1f} s of audio a second, compiled in {times[0]:.0f} s"
    )


if __name__ == "__main__":
    main()
