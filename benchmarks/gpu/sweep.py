"""The sizes of the Triton device kernels: what each takes on this GPU, and the constants to commit.

    python -m benchmarks.gpu.sweep [--seconds 110] [--small]

Each part of the network that is computed in Triton has the published size, and 8 clips of 30 s in bfloat16 as
its input. It runs with the tile that `mimi_jax/ops/triton_stages.py` has for it and with those near it, which
compile at the same time. A tile that does not fit on the GPU has no time. "without Triton" is what XLA makes
of it.
"""

import argparse
import dataclasses
import importlib.util
import itertools
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp

from benchmarks.inputs import SMALL, random_model
from benchmarks.report import Report
from mimi_jax import MimiConfig
from mimi_jax.ops import policy, triton_stages

RUNS = 5
FACTORS = (0.5, 1, 2)  # of the rows of a tile
WARPS, PIPELINES = (4, 8), (1, 2, 3)
HOPPER = 90  # compute capability, times ten
# The fewest channels for which there are device kernels.
SMALLEST = dataclasses.replace(SMALL, num_filters=32)


class Constant(NamedTuple):
    """An entry of a table of tiles in `triton_stages`, and a part of the network that it is for."""

    table: str
    key: Any
    part: Any
    x: jax.Array  # the input of the part

    def __str__(self) -> str:
        return f"{self.part.operation}, {self.table}[{self.key!r}]"


def tables() -> dict[str, dict[Any, Any]]:
    """The tables of tiles, by name."""
    return {
        name: table
        for name, table in vars(triton_stages).items()
        if isinstance(table, dict) and all(isinstance(tile, triton_stages.Tile) for tile in table.values())
    }


def parts(network: Any, length: int) -> Iterator[tuple[Any, int]]:
    """The parts that have device kernels, and how long their inputs are."""
    for group in network.groups():
        for part in [group] if group.operation in triton_stages.KERNELS else group.layers():
            if getattr(part, "operation", "") in triton_stages.KERNELS:
                yield part, length
            [length] = part.output_lengths(jnp.array([length], jnp.int32)).tolist()


def constants(config: MimiConfig, capability: int, clips: int, seconds: int) -> Iterator[Constant]:
    """The constants that a model uses on GPUs of this compute capability, each once.

    Args:
        clips, seconds: the size of the inputs.
    """
    model, found = random_model(config).astype(jnp.bfloat16), set()
    assert model.encoder is not None and model.decoder is not None
    samples = seconds * config.sampling_rate
    steps = samples // model.encoder.samples_per_step
    for part, length in (*parts(model.encoder, samples), *parts(model.decoder, steps)):
        width = jax.tree.leaves(part.init_state(1, jnp.bfloat16))[0].shape[-1]
        shape = jax.ShapeDtypeStruct((clips, length, width), jnp.bfloat16)
        for name, table in tables().items():
            for key in table:
                if (name, key) not in found and is_used(name, key, part, shape, capability):
                    found.add((name, key))
                    yield Constant(name, key, part, jnp.ones(shape.shape, shape.dtype))


def is_used(table: str, key: Any, part: Any, x: Any, capability: int) -> bool:
    """Whether a part computes with this constant."""
    strange = triton_stages.Tile(rows=7, warps=1)
    used = []

    def call(*_: Any, outputs: list[tuple[int, ...]], tile: Any, **__: Any) -> list[jax.Array]:
        used.append(tile)
        return [jnp.zeros(shape, x.dtype) for shape in outputs]

    with mock.patch.object(triton_stages, "call", call), with_tile(table, key, strange):
        jax.eval_shape(lambda x: compute(part, x, capability), x)
    return strange in used


def with_tile(table: str, key: Any, tile: Any) -> AbstractContextManager:
    return mock.patch.dict(tables()[table], {key: tile})


def compute(part: Any, x: jax.Array, capability: int) -> jax.Array:
    return triton_stages.step(part, None, x, None, capability=capability)[1]


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


def compile_tiles(
    constant: Constant, tiles: list[Any], capability: int
) -> dict[Any, Callable[[], Any] | Exception]:
    """Functions that compute the part with each tile, or why the tile does not compile."""
    part, x = constant.part, constant.x

    def trace(tile: Any) -> Any:
        with with_tile(constant.table, constant.key, tile):
            return jax.jit(lambda part, x: compute(part, x, capability)).trace(part, x)

    def compiled(traced: Any) -> Any:
        try:
            return traced.lower().compile()
        except Exception as error:  # too much shared memory, for example
            return error

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        programs = list(pool.map(compiled, [trace(tile) for tile in tiles]))
    return {
        tile: program if isinstance(program, Exception) else lambda program=program: program(part, x)
        for tile, program in zip(tiles, programs, strict=True)
    }


def sweep(constant: Constant, capability: int, report: Report, end: float) -> Any:
    """Time all tiles of one constant, as long as the time lasts, and return the fastest, None if none ran."""
    tiles = candidates(tables()[constant.table][constant.key])
    best, fastest = None, float("inf")
    for tile, run in compile_tiles(constant, tiles, capability).items():
        if time.perf_counter() > end:
            break
        try:
            if isinstance(run, Exception):
                raise run
            took = milliseconds(run)
        except Exception as error:  # the GPU may refuse what the compiler does not
            report.row([str(constant), str(tuple(tile)), str(error).strip().partition("\n")[0][:60]])
            continue
        if took < fastest:
            best, fastest = tile, took
        report.row([str(constant), str(tuple(tile)), f"{took:.3f}"])
    return best


def time_without_triton(constant: Constant, report: Report) -> None:
    """The same part as it is computed without Triton."""
    compute = dataclasses.replace(policy.resolve("auto"), fused=())

    @jax.jit
    def step(part: Any, x: jax.Array) -> jax.Array:
        with policy.computing(compute):
            return policy.step(part, part.init_state(x.shape[0], x.dtype), x, None)[1]

    took = milliseconds(lambda: step(constant.part, constant.x))
    report.row([str(constant), "without Triton", f"{took:.3f}"])


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
    parser.add_argument("--seconds", type=float, default=110, help="the most that all tiles may take")
    parser.add_argument("--small", action="store_true", help="a tiny model, to try this on a CPU")
    options = parser.parse_args()
    end, reason = time.perf_counter() + options.seconds, why_not()
    capability = HOPPER if reason else round(10 * float(jax.devices()[0].compute_capability))
    report = Report(jax.devices()[0].device_kind)
    if reason:
        report.line(f"\n## No tiles are measured: {reason}\n")
    inputs = (SMALLEST, capability, 1, 1) if options.small else (MimiConfig(), capability, 8, 30)
    for constant in constants(*inputs):
        if time.perf_counter() > end:
            report.line("\nNo time was left for the others.")
            break
        report.table(["part and constant", "rows, warps, stages", "ms"])
        time_without_triton(constant, report)
        if not reason and (tile := sweep(constant, capability, report, end)) is not None:
            report.line(f"\nThe fastest:\n\n    {constant.table}[{constant.key!r}] = Tile{tuple(tile)}\n")


if __name__ == "__main__":
    main()
