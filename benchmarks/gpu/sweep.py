"""The sizes of the Triton device kernels: what each takes on this GPU, and the constants to commit.

    python -m benchmarks.gpu.sweep [--seconds 60] [--small]

Each SEANet stage of the published size is computed in bfloat16, for 8 clips of 30 s, with every tile that is
near the one in `mimi_jax/ops/triton_stages.py`. All tiles of a stage compile at the same time. A tile that
does not fit on the GPU has no time. "layers" is the same stage in plain XLA.
"""

import argparse
import importlib.util
import itertools
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp

from benchmarks.inputs import SMALL, random_model
from benchmarks.report import Report
from mimi_jax import MimiConfig
from mimi_jax.ops import policy

CLIPS, SECONDS, RUNS = 8, 30, 5
FACTORS = (0.5, 1, 2)  # of the rows of a tile
WARPS, PIPELINES = (4, 8), (1, 2, 3)


class Sizes(NamedTuple):
    """One constant of `triton_stages`, and the stage that shows what it costs."""

    table: str  # the name of the dictionary
    key: Any
    name: str  # of the stage
    stage: Any
    x: jax.Array  # the input of the stage, [clips, time, channels]


def sizes(config: MimiConfig, capability: int) -> Iterator[Sizes]:
    """The constants that a model uses on this GPU. Encoder and decoder share those of the residual blocks."""
    from mimi_jax.ops import triton_stages

    model, found = random_model(config).astype(jnp.bfloat16), set()
    assert model.encoder is not None and model.decoder is not None
    time = {"encoder": SECONDS * config.sampling_rate, "decoder": SECONDS * config.sampling_rate}
    time["decoder"] //= model.encoder.samples_per_step
    for half in ("encoder", "decoder"):
        for stage in getattr(model, half).stages:
            resampling = stage.downsample if half == "encoder" else stage.upsample
            channels = stage.blocks[0].conv1.in_channels
            whole = channels <= triton_stages.WHOLE_STAGES
            table = f"{half.upper()}_STAGE" if whole else "BLOCKS"
            key = capability >= triton_stages.HOPPER if whole else channels
            width = resampling.in_channels
            x = jnp.ones((CLIPS, time[half], width), jnp.bfloat16)
            if (table, key) not in found:
                yield Sizes(table, key, f"{half}, {channels} channels, ratio {resampling.stride}", stage, x)
            found.add((table, key))
            time[half] = (
                time[half] // resampling.stride if half == "encoder" else time[half] * resampling.stride
            )


def milliseconds(run: Callable[[], Any]) -> float:
    """Of one run; several are queued, so that the device does not wait for the host."""
    jax.block_until_ready(run())
    start = time.perf_counter()
    jax.block_until_ready([run() for _ in range(RUNS)][-1])
    return 1000 * (time.perf_counter() - start) / RUNS


def candidates(current: Any) -> list[Any]:
    """The tile that is used now, then those near it."""
    rows = [int(current.rows * factor) for factor in FACTORS]
    tiles = [
        current._replace(rows=r, warps=w, stages=s) for r, w, s in itertools.product(rows, WARPS, PIPELINES)
    ]
    return [current, *(tile for tile in tiles if tile != current and tile.rows >= 16)]


def compile_tiles(sizes: Sizes, tiles: list[Any], capability: int) -> dict[Any, Callable[[], Any]]:
    """Functions that compute the stage with each tile, without the tiles that do not compile."""
    from mimi_jax.ops import triton_stages

    def trace(tile: Any) -> Any:
        with mock.patch.dict(getattr(triton_stages, sizes.table), {sizes.key: tile}):
            step = lambda stage, x: triton_stages.step(stage, None, x, None, capability=capability)[1]  # noqa: E731
            return jax.jit(step).trace(sizes.stage, sizes.x)

    def compiled(traced: Any) -> Any:
        try:
            return traced.lower().compile()
        except Exception as error:  # too much shared memory, for example
            return str(error)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        programs = list(pool.map(compiled, map(trace, tiles)))
    return {
        tile: lambda program=program: program(sizes.stage, sizes.x)
        for tile, program in zip(tiles, programs, strict=True)
        if not isinstance(program, str)
    }


def sweep(sizes: Sizes, capability: int, report: Report, end: float) -> Any:
    """Time all tiles of one constant, as long as the time lasts, and return the fastest."""
    from mimi_jax.ops import triton_stages

    tables = getattr(triton_stages, sizes.table)
    tiles = candidates(tables.get(sizes.key, triton_stages.OTHER_BLOCKS))
    best, fastest = tiles[0], float("inf")
    for tile, run in compile_tiles(sizes, tiles, capability).items():
        if time.perf_counter() > end:
            break
        try:
            took = milliseconds(run)
        except Exception as error:  # the GPU may refuse what the compiler does not
            report.row([sizes.name, str(tuple(tile)), str(error).strip().splitlines()[0][:60]])
            continue
        if took < fastest:
            best, fastest = tile, took
        report.row([sizes.name, str(tuple(tile)), f"{took:.3f}"])
    return best


def time_layers(sizes: Sizes, report: Report) -> None:
    """The same stage layer by layer, in plain XLA."""

    @jax.jit
    def step(stage: Any, x: jax.Array) -> jax.Array:
        with policy.computing(policy.PORTABLE):
            return stage.step_layers(None, x, None)[1]

    report.row([sizes.name, "layers", f"{milliseconds(lambda: step(sizes.stage, sizes.x)):.3f}"])


def why_not() -> str:
    """Why nothing can be measured here, or ""."""
    missing = [name for name in ("triton", "jax_triton") if importlib.util.find_spec(name) is None]
    if missing:
        return f"{' and '.join(missing)} not installed"
    return "" if jax.default_backend() == "gpu" else "no GPU"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=60, help="the most that all tiles may take")
    parser.add_argument("--small", action="store_true", help="a tiny model, to try this on a CPU")
    options = parser.parse_args()
    end, reason = time.perf_counter() + options.seconds, why_not()
    capability = 0 if reason else round(10 * float(jax.devices()[0].compute_capability))
    report, best = Report(jax.devices()[0].device_kind), {}
    report.table(["stage", "rows, warps, pipeline", "ms"])
    for constant in sizes(SMALL if options.small else MimiConfig(), capability):
        time_layers(constant, report)
        if not reason and time.perf_counter() < end:
            best[constant.table, constant.key] = sweep(constant, capability, report, end)
    report.line(f"\n## {f'No tiles were measured: {reason}' if reason else 'The fastest'}\n")
    for (table, key), tile in best.items():
        report.line(f"    {table}[{key!r}] = Tile{tuple(tile)}")


if __name__ == "__main__":
    main()
