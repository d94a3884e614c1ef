"""Which implementation computes what: the one module that asks for platform, dtype, size and length.

Layers call `convolution`, `product`, `elu`, `attention`, `search` and `step`. Each of these takes an
implementation from a table in `OPERATIONS`, or from `PARTS` for whole parts of the network. To add one,
write a function with the arguments of the others, put it in its table, and say here when it is chosen. No
layer changes.

A model enters `computing(...)` around everything that it computes, as it does for the precision of products.
"""

import contextlib
import contextvars
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import lax

from mimi_jax.ops import triton_stages
from mimi_jax.ops.attention import banded_attention, reference_attention
from mimi_jax.ops.convolution import CONVOLUTIONS, ELUS, PRODUCTS
from mimi_jax.ops.fused_attention import cudnn_attention, splash_attention
from mimi_jax.ops.nearest import SEARCHES

HALF_PRECISION = (jnp.bfloat16, jnp.float16)

# Numbers of rows whose products XLA:CPU (of jaxlib 0.10) computes up to twice as fast as convolutions of one
# tap. It gives those to Eigen, and products to YNNPACK, which is better with more rows.
NARROW = range(3, 33)

FIRST_WITH_FLASH = 8.0  # compute capability of Ampere, the first GPUs that run cuDNN's flash attention


class PieceBytes(NamedTuple):
    """How many bytes the widest activations of one piece of time may take."""

    all_layers: int
    wide_layers: int  # those next to the waveform, which go over smaller pieces inside


# A CPU is bound by memory. All layers go over pieces small enough that the system need not find new buffers
# for each, and the widest layers go over pieces that fit in cache.
CPU_PIECES = PieceBytes(25_000_000, 2_500_000)
# cuDNN took no more than 2**31 elements before version 9.3, and some of its convolutions still do not.
GPU_PIECES = PieceBytes(2**31, 2**31)

StepResult = tuple[Any, jax.Array]


class Part(Protocol):
    """A part of the network: layers one after the other."""

    operation: str  # its table in `PARTS`; a part without a table is computed layer by layer

    def step_layers(self, state: Any, x: jax.Array, lengths: jax.Array | None) -> StepResult: ...


def layer_by_layer(part: Part, state: Any, x: jax.Array, lengths: jax.Array | None) -> StepResult:
    return part.step_layers(state, x, lengths)


def in_small_pieces(network: Any, state: Any, x: jax.Array, lengths: jax.Array | None) -> StepResult:
    return network.step_in_pieces(CPU_PIECES, state, x, lengths)


def in_large_pieces(network: Any, state: Any, x: jax.Array, lengths: jax.Array | None) -> StepResult:
    return network.step_in_pieces(GPU_PIECES, state, x, lengths)


def in_triton(part: Part, state: Any, x: jax.Array, lengths: jax.Array | None) -> StepResult:
    return triton_stages.step(part, state, x, lengths, capability=_compute.get().capability)


Implementations = dict[str, Callable[..., Any]]

OPERATIONS: dict[str, Implementations] = {
    "attention": {
        "reference": reference_attention,
        "banded": banded_attention,
        "cudnn": cudnn_attention,
        "splash": splash_attention,
    },
    "convolution": CONVOLUTIONS,
    "product": PRODUCTS,
    "elu": ELUS,
    "search": SEARCHES,
}
PARTS: dict[str, Implementations] = {
    "network": {
        "layers": layer_by_layer,
        "small_pieces": in_small_pieces,
        "large_pieces": in_large_pieces,
    },
    **{part: {"layers": layer_by_layer, "triton": in_triton} for part in triton_stages.PARTS},
}

# The implementation for each platform, and "default" for the others.
Choice = dict[str, str]
PART_CHOICES: dict[str, Choice] = {
    "network": {"cpu": "small_pieces", "cuda": "large_pieces", "default": "layers"},
    **{part: {"default": "layers"} for part in triton_stages.PARTS},
}


@dataclasses.dataclass(frozen=True)
class Compute:
    """What `compute=` asks for, on the machine where the model was made. Hashable: it is part of a model."""

    asked: tuple[tuple[str, str], ...] = ()  # operations, and the implementation that each must use
    fused: tuple[str, ...] = ()  # platforms whose fused device kernels may be used
    one_device: bool = False  # so that no program is partitioned between devices
    capability: int | None = None  # ten times the compute capability of NVIDIA GPUs


def resolve(compute: str | Mapping[str, str] | Compute) -> Compute:
    """Look at this machine once, when a model is made, and never while a program is traced.

    Args:
        compute: "auto" for the fastest implementations on this machine; "portable" for those in plain XLA,
            which compile for every platform; or implementations by operation, such as
            {"attention": "banded"}, and "auto" for the other operations.

    Raises:
        ValueError: naming an operation or an implementation that does not exist.
    """
    if isinstance(compute, Compute):
        return compute
    if compute == "portable":
        return PORTABLE
    tables, asked = OPERATIONS | PARTS, {}
    if isinstance(compute, Mapping):
        asked = dict(compute)
    elif compute != "auto":
        raise ValueError(
            f'compute must be "auto", "portable" or a mapping of {", ".join(tables)}, got {compute!r}'
        )
    for operation, name in asked.items():
        if operation not in tables:
            raise ValueError(f"compute names operations among {', '.join(tables)}, got {operation!r}")
        if name not in tables[operation]:
            choices = ", ".join(tables[operation])
            raise ValueError(f"compute[{operation!r}] must be one of {choices}, got {name!r}")
    device = jax.local_devices()[0]
    can_fuse = {"cuda": _has_flash_attention(device), "tpu": device.platform == "tpu"}
    fused = tuple(platform for platform, holds in can_fuse.items() if holds)
    capability = round(10 * float(device.compute_capability)) if can_fuse["cuda"] else None
    return Compute(tuple(sorted(asked.items())), fused, jax.device_count() == 1, capability)


def _has_flash_attention(device: Any) -> bool:
    try:
        return device.platform == "gpu" and float(device.compute_capability) >= FIRST_WITH_FLASH
    except (AttributeError, ValueError):  # AMD's GPUs give a name, such as "gfx942"
        return False


PORTABLE = Compute()
_compute = contextvars.ContextVar("compute", default=PORTABLE)


@contextlib.contextmanager
def computing(compute: Compute) -> Iterator[None]:
    """Choose as `compute` says in everything that is traced inside. Outside, everything is portable."""
    token = _compute.set(compute)
    try:
        yield
    finally:
        _compute.reset(token)


def _implementations(operation: str, table: Implementations, choice: Choice) -> Implementations:
    """By platform. An implementation that was asked for is used on all of them."""
    if asked := dict(_compute.get().asked).get(operation):
        choice = {"default": asked}
    return {platform: table[name] for platform, name in choice.items()}


def _call(operation: str, choice: Choice, *arrays: jax.Array, **options: Any) -> jax.Array:
    implementations = _implementations(operation, OPERATIONS[operation], choice)
    calls = {
        platform: functools.partial(function, **options) for platform, function in implementations.items()
    }
    if len(calls) == 1:
        return calls["default"](*arrays)
    return lax.platform_dependent(*arrays, **calls)


def convolution(x: jax.Array, kernel: jax.Array, *, stride: int = 1, dilation: int = 1) -> jax.Array:
    """Convolve x [batch, time, in] with kernel [taps, in, out], without padding."""
    choice = {"default": "plain"}
    if x.dtype in HALF_PRECISION and kernel.shape[0] % stride == 0 and dilation == 1:
        choice["cpu"] = "strides"  # XLA:CPU has no convolutions in half precision
    return _call("convolution", choice, x, kernel, stride=stride, dilation=dilation)


def product(x: jax.Array, kernel: jax.Array, dimension_numbers: Any, **options: Any) -> jax.Array:
    """Multiply activations [..., in] with a kernel [in, out], called as `nnx.Linear` calls `dot_general`."""
    choice = {"default": "plain"}
    if x.dtype in HALF_PRECISION:
        choice["cpu"] = "float32_sums"  # several times as fast there
    elif x[..., 0].size in NARROW:
        choice["cpu"] = "convolution"
    return _call("product", choice, x, kernel, dimension_numbers=dimension_numbers, **options)


def elu(x: jax.Array) -> jax.Array:
    """ELU. In half precision the rounding of the faster way would be too coarse."""
    return _call("elu", {"default": "plain" if x.dtype in HALF_PRECISION else "exp"}, x)


def attention(query: jax.Array, key: jax.Array, value: jax.Array, *, window: int) -> jax.Array:
    """Attend over whole clips; `mimi_jax.ops.attention` gives the shapes."""
    # Windows pay as soon as they leave out more keys than they add.
    choice = {"default": "banded" if query.shape[1] > 2 * window else "reference"}
    compute = _compute.get()
    # Fused device kernels compute in nothing else, and may not take an empty batch.
    if query.dtype in HALF_PRECISION and query.size:
        if "cuda" in compute.fused:
            choice["cuda"] = "cudnn"
        if "tpu" in compute.fused and (compute.one_device or _is_divided_by_hand(query)):
            choice["tpu"] = "splash"
    return _call("attention", choice, query, key, value, window=window)


def _is_divided_by_hand(x: jax.Array) -> bool:
    """Whether this is traced inside a `shard_map` that does not check how results differ by device."""
    manual = jax.sharding.get_abstract_mesh().manual_axes
    return bool(manual) and not jax.typeof(x).manual_axis_type.varying


def search(vectors: jax.Array, embedding: jax.Array, half_square: jax.Array) -> jax.Array:
    """Find the nearest codes of one codebook; `mimi_jax.ops.nearest` gives the shapes."""
    return _call("search", {"default": "plain"}, vectors, embedding, half_square)


def step(part: Part, state: Any, x: jax.Array, lengths: jax.Array | None) -> StepResult:
    """Step a part of the network. Gradients are those of the part computed layer by layer."""
    if part.operation not in PARTS:
        return part.step_layers(state, x, lengths)
    implementations = _implementations(part.operation, PARTS[part.operation], part_choice(part, x))
    precision: str | None = jax.config.jax_default_matmul_precision  # pyright: ignore[reportAttributeAccessIssue]
    context = _Context(_compute.get(), precision)
    return _step(implementations, context, part, state, x, lengths)


def part_choice(part: Part, x: jax.Array) -> Choice:
    """What a part of the network is computed by, for each platform."""
    compute, choice = _compute.get(), PART_CHOICES[part.operation]
    if (
        "triton" in PARTS[part.operation]
        and "cuda" in compute.fused
        and (compute.one_device or _is_divided_by_hand(x))  # the compiler cannot partition it
        and triton_stages.fits(part, x)
        and triton_stages.is_available()
    ):
        return choice | {"cuda": "triton"}
    return choice


class _Context(NamedTuple):
    """What holds where a part is called. JAX traces the rule of its gradient later, outside of that."""

    compute: Compute
    precision: str | None


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _step(implementations: Implementations, _: _Context, part: Part, *inputs: Any) -> StepResult:
    calls = {platform: functools.partial(call, part) for platform, call in implementations.items()}
    return calls["default"](*inputs) if len(calls) == 1 else lax.platform_dependent(*inputs, **calls)


@_step.defjvp
def _step_layers(_: Implementations, context: _Context, primals: tuple, tangents: tuple) -> tuple[Any, Any]:
    # The way back needs all activations, and pieces would copy all of them for each piece.
    with computing(context.compute), jax.default_matmul_precision(context.precision):
        return jax.jvp(layer_by_layer, primals, tangents)
