"""How many seconds of audio one second of training takes in.

    python -m benchmarks.training [configs/mini.toml] [--steps 20] [--dtypes float32 bfloat16]
        [--markdown FILE]

Measures steps alone, on batches of noise that are already in memory; the first two are not counted. On Linux
CPUs, try it with `GLIBC_TUNABLES=glibc.malloc.hugetlb=1`. In bfloat16 both halves of the codec compute in it.
The weights, the quantizer, the losses and the optimizer stay in float32.
"""

import argparse
import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tqdm import tqdm

from benchmarks.report import Report, add_markdown_option
from mimi_jax import Mimi
from mimi_jax.train import Recipe, Trainer, start_model

WARMUP = 2  # steps; the first one compiles


class MixedMimi(Mimi):
    """Has float32 weights, and computes in bfloat16."""

    def encode_latents(self, audio, padding_mask=None):
        return Mimi.encode_latents(self.astype(jnp.bfloat16), audio, padding_mask).astype(jnp.float32)

    def decode_latents(self, latents):
        return Mimi.decode_latents(self.astype(jnp.bfloat16), latents).astype(jnp.float32)


def make_model(recipe: Recipe, dtype: str) -> Mimi:
    if dtype == "float32":
        return start_model(recipe)
    return MixedMimi(recipe.model, rngs=nnx.Rngs(recipe.seed), precision=recipe.precision)


def time_steps(recipe: Recipe, dtype: str, steps: int) -> list[float]:
    """Seconds of each step, those of the warm-up first."""
    trainer = Trainer(recipe, make_model(recipe, dtype))
    state = trainer.init()
    shape = recipe.data.batch_size, trainer.model.config.audio_channels, recipe.num_samples
    noise = np.random.default_rng(0).normal(0, 0.1, shape).astype(np.float32)
    batch, times = jax.device_put({"audio": noise}), []
    for _ in tqdm(range(WARMUP + steps), disable=None, leave=False):
        start = time.perf_counter()
        state, logs = trainer.step(state, batch, phase=trainer.phase(recipe.steps - 1))
        jax.block_until_ready((state, logs))
        times.append(time.perf_counter() - start)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", nargs="?", type=Path, default=Path("configs/mini.toml"))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--dtypes", choices=["float32", "bfloat16"], nargs="+", default=["float32"])
    add_markdown_option(parser)
    options = parser.parse_args()
    recipe = Recipe.from_toml(options.recipe)
    audio = recipe.data.batch_size * recipe.data.seconds
    size = f"{recipe.data.batch_size} x {recipe.data.seconds:g} s"
    report = Report(jax.devices()[0].device_kind, [f"{options.recipe.name}, {options.steps} steps"])
    report.table(["batch", "dtype", "ms a step", "seconds of audio a second", "seconds to compile"])
    for dtype in options.dtypes:
        times = time_steps(recipe, dtype, options.steps)
        median = statistics.median(times[WARMUP:])
        cells = [f"{1000 * median:.0f}", f"{audio / median:.1f}", f"{times[0]:.0f}"]
        report.row([size, dtype, *cells])
    report.save(options.markdown)


if __name__ == "__main__":
    main()
