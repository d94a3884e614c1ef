"""What XLA makes of the codec for a TPU, without one: memory, work, and the speed these cannot exceed.

    python -m benchmarks.tpu [--batch 8] [--seconds 10] [--step 0.08] [--precision highest]

Full size, compiled ahead of time for the 8 chips of a v5e:2x4, the batch sharded over them and the weights
on each; nothing runs. The numbers are those of the compiler, for one chip. It needs libtpu
(`pip install libtpu`) and takes a few minutes. Install that apart from your environment for work
(`pip install --target FOLDER libtpu`, then `PYTHONPATH=FOLDER`): where JAX finds it on a machine without
TPUs, each start complains on stderr.

With `precision="highest"`, which `Mimi` has by default, a product of float32 takes six passes of bfloat16;
the compiler counts one, and the bound here counts all. Rows in bfloat16 are of "default": that takes one
pass for everything, the quantizer included.
"""

import argparse
import functools
import itertools
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

import mimi_jax
from mimi_jax.checkpoint import abstract_model

TOPOLOGY = "v5e:2x4"
FLOPS_PER_SECOND = 197e12  # of one v5e chip, in bfloat16
BYTES_PER_SECOND = 819e9  # of its memory
FUNCTIONS = ("encode", "decode", "encode_step")
DTYPES = ("bfloat16", "float32")
PASSES = {"default": 1, "high": 3, "highest": 6}  # of bfloat16, in a product of float32
COLLECTIVES = ("all-reduce", "all-gather", "all-to-all", "reduce-scatter", "collective-permute")


class Report(NamedTuple):
    """What the compiler says of one program, for one chip."""

    memory: int  # bytes of arguments, results and what lies between
    flops: float
    bytes_accessed: float
    collectives: list[str]  # the names of those the program has


def make_mesh(topology: str = TOPOLOGY) -> Mesh:
    """The chips of a TPU that is only described, on one axis, "data".

    Raises:
        RuntimeError: libtpu is not installed.
    """
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # no chip is opened, so none need be locked
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # there is no metadata server to wait for
    chips = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    return Mesh(np.array(chips), ("data",))


@functools.cache
def make_model(dtype: DTypeLike, precision: str, attention: str | None = None) -> mimi_jax.Mimi:
    """A model of full size that has shapes and no values."""
    model = abstract_model(mimi_jax.MimiConfig(), precision=precision, attention=attention)
    return jax.eval_shape(lambda model: model.astype(dtype), model)


def make_program(
    model: mimi_jax.Mimi, function: str, batch: int, seconds: float
) -> tuple[Callable, tuple[Any, ...]]:
    """One of `FUNCTIONS`, and the shapes of all its arguments but the model."""
    config = model.config
    frame_size, codebooks = config.frame_size, config.num_quantizers
    frames = model.encoded_length(round(seconds * config.sampling_rate))
    audio = jax.ShapeDtypeStruct((batch, config.audio_channels, frames * frame_size), jnp.float32)
    if function == "encode":
        return lambda model, audio: mimi_jax.encode(model, audio).audio_codes, (audio,)
    if function == "decode":
        codes = jax.ShapeDtypeStruct((batch, codebooks, frames), jnp.int32)
        return lambda model, codes: mimi_jax.decode(model, codes).audio_values, (codes,)
    state = jax.eval_shape(lambda: model.init_encoder_state(batch))
    return mimi_jax.encode_step, (state, audio)


def compile_for(
    mesh: Mesh, model: mimi_jax.Mimi, function: str, batch: int, seconds: float, attention: str | None = None
) -> Report:
    """Compile for the chips of `mesh`, `batch` rows on each, and say what came out.

    Args:
        function: one of `FUNCTIONS`.
        seconds: of audio in a clip, or in a step.
        attention: what the model was made with.
    """
    program, shapes = make_program(model, function, batch * mesh.size, seconds)
    weights, rows = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), ("data",)))
    shardings = (weights, *[rows] * len(shapes))
    # As in a server, a step writes its state into the memory of the one before.
    donated = (1,) if function == "encode_step" else ()
    if attention == "splash":
        # The compiler cannot partition a Pallas kernel, so each chip gets a program for its own rows.
        specs = (PartitionSpec(), *[PartitionSpec("data")] * len(shapes))
        # Nor does the kernel say over which axes its results differ, so that is not checked.
        program = jax.shard_map(
            program, mesh=mesh, in_specs=specs, out_specs=PartitionSpec("data"), check_vma=False
        )
    jitted = jax.jit(program, in_shardings=shardings, out_shardings=rows, donate_argnums=donated)
    compiled: Any = jitted.lower(model, *shapes).compile()  # whose analyses may be None elsewhere
    memory, cost, text = compiled.memory_analysis(), compiled.cost_analysis(), compiled.as_text()
    sizes = memory.argument_size_in_bytes + memory.temp_size_in_bytes + memory.output_size_in_bytes
    taken = sizes - memory.alias_size_in_bytes
    return Report(taken, cost["flops"], cost["bytes accessed"], collectives(text))


def collectives(text: str) -> list[str]:
    """The operations in a compiled program in which devices talk to each other."""
    return [name for name in COLLECTIVES if name in text]


def bound(report: Report, seconds: float, passes: int) -> float:
    """How many seconds of audio a chip can do in one second at most: neither its products nor its memory
    can be faster.

    Args:
        seconds: of audio, in all rows of one chip.
        passes: how often the multiplier goes over each product.
    """
    compute, memory = report.flops * passes / FLOPS_PER_SECOND, report.bytes_accessed / BYTES_PER_SECOND
    return seconds / max(compute, memory)


def table_row(mesh: Mesh, function: str, dtype: str, precision: str, batch: int, seconds: float) -> str:
    model = make_model(dtype, precision)
    report = compile_for(mesh, model, function, batch, seconds)
    speed = bound(report, batch * seconds, PASSES[precision] if dtype == "float32" else 1)
    cells = [function, dtype, precision, str(batch), f"{seconds:g}", f"{report.memory / 1e6:.0f}"]
    cells += [f"{report.flops / 1e9:.1f}", f"{report.bytes_accessed / 1e9:.2f}", f"{speed:,.0f}"]
    cells.append(", ".join(report.collectives) or "none")
    return f"| {' | '.join(cells)} |"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, nargs="+", default=[8], help="rows on each chip")
    parser.add_argument("--seconds", type=float, default=10.0, help="of audio in a clip")
    parser.add_argument("--precision", choices=list(PASSES), default="highest", help="of the rows in float32")
    parser.add_argument(
        "--step", type=float, default=0.08, help="seconds of audio in a step; 1.28 in tokenize"
    )
    parser.add_argument("--functions", choices=FUNCTIONS, nargs="+", default=FUNCTIONS)
    options = parser.parse_args(arguments)
    mesh = make_mesh()
    columns = ["function", "dtype", "precision", "batch per chip", "seconds of audio", "MB per chip", "GFLOP"]
    columns += ["GB accessed", "at most x realtime", "collectives"]
    print(f"{mesh.size} chips of {mesh.devices.flat[0].device_kind}, jax {jax.__version__}; per chip\n")
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}", flush=True)
    for batch, function, dtype in itertools.product(options.batch, options.functions, DTYPES):
        precision = options.precision if dtype == "float32" else "default"
        seconds = options.step if function == "encode_step" else options.seconds
        print(table_row(mesh, function, dtype, precision, batch, seconds), flush=True)


if __name__ == "__main__":
    main()
