"""Compile the device kernels in Triton without a GPU: registers, spills and shared memory of each.

    python -m benchmarks.triton_kernels [--capabilities 80 89 90] [--dtype bfloat16]

The kernels are those of the full-size model. A program that spills keeps registers in memory, and is slow.
This needs triton on Linux, and no GPU.
"""

import argparse
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp

from mimi_jax import MimiConfig
from mimi_jax.checkpoint import abstract_model
from mimi_jax.ops import triton_stages

TYPES = {"bfloat16": "bf16", "float16": "fp16", "int32": "i32"}


class Kernel(NamedTuple):
    """A device kernel as a stage calls it."""

    name: str
    types: tuple[str, ...]  # of the arrays, inputs first
    tile: triton_stages.Tile
    sizes: dict[str, int]


class Resources(NamedTuple):
    """What a program of a device kernel takes."""

    registers: int  # of each thread
    spills: int  # bytes of each thread
    shared: int  # bytes


def kernels(config: MimiConfig, dtype: str, capability: int) -> dict[str, Kernel]:
    """The device kernels of all stages of a model, by what they compute."""
    found: dict[str, Kernel] = {}

    def call(name: str, _: int, *arrays: Any, outputs: list, tile: Any, programs: int, **sizes: int):
        types = [TYPES[array.dtype.name] for array in arrays] + [TYPES[dtype]] * len(outputs)
        found.setdefault(f"{name}, {sizes['C']} channels", Kernel(name, tuple(types), tile, sizes))
        return [jnp.zeros(shape, dtype) for shape in outputs]

    def trace(part: Any) -> Any:
        state = part.init_state(1, dtype)
        x = jnp.zeros((1, config.frame_size, jax.tree.leaves(state)[0].shape[-1]), dtype)
        return triton_stages.step(part, state, x, None, capability=capability)

    model = jax.eval_shape(lambda model: model.astype(dtype), abstract_model(config))
    with mock.patch.object(triton_stages, "call", call):
        for part in (
            *model.encoder.groups(),
            *model.encoder.stages,
            *model.decoder.stages,
            *model.decoder.groups(),
        ):
            if part.operation in triton_stages.KERNELS:
                jax.eval_shape(trace, part)
    return found


def compile_kernel(kernel: Kernel, capability: int) -> Resources:
    """The compiler's word on a device kernel for GPUs of a compute capability, such as 90."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from mimi_jax.ops import triton_kernels

    constants = {"ROWS": kernel.tile.rows, **kernel.sizes}
    constants.pop("T")
    function = getattr(triton_kernels, kernel.name)
    pointers = [name for name in function.arg_names if name not in constants and name != "T"]
    signature = dict.fromkeys(function.arg_names, "constexpr") | {"T": "i32"}
    signature |= {name: f"*{kind}" for name, kind in zip(pointers, kernel.types, strict=True)}
    aligned = {(function.arg_names.index(name),): [["tt.divisibility", 16]] for name in pointers}
    source = ASTSource(function, signature, constants, aligned)
    options = {"num_warps": kernel.tile.warps, "num_stages": kernel.tile.stages}
    options |= triton_stages.compiler_options(capability)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.ptx")
        file.write_text(compiled.asm["ptx"])
        told = assemble(file, capability)
    spills = sum(map(int, re.findall(r"(\d+) bytes spill", told)))
    [registers] = re.findall(r"Used (\d+) registers", told)
    return Resources(int(registers), spills, compiled.metadata.shared)


def assemble(file: Path, capability: int) -> str:
    """What NVIDIA's assembler says about a program."""
    from triton.backends.nvidia.compiler import get_ptxas

    assembler = get_ptxas(capability).path
    architecture = f"sm_{capability}{'a' if capability >= 90 else ''}"
    command = [assembler, "-v", f"-arch={architecture}", file, "-o", os.devnull]
    return subprocess.run(command, capture_output=True, text=True, check=True).stderr


def rows(capabilities: Sequence[int], dtype: str) -> Iterator[list[str]]:
    """The lines of the table."""
    for capability in capabilities:
        for name, kernel in kernels(MimiConfig(), dtype, capability).items():
            tile = f"{kernel.tile.rows} rows, {kernel.tile.warps} warps"
            used = compile_kernel(kernel, capability)
            yield [f"sm_{capability}", name, tile, *map(str, used)]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--capabilities", type=int, nargs="+", default=[80, 89, 90])
    parser.add_argument("--dtype", choices=["bfloat16", "float16"], default="bfloat16")
    options = parser.parse_args(arguments)
    columns = ["GPU", "device kernel", "tile", "registers", "bytes of spills", "bytes of shared memory"]
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for row in rows(options.capabilities, options.dtype):
        print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
