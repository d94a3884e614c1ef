"""Time each float32 product and convolution of the model on float32 units and on tensor cores.

    python -m benchmarks.products [--batch 8] [--seconds 30]

Every shape is timed both ways, whatever `mimi_jax.ops.policy` would choose, on an NVIDIA GPU. The last column
tells what it chooses. `FLOPS_PER_BYTE` and `MIN_SUMMANDS` in that module and `FAST` in
`mimi_jax.ops.tensor_cores` should be so that it is the faster way.
"""

import argparse
import functools
import math
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import mimi_jax
from benchmarks.report import Report
from mimi_jax import checkpoint
from mimi_jax.ops import policy

WAYS = ("plain", "tensor_cores")
OPERATIONS = ("product", "convolution", "search")
# Whole clips, not in pieces. On a GPU, pieces are so large that they make no difference.
GPU = policy.Compute((("network", "layers"),), tensor_cores=True)
QUEUED = 10  # calls that are timed together, so that launching them costs no time


class Call(NamedTuple):
    """A call of an operation while a model is traced."""

    operation: str
    shapes: tuple[tuple[int, ...], ...]  # of its arrays
    options: tuple[tuple[str, Any], ...]
    chosen: str  # on an NVIDIA GPU

    @property
    def ways(self) -> tuple[str, ...]:
        """Those that can compute this call."""
        is_whole = self.shapes[1][0] % dict(self.options).get("stride", 1) == 0
        return WAYS if self.operation != "convolution" or is_whole else WAYS[:1]

    @property
    def flops(self) -> int:
        x, kernel, *_ = self.shapes
        stride = dict(self.options).get("stride", 1)
        if self.operation == "search":
            return 2 * math.prod(x) * kernel[0]
        return 2 * math.prod(x) // stride * math.prod(kernel) // kernel[-2]


def calls(batch: int, seconds: float) -> list[Call]:
    """What an encode and a decode of float32 clips call, each shape once."""
    seen: dict[Call, None] = {}
    call = policy._call

    def record(operation: str, choice: policy.Choice, *arrays: jax.Array, **options: Any) -> jax.Array:
        if operation in OPERATIONS and arrays[0].dtype == jnp.float32:
            shapes = tuple(array.shape for array in arrays)
            chosen = choice.get("cuda", choice["default"])
            seen[Call(operation, shapes, tuple(sorted(options.items())), chosen)] = None
        return call(operation, choice, *arrays, **options)

    model = checkpoint.abstract_model(mimi_jax.MimiConfig(num_quantizers=8), compute=GPU)
    frames = model.encoded_length(round(seconds * model.config.sampling_rate))
    audio = jax.ShapeDtypeStruct((batch, 1, frames * model.config.frame_size), jnp.float32)
    codes = jax.ShapeDtypeStruct((batch, 8, frames), jnp.int32)
    policy._call = record
    try:
        jax.eval_shape(lambda model, audio: model.quantize(model.encode_latents(audio)), model, audio)
        jax.eval_shape(lambda model, codes: mimi_jax.decode(model, codes), model, codes)
    finally:
        policy._call = call
    return list(seen)


def milliseconds(call: Call, way: str) -> float:
    """The time of one call on the default device, the best of three."""
    keys = jax.random.split(jax.random.key(0), len(call.shapes))
    arrays = [jax.random.normal(key, shape) for key, shape in zip(keys, call.shapes, strict=True)]
    table = policy.OPERATIONS[call.operation]
    with jax.default_matmul_precision("highest"):
        compiled = jax.jit(functools.partial(table[way], **dict(call.options))).lower(*arrays).compile()
    times = []
    for _ in range(4):  # the first does not count
        jax.block_until_ready(compiled(*arrays))
        start = time.perf_counter()
        outputs = [compiled(*arrays) for _ in range(QUEUED)]
        jax.block_until_ready(outputs[-1])
        times.append(1000 * (time.perf_counter() - start) / QUEUED)
        del outputs
    return min(times[1:])


def table_row(call: Call) -> list[str]:
    times = {way: milliseconds(call, way) for way in call.ways}
    cells = [call.operation, " x ".join(map(str, call.shapes[:2]))]
    cells.append(", ".join(f"{k}={v}" for k, v in call.options if k in ("stride", "dilation") and v > 1))
    for way in WAYS:
        known = way in times
        cells.append(f"{times[way]:.3f}" if known else "-")
        cells.append(f"{call.flops / times[way] / 1e9:.0f}" if known else "-")
    return [*cells, call.chosen]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, default=8, help="clips")
    parser.add_argument("--seconds", type=float, default=30.0, help="of audio in a clip")
    options = parser.parse_args(arguments)
    report = Report(str(jax.devices()[0].device_kind), [f"{options.batch} clips of {options.seconds:g} s"])
    columns = ["operation", "shapes", "", *(f"{way} {unit}" for way in WAYS for unit in ("ms", "TFLOP/s"))]
    report.table([*columns, "chosen"])
    for call in calls(options.batch, options.seconds):
        report.row(table_row(call))


if __name__ == "__main__":
    main()
