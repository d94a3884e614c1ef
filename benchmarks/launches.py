"""Count what a step of a stream launches on an NVIDIA GPU, without having one.

    python -m benchmarks.launches [--device h100] [--dtype bfloat16] [--batch 1] [--codebooks 8] [--list]

A step of one stream computes so little that starting its device kernels takes longer than running them. XLA
records them in CUDA graphs, which start all their kernels at once. Convolutions by cuDNN and loops stay
outside, and cut the step into several graphs.

The codec has full size. A step of one frame is compiled ahead of time for one chip, with the rings of its
state donated, and XLA writes out the sequence that it would launch. "masked_encode_step" is what
`StreamingEncoder.push` runs. This needs what `benchmarks/ahead.py` needs for GPUs.
On a real GPU XLA tries out device kernels for products too, so the sequence may differ a little there.
"""

import argparse
import re
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import mimi_jax
from benchmarks import ahead

FUNCTIONS = ("encode_step", "masked_encode_step", "decode_step")
GRAPH = "kCommandBuffer"
LOOP = "kWhile"
GROUPS = (GRAPH, LOOP, "kSequential", "kConditional", "kDynamicSliceFusion")  # they hold launches
# Each kind of launch, as XLA names it, and the column in which it is counted.
COLUMNS = {
    "kCustomKernel": "kernels",
    "kKernel": "kernels",
    "kCublasLtMatmul": "products",
    "kGemm": "products",
    "kCopy": "copies",
    "kConvolution": "convolutions",
}
# A line such as "    003: kCopy   [source | next=007 (1)] kCopy". What a group holds is indented.
LINE = re.compile(r"(?P<indent> *)\d+: (?P<kind>k\w+) *\[.*?\] *(?P<name>\S*)")


class Launch(NamedTuple):
    """A device kernel, a call of a library or a copy."""

    kind: str  # as XLA names it
    name: str  # of a device kernel
    is_recorded: bool  # in a CUDA graph


class Launches(NamedTuple):
    """What one run of a program launches. What the body of a loop launches counts once."""

    launches: list[Launch]
    graphs: int
    loops: int

    def count(self, column: str) -> int:
        return sum(COLUMNS.get(launch.kind, "others") == column for launch in self.launches)


def parse(text: str) -> Launches:
    """Read the sequence that XLA dumps."""
    matches = [match for match in map(LINE.match, text.splitlines()) if match]
    launches, group, inside = [], "", ""
    for match in matches:
        if not match["indent"]:
            group = match["kind"]
        if match["kind"] not in GROUPS:
            inside = group if match["indent"] else ""
            launches.append(Launch(match["kind"], match["name"], inside == GRAPH))
    kinds = [match["kind"] for match in matches]
    return Launches(launches, kinds.count(GRAPH), kinds.count(LOOP))


def make_step(
    model: mimi_jax.Mimi, function: str, batch: int, codebooks: int
) -> tuple[Callable, tuple[Any, ...]]:
    """One of `FUNCTIONS` for a step of one frame, and the shapes of its arguments after the model."""
    config = model.config
    audio = jax.ShapeDtypeStruct((batch, config.audio_channels, config.frame_size), jnp.float32)
    codes = jax.ShapeDtypeStruct((batch, codebooks, 1), jnp.int32)
    init_state = model.init_decoder_state if function == "decode_step" else model.init_encoder_state
    leaves, structure = jax.tree.flatten(jax.eval_shape(lambda: init_state(batch)))
    rings = [leaf if leaf.ndim == 4 else None for leaf in leaves]
    rest = [None if leaf.ndim == 4 else leaf for leaf in leaves]

    def step(model: mimi_jax.Mimi, rings: list, rest: list, x: jax.Array) -> Any:
        leaves = [b if a is None else a for a, b in zip(rings, rest, strict=True)]
        state = jax.tree.unflatten(structure, leaves)
        if function == "decode_step":
            return mimi_jax.decode_step(model, state, x)
        mask = ~jnp.isnan(x[:, 0]) if function == "masked_encode_step" else None
        return mimi_jax.encode_step(model, state, x, mask, codebooks)

    return step, (rings, rest, codes if function == "decode_step" else audio)


def compile_step(device: str, dtype: str, function: str, batch: int, codebooks: int) -> Launches:
    """Compile a step for one chip, and read what it launches.

    Args:
        device: a GPU in `ahead.DEVICES`.
        function: one of `FUNCTIONS`.
    """
    precision = "highest" if dtype == "float32" else "default"
    program, shapes = make_step(ahead.make_model(dtype, precision), function, batch, codebooks)
    chip = NamedSharding(Mesh(ahead.make_mesh(device).devices[:1], ("data",)), PartitionSpec())
    jitted = jax.jit(program, in_shardings=chip, out_shardings=chip, donate_argnums=1)
    lowered = jitted.lower(ahead.make_model(dtype, precision), *shapes)
    with tempfile.TemporaryDirectory() as folder:
        dump: dict[str, str | bool] = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
        lowered.compile(ahead.COMPILER_OPTIONS["cuda"] | dump)
        # The last one says what is in graphs. XLA leaves it out if nothing is.
        path = max(Path(folder).glob("*.thunk_sequence*.txt"), key=lambda path: len(path.name))
        return parse(path.read_text())


def table_row(function: str, result: Launches) -> str:
    columns = ("kernels", "products", "copies", "convolutions", "others")
    recorded = sum(launch.is_recorded for launch in result.launches)
    cells = [
        function,
        len(result.launches),
        *map(result.count, columns),
        result.loops,
        result.graphs,
        recorded,
    ]
    return f"| {' | '.join(map(str, cells))} |"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    gpus = [name for name, device in ahead.DEVICES.items() if device.platform == "cuda"]
    parser.add_argument("--device", choices=gpus, default="h100")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--codebooks", type=int, default=8)
    parser.add_argument("--functions", choices=FUNCTIONS, nargs="+", default=FUNCTIONS)
    parser.add_argument("--list", action="store_true", help="every launch too, in order")
    options = parser.parse_args(arguments)
    columns = ["function", "launches", "kernels", "products", "copies", "convolutions", "others"]
    columns += ["loops", "graphs", "launches in graphs"]
    results = {}
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}", flush=True)
    for function in options.functions:
        results[function] = compile_step(
            options.device, options.dtype, function, options.batch, options.codebooks
        )
        print(table_row(function, results[function]), flush=True)
    for function, result in results.items():
        if options.list:
            print(f"\n{function}")
            for launch in result.launches:
                print(f"{launch.kind:<16} {launch.name}{'' if launch.is_recorded else ' (not in a graph)'}")


if __name__ == "__main__":
    main()
