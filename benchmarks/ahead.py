"""Compile the codec for TPUs and NVIDIA GPUs without having one: memory, work, and a bound on the speed.

    python -m benchmarks.ahead [--device v5e] [--batch 8] [--seconds 10] [--step 0.08] ...

The model has full size. It is compiled ahead of time for 8 chips, with the batch sharded over them and the
weights on each; nothing runs. The numbers are for one chip. This needs libtpu, or JAX's plugin for CUDA with
its libraries, and takes a few minutes. Install them outside your usual environment, as `make tpu` and
`make cuda` do: if JAX finds them on a machine without such a device, it complains on stderr at every start.

The operations are those of the matrix products that a case needs. The bytes are those to and from the main
memory of a chip, counted from the program (`benchmarks/hlo.py`). For TPUs, there is also XLA's own count. It
includes what goes to and from the memory on the chip itself, and each loop counts once.

Without a GPU, XLA cannot try out which device kernels are fastest, and leaves out those that it makes with
Triton, so on a real GPU the program may move fewer bytes. With `--stages`, rows in bfloat16 compute the
stages of SEANet as `mimi_jax.ops.triton_stages` does. That needs Python 3.12 and jax_triton.

For TPUs, `--stages` divides the work between the chips by hand, as `mimi-jax tokenize` does, since the
compiler cannot partition device kernels. Then the ends of the network and attention are in Pallas where
`mimi_jax.ops.policy` chooses so.

Rows in bfloat16 have the precision "default". On a TPU, this computes everything in one pass but the
quantizer, which takes six.

A step should read its weights and the state of its streams once, and write the new steps into the state.
After the table, its bytes are compared with that (`needed`).
"""

import argparse
import collections
import dataclasses
import functools
import itertools
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

import mimi_jax
from benchmarks.flops import count_flops
from benchmarks.hlo import DeviceKernel, device_kernels
from mimi_jax.checkpoint import abstract_model
from mimi_jax.ops import policy

FUNCTIONS = ("encode", "decode", "encode_step", "decode_step")
STEPS = FUNCTIONS[2:]
PARTS = {
    "encode": ("encoder", "encoder_transformer", "downsample"),
    "decode": ("upsample", "decoder_transformer", "decoder"),
}
COLLECTIVES = ("all-reduce", "all-gather", "all-to-all", "reduce-scatter", "collective-permute")


class Device(NamedTuple):
    """One chip, according to its data sheet."""

    platform: str
    memory: int  # bytes
    bytes_per_second: float
    flops_per_second: dict[tuple[str, str], float]  # by dtype and precision


# For float32, "highest" takes six passes of bfloat16 on a TPU. On a GPU it is ordinary float32, and "default"
# is TF32.
TPU_SPEED = {
    ("bfloat16", "default"): 197e12,
    ("float32", "default"): 197e12,
    ("float32", "highest"): 197e12 / 6,
}
GPU_SPEED = {("bfloat16", "default"): 989e12, ("float32", "default"): 495e12, ("float32", "highest"): 67e12}
DEVICES = {
    "v5e": Device("tpu", 16_000_000_000, 819e9, TPU_SPEED),
    "v6e": Device(
        "tpu", 32_000_000_000, 1640e9, {kind: 918 / 197 * speed for kind, speed in TPU_SPEED.items()}
    ),
    "h100": Device("cuda", 80_000_000_000, 3.35e12, GPU_SPEED),
    "h200": Device("cuda", 141_000_000_000, 4.8e12, GPU_SPEED),
}
# Without a GPU on which to time device kernels, XLA chooses sizes for Triton's that do not compile.
COMPILER_OPTIONS: dict[str, dict[str, str | bool]] = {
    "tpu": {},
    "cuda": {"xla_gpu_enable_triton_gemm": False},
}
CAPABILITY = 90  # of H100 and H200, times ten
# XLA's own description of an NVIDIA GPU of compute capability 9.0.
GPU_DESCRIPTION = """
platform_name: "CUDA"
device_description_str: "{name}"
runtime_version {{ major: 13 }}
dnn_version_info {{ major: 9 minor: 10 }}
gpu_device_info {{
  cuda_compute_capability {{ major: 9 }}
  core_count: 132
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  driver_version: "13.0.0"
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  shared_memory_per_core: 233472
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  l2_cache_size: 52428800
  memory_bandwidth: {bandwidth:.0f}
  device_memory_size: {memory}
}}
"""


class Program(NamedTuple):
    """What is known about one compiled program, for one chip."""

    memory: int  # bytes of arguments, results and everything between them
    flops: int  # of the matrix products that the codec needs
    kernels: list[DeviceKernel]
    collectives: list[str]  # see `collectives`
    text: str  # of the compiled program
    counted_by_xla: float  # bytes, for TPUs

    @property
    def moved(self) -> int:
        """Bytes to and from the main memory."""
        return sum(kernel.bytes for kernel in self.kernels)


def make_mesh(name: str) -> Mesh:
    """Eight chips on one axis, "data". They are only described and need not exist.

    For GPUs, JAX can use no other GPUs in this process afterwards.

    Raises:
        RuntimeError, NotImplementedError: the compiler for these chips is not installed.
    """
    device = DEVICES[name]
    if device.platform == "tpu":
        os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # it opens no chip, so it needs no lock
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # do not wait for a metadata server
        topology = topologies.get_topology_desc(platform="tpu", topology_name=f"{name}:2x4")
    else:
        jax.config.update("jax_platforms", "cpu")  # otherwise the plugin asks for a driver
        description = GPU_DESCRIPTION.format(
            name=name, bandwidth=device.bytes_per_second, memory=device.memory
        )
        topology = topologies.get_topology_desc(platform="cuda", topology="1x1x8", target_config=description)
    return Mesh(np.array(topology.devices), ("data",))


@functools.cache
def make_model(
    dtype: DTypeLike,
    precision: str,
    attention: str | None = None,
    stages: bool = False,
    platform: str = "cuda",
) -> mimi_jax.Mimi:
    """A model of full size that has shapes but no values.

    Args:
        stages: whether stages are in Triton. In Pallas they are wherever nothing is partitioned.
        platform: "cuda" or "tpu", whose ways it computes in.
    """
    compute = policy.resolve("portable" if attention is None else {"attention": attention})
    if platform == "cuda":
        compute = dataclasses.replace(compute, capability=CAPABILITY, fused=("cuda",) if stages else ())
    else:
        compute = dataclasses.replace(compute, fused=("tpu",))
    model = abstract_model(mimi_jax.MimiConfig(), precision=precision, compute=compute)
    return jax.eval_shape(lambda model: model.astype(dtype), model)


def make_program(
    model: mimi_jax.Mimi, function: str, batch: int, seconds: float
) -> tuple[Callable, tuple[Any, ...]]:
    """One of `FUNCTIONS`, and the shapes of its arguments after the model."""
    config = model.config
    frame_size, codebooks = config.frame_size, config.num_quantizers
    frames = model.encoded_length(round(seconds * config.sampling_rate))
    audio = jax.ShapeDtypeStruct((batch, config.audio_channels, frames * frame_size), jnp.float32)
    if function == "encode":
        return lambda model, audio: mimi_jax.encode(model, audio).audio_codes, (audio,)
    if function == "decode":
        codes = jax.ShapeDtypeStruct((batch, codebooks, frames), jnp.int32)
        return lambda model, codes: mimi_jax.decode(model, codes).audio_values, (codes,)
    if function == "encode_step":
        return mimi_jax.encode_step, (jax.eval_shape(lambda: model.init_encoder_state(batch)), audio)
    state = jax.eval_shape(lambda: model.init_decoder_state(batch))
    return mimi_jax.decode_step, (state, jax.ShapeDtypeStruct((batch, codebooks, frames), jnp.int32))


def compile_for(
    mesh: Mesh, model: mimi_jax.Mimi, function: str, batch: int, seconds: float, by_hand: bool = False
) -> Program:
    """Compile a function for the chips of `mesh`, with `batch` rows on each.

    Args:
        function: one of `FUNCTIONS`.
        seconds: of audio in a clip, or in a step.
        by_hand: whether each chip gets a program for its own rows, since the compiler cannot partition the
            device kernels of Pallas and Triton.
    """
    program, shapes = make_program(model, function, batch * mesh.size, seconds)
    weights, rows = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), ("data",)))
    shardings = (weights, *[rows] * len(shapes))
    # As in a server, a step writes its state into the memory of the previous state.
    donated = (1,) if function in STEPS else ()
    if by_hand:
        specs = (PartitionSpec(), *[PartitionSpec("data")] * len(shapes))
        # The device kernels do not say over which axes its results differ, so that is not checked.
        program = jax.shard_map(
            program, mesh=mesh, in_specs=specs, out_specs=PartitionSpec("data"), check_vma=False
        )
    jitted = jax.jit(program, in_shardings=shardings, out_shardings=rows, donate_argnums=donated)
    platform = "tpu" if mesh.devices.flat[0].platform == "tpu" else "cuda"
    compiled: Any = jitted.lower(model, *shapes).compile(COMPILER_OPTIONS[platform])
    memory, cost, text = compiled.memory_analysis(), compiled.cost_analysis(), compiled.as_text()
    sizes = memory.argument_size_in_bytes + memory.temp_size_in_bytes + memory.output_size_in_bytes
    taken = sizes - memory.alias_size_in_bytes
    flops = count_flops(model.config, seconds, model.config.num_quantizers)[function.removesuffix("_step")]
    counted_by_xla = cost["bytes accessed"] if platform == "tpu" else 0.0
    return Program(taken, batch * flops, device_kernels(text), collectives(text), text, counted_by_xla)


class Needed(NamedTuple):
    """The bytes that a step has to move."""

    weights: int  # parameters that it reads
    state: int  # of all streams
    written: int  # of the state, what is new: the slots of new steps, and all that is not a ring


def needed(model: mimi_jax.Mimi, function: str, batch: int, seconds: float) -> Needed:
    """What one of `STEPS` has to move for `batch` streams on one chip."""

    def size(tree: Any) -> int:
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))

    half, config = function.removesuffix("_step"), model.config
    quantizers = model.quantizer.semantic, model.quantizer.acoustic
    frames = batch * model.encoded_length(round(seconds * config.sampling_rate))
    weights = size([getattr(model, part) for part in PARTS[half]])
    for quantizer in quantizers:
        if half == "encode":
            weights += size([quantizer.input_proj, quantizer.embedding, quantizer.half_square])
        else:  # the embeddings of the codes alone
            num_levels, _, dim = quantizer.embedding.shape
            weights += size(quantizer.output_proj) + 4 * frames * num_levels * dim
    state = jax.tree.leaves(make_program(model, function, batch, seconds)[1][0])
    new = frames // batch * config.latent_stride
    written = sum(size(x) * min(new, x.shape[2]) // x.shape[2] if x.ndim == 4 else size(x) for x in state)
    return Needed(weights, size(state), written)


def collectives(text: str) -> list[str]:
    """The operations of a compiled program in which devices exchange data."""
    return [name for name in COLLECTIVES if name in text]


def bound(report: Program, seconds: float, device: Device, kind: tuple[str, str]) -> float:
    """The most seconds of audio that a chip can process in a second, given its products and its memory.

    Args:
        seconds: of audio, in all rows on one chip.
        kind: dtype and precision of the products.
    """
    compute = report.flops / device.flops_per_second[kind]
    return seconds / max(compute, report.moved / device.bytes_per_second)


def fused_attention(name: str, dtype: str) -> str | None:
    """What `mimi_jax.ops.policy` would choose by itself if it found such a GPU."""
    return "cudnn" if DEVICES[name].platform == "cuda" and dtype == "bfloat16" else None


class Case(NamedTuple):
    """What is compiled for one line of the table."""

    function: str
    kind: tuple[str, str]  # dtype and precision
    batch: int  # rows on each chip
    seconds: float  # of audio in a row
    stages: bool = False  # in device kernels


def model_of(name: str, case: Case) -> mimi_jax.Mimi:
    attention = fused_attention(name, case.kind[0])
    return make_model(*case.kind, attention, case.stages, DEVICES[name].platform)


def compile_case(mesh: Mesh, name: str, case: Case) -> Program:
    model = model_of(name, case)
    return compile_for(mesh, model, case.function, case.batch, case.seconds, by_hand=case.stages)


def table_row(name: str, case: Case, report: Program) -> str:
    speed = bound(report, case.batch * case.seconds, DEVICES[name], case.kind)
    cells = [case.function, *case.kind, str(case.batch), f"{case.seconds:g}", f"{report.memory / 1e6:.0f}"]
    cells += [f"{report.flops / 1e9:.1f}", f"{report.moved / 1e9:.2f}"]
    if DEVICES[name].platform == "tpu":
        cells.append(f"{report.counted_by_xla / 1e9:.2f}")
    cells += [f"{speed:,.0f}", ", ".join(report.collectives) or "none"]
    return f"| {' | '.join(cells)} |"


def needed_row(name: str, case: Case, report: Program) -> str:
    model = model_of(name, case)
    parts = needed(model, case.function, case.batch, case.seconds)
    cells = [case.function, case.kind[0], str(case.batch), f"{case.seconds:g}"]
    cells += [f"{size / 1e6:.1f}" for size in (*parts, report.moved)] + [f"{report.moved / sum(parts):.2f}"]
    return f"| {' | '.join(cells)} |"


def print_steps(name: str, reports: dict[Case, Program]) -> None:
    """What steps move, in units of what they have to move."""
    rows = [needed_row(name, case, report) for case, report in reports.items() if case.function in STEPS]
    columns = ["step", "dtype", "batch per chip", "seconds of audio", "MB of weights", "MB of state"]
    columns += ["MB of it written", "MB moved", "ratio"]
    if rows:
        print(f"\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}", *rows, sep="\n")


def print_largest(case: Case, report: Program, count: int) -> None:
    """The device kernels that move most bytes, grouped by their last operation."""
    moved, numbers = collections.Counter(), collections.Counter()
    for kernel in report.kernels:
        moved[kernel.source] += kernel.bytes
        numbers[kernel.source] += 1
    print(f"\n{case.function}, {case.kind[0]}\n\n| last operation | device kernels | GB |\n|---|---|---|")
    for source, size in moved.most_common(count):
        print(f"| {source} | {numbers[source]} | {size / 1e9:.2f} |")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=list(DEVICES), default="v5e")
    parser.add_argument("--batch", type=int, nargs="+", default=[8], help="rows on each chip")
    parser.add_argument("--seconds", type=float, default=10.0, help="of audio in a clip")
    parser.add_argument(
        "--precision", choices=["default", "highest"], default="highest", help="of float32 products"
    )
    parser.add_argument(
        "--step", type=float, default=0.08, help="seconds of audio in a step; tokenize uses 1.28"
    )
    parser.add_argument("--functions", choices=FUNCTIONS, nargs="+", default=FUNCTIONS)
    parser.add_argument("--stages", action="store_true", help="compute stages of SEANet in device kernels")
    parser.add_argument(
        "--largest",
        type=int,
        default=0,
        help="for GPUs, list this many kinds of device kernels, those that move most bytes",
    )
    options = parser.parse_args(arguments)
    platform = DEVICES[options.device].platform
    if options.largest and platform == "tpu":
        parser.error("--largest needs a GPU as --device")
    mesh = make_mesh(options.device)
    columns = ["function", "dtype", "precision", "batch per chip", "seconds of audio", "MB per chip", "GFLOP"]
    columns += ["GB moved"] + (["GB by XLA"] if platform == "tpu" else [])
    columns += [f"{'' if platform == 'tpu' else 'about '}at most x realtime", "collectives"]
    print(f"{mesh.size} chips of {mesh.devices.flat[0].device_kind}, jax {jax.__version__}; per chip\n")
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}", flush=True)
    kinds = (("bfloat16", "default"), ("float32", options.precision))
    reports = {}
    for batch, function, kind in itertools.product(options.batch, options.functions, kinds):
        seconds = options.step if function in STEPS else options.seconds
        case = Case(
            function, kind, batch, seconds, options.stages and (platform == "tpu" or kind[0] == "bfloat16")
        )
        start = time.process_time()
        reports[case] = compile_case(mesh, options.device, case)
        spent = f"{function}, {kind[0]}: {time.process_time() - start:.0f} s of CPU time to compile"
        print(spent, file=sys.stderr)
        print(table_row(options.device, case, reports[case]), flush=True)
    print_steps(options.device, reports)
    for case, report in reports.items():
        if options.largest:
            print_largest(case, report, options.largest)


if __name__ == "__main__":
    main()
