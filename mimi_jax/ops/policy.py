"""Which implementation computes what: the one module that asks for platform, dtype, size and length.

Layers call its functions, such as `convolution`, `elu` and `step`. Each of these takes an implementation
from a table in `OPERATIONS`, or from `PARTS` for whole parts of the network. To add one,
write a function with the arguments of the others, put it in its table, and say here when it is chosen. No
layer changes.

A model enters `computing(...)` around everything that it computes, with the precision of its products.
"""

import contextlib
import contextvars
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from mimi_jax.ops import few_rows, triton_stages
from mimi_jax.ops.attention import banded_attention, reference_attention
from mimi_jax.ops.convolution import CONVOLUTIONS, ELUS, JOINS, PRODUCTS
from mimi_jax.ops.fused_attention import CUDNN_HEAD_DIMS, cudnn_attention, splash_attention
from mimi_jax.ops.lanes import LANES, RINGS, SUBLANES
from mimi_jax.ops.nearest import SEARCHES
from mimi_jax.ops.parts import (
    WAYS_BACK,
    Part,
    StepResult,
    in_few_passes,
    in_few_rows,
    in_large_pieces,
    in_pallas,
    in_rows,
    in_small_pieces,
    layer_by_layer,
)
from mimi_jax.ops.tensor_cores import FAST, are_exact, capability_of

HALF_PRECISION = (jnp.bfloat16, jnp.float16)

# Numbers of rows whose products XLA:CPU (of jaxlib 0.10) computes up to twice as fast as convolutions of one
# tap. It gives those to Eigen, and products to YNNPACK, which is better with more rows.
NARROW = range(3, 33)

# With so few outputs, most of Eigen's time goes into moving inputs, and one product for all taps moves fewer.
FEW_OUTPUTS = range(1, 9)

# In half precision, "strides" makes XLA:CPU copy the kernel once for each of its strides. With so few outputs
# this takes longer than to copy inputs, as "windows" does.
FEW_STRIDES = range(1, 2**7 + 1)

# A streaming step has so few positions and frames, in all rows together, and should be one CUDA graph. Such a
# graph can hold neither cuDNN's convolutions nor loops. Products of windows move more bytes, so whole clips
# keep cuDNN.
STEP_POSITIONS, STEP_FRAMES = range(1, 2**12), range(1, 2**8)

# A step of one frame stays in the VMEM of a TPU, in rows or not. If its last layers are in rows, XLA moves
# whole rings of keys there and back. In longer steps, rows move fewer bytes.
SHORT_STEP = range(1, 2**9)

# What the float32 units of an H100 compute while its memory moves a byte: 67 TFLOP/s by 3.35 TB/s. With fewer
# operations a byte, memory is the limit of a product, and tensor cores do not help.
FLOPS_PER_BYTE = 20
# A convolution as a product writes out a result for each stride of its kernel. This pays if each is a sum of
# many numbers: of 135 by data sheets of the H100. This number leaves room for slow products. It is a guess.
MIN_SUMMANDS = 512

EXACT = ("highest", "float32")  # the precision of float32 products in JAX's words, and an alias
PLAIN_FLOAT32 = "F32_F32_F32"  # those of float32 units, as in `jax.lax.DotAlgorithmPreset`
FIRST_FUSED = 80  # Ampere, the first GPUs that run cuDNN's flash attention


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
    "convolution": CONVOLUTIONS | {"windows": few_rows.convolution_by_windows},
    "join": JOINS,
    "product": PRODUCTS | {"repeated_rows": few_rows.product_of_repeated_rows},
    "elu": ELUS,
    "search": SEARCHES,
    "scan": few_rows.SCANS,
    "ring": RINGS,
}
STAGES: Implementations = {"layers": layer_by_layer, "rows": in_rows, "triton": in_triton}
ENDS = STAGES | {"few_passes": in_few_passes, "pallas": in_pallas}
PARTS: dict[str, Implementations] = {
    "network": {"layers": layer_by_layer, "small_pieces": in_small_pieces, "large_pieces": in_large_pieces},
    "encoder_front": ENDS,
    "encoder_stage": STAGES,
    "decoder_stage": STAGES,
    "decoder_back": ENDS,
    "transformer": {"layers": layer_by_layer, "few_rows": in_few_rows},
}

# The implementation for each platform, and "default" for the others.
Choice = dict[str, str]


@dataclasses.dataclass(frozen=True)
class Compute:
    """What `compute=` asks for, on the machine where the model was made. Hashable: it is part of a model."""

    asked: tuple[tuple[str, str], ...] = ()  # operations, and the implementation that each must use
    fused: tuple[str, ...] = ()  # platforms whose fused device kernels may be used
    one_device: bool = False  # so that no program is partitioned between devices
    capability: int | None = None  # ten times the compute capability of NVIDIA GPUs
    tensor_cores: bool = False  # whether those of NVIDIA GPUs may compute products of float32


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
    capability, one_device = capability_of(device), jax.device_count() == 1
    can_fuse = {"cuda": (capability or 0) >= FIRST_FUSED, "tpu": device.platform == "tpu"}
    fused = tuple(platform for platform, holds in can_fuse.items() if holds)
    tensor_cores = one_device and capability in FAST and are_exact(device)
    return Compute(tuple(sorted(asked.items())), fused, one_device, capability, tensor_cores)


PORTABLE = Compute()
_compute = contextvars.ContextVar("compute", default=PORTABLE)


@contextlib.contextmanager
def computing(compute: Compute, precision: str | None = None) -> Iterator[None]:
    """Choose as `compute` says in everything that is traced inside. Outside, everything is portable.

    Args:
        precision: of products, as in `jax.default_matmul_precision`; None for what it is outside.
            `PLAIN_FLOAT32` is "highest" without tensor cores. JAX itself uses that name for products alone,
            and convolutions would become TF32.
    """
    if precision == PLAIN_FLOAT32:
        compute, precision = dataclasses.replace(compute, tensor_cores=False), EXACT[0]
    token = _compute.set(compute)
    try:
        with jax.default_matmul_precision(precision or _precision()):
            yield
    finally:
        _compute.reset(token)


def asking(**names: str):
    """Also use these implementations, by operation, in everything that is traced inside."""
    asked = dict(_compute.get().asked) | names
    return computing(dataclasses.replace(_compute.get(), asked=tuple(asked.items())))


def _precision() -> str | None:
    return jax.config.jax_default_matmul_precision  # pyright: ignore[reportAttributeAccessIssue]


def _exact_choice(x: jax.Array, size_in: int, size_out: int) -> Choice:
    """For the product of x, as [rows, size_in], with [size_in, size_out]: tensor cores where they help."""
    choice, rows = {"default": "plain"}, x.size // size_in
    num_bytes = 4 * (rows * size_in + size_in * size_out + rows * size_out)
    pays = 2 * rows * size_in * size_out > FLOPS_PER_BYTE * num_bytes
    if pays and _compute.get().tensor_cores and x.dtype == jnp.float32 and _precision() in EXACT:
        choice["cuda"] = "tensor_cores"
    return choice


def _on_gpus(name: str, choice: Choice) -> Choice:
    """Add `name` for NVIDIA GPUs, unless `choice` has something for them already.

    Without such a GPU nothing is added, because to trace a way that no device will take costs time.
    """
    return choice if _compute.get().capability is None else {"cuda": name} | choice


def _implementations(operation: str, table: Implementations, choice: Choice) -> Implementations:
    """By platform. An implementation that was asked for is used on all of them."""
    if asked := dict(_compute.get().asked).get(operation):
        choice = {"default": asked}
    return {platform: table[name] for platform, name in choice.items()}


def _call(operation: str, choice: Choice, *arrays: jax.Array, **options: Any) -> jax.Array:
    return _dispatch(_implementations(operation, OPERATIONS[operation], choice), *arrays, **options)


def _dispatch(implementations: Implementations, *arrays: Any, **options: Any) -> Any:
    calls = {name: functools.partial(function, **options) for name, function in implementations.items()}
    return calls["default"](*arrays) if len(calls) == 1 else lax.platform_dependent(*arrays, **calls)


def convolution(x: jax.Array, kernel: jax.Array, *, stride: int = 1, dilation: int = 1) -> jax.Array:
    """Convolve x [batch, time, in] with kernel [taps, in, out], without padding."""
    choice = {"default": "plain", "cpu": "gradients_for_eigen"}
    taps, size_in, size_out = kernel.shape
    # As a product, it has a result for each stride of the kernel, and each of these is a sum over one stride.
    if taps % stride == 0 and 1 in (stride, dilation) and stride * size_in >= MIN_SUMMANDS:
        choice |= _exact_choice(x, stride * size_in, taps // stride * size_out)
    if x.dtype in HALF_PRECISION:  # XLA:CPU has no such convolutions
        if _positions(x) // stride in FEW_STRIDES:
            choice["cpu"] = "windows"
        elif taps % stride == 0 and dilation == 1:
            choice["cpu"] = "strides"
    elif size_in == 1:  # Eigen convolves a waveform at a tenth of the speed of fused multiply-adds
        choice["cpu"] = "multiply_adds"
    elif stride == 1 and size_out in FEW_OUTPUTS:
        choice["cpu"] = "shifts"
    if _positions(x) in STEP_POSITIONS:
        choice = _on_gpus("windows", choice)
    return _call("convolution", choice, x, kernel, stride=stride, dilation=dilation)


def join(past: jax.Array, x: jax.Array) -> jax.Array:
    """Put past inputs [batch, past, channels] before those of a step, [batch, time, channels]."""
    return _call("join", {"default": "plain"}, past, x)


def product(x: jax.Array, kernel: jax.Array, dimension_numbers: Any, **options: Any) -> jax.Array:
    """Multiply activations [..., in] with a kernel [in, out], called as `nnx.Linear` calls `dot_general`."""
    choice = _exact_choice(x, *kernel.shape)
    if x.dtype in HALF_PRECISION:
        choice["cpu"] = "float32_sums"  # several times as fast there
    elif _positions(x) in NARROW:
        choice["cpu"] = "convolution"
    if _positions(x) in few_rows.FEW_ROWS:
        choice = _on_gpus("repeated_rows", choice)
    return _call("product", choice, x, kernel, dimension_numbers=dimension_numbers, **options)


def projection(x: jax.Array, kernel: jax.Array, dimension_numbers: Any, **options: Any) -> jax.Array:
    """`product` for the quantizer. On CPUs it is the same for any number of rows, as codes must be."""
    choice = _exact_choice(x, *kernel.shape)
    return _call("product", choice, x, kernel, dimension_numbers=dimension_numbers, **options)


def elu(x: jax.Array) -> jax.Array:
    """ELU. In half precision, 1 is rounded too coarsely for the faster way."""
    choice = {"default": "plain", "cpu": "float32"} if x.dtype in HALF_PRECISION else {"default": "exp"}
    return _call("elu", _on_gpus("min_max", choice), x)


def attention(query: jax.Array, key: jax.Array, value: jax.Array, *, window: int) -> jax.Array:
    """Attend over whole clips; `mimi_jax.ops.attention` gives the shapes."""
    # Windows pay as soon as they leave out more keys than they add.
    choice = {"default": "banded" if query.shape[1] > 2 * window else "reference"}
    compute = _compute.get()
    # Fused device kernels compute in nothing else, and may not take an empty batch. In float32, memory is the
    # limit of both products on an NVIDIA GPU, about as much as float32 units are, so these compute them.
    if query.dtype in HALF_PRECISION and query.size:
        if "cuda" in compute.fused and query.shape[-1] in CUDNN_HEAD_DIMS:
            choice["cuda"] = "cudnn"
        # Up to one window, there is nothing to leave out, and splash attention would pad it.
        if "tpu" in compute.fused and query.shape[1] > window and _stays_whole(query):
            choice["tpu"] = "splash"
    return _call("attention", choice, query, key, value, window=window)


def _stays_whole(x: jax.Array) -> bool:
    """Whether there is one device, or this is inside a `shard_map` that does not check how results differ.

    The compiler cannot partition device kernels of Pallas and Triton.
    """
    manual = jax.sharding.get_abstract_mesh().manual_axes
    return _compute.get().one_device or (bool(manual) and not jax.typeof(x).manual_axis_type.varying)


def search(vectors: jax.Array, embedding: jax.Array, half_square: jax.Array) -> jax.Array:
    """Find the nearest codes of one codebook; `mimi_jax.ops.nearest` gives the shapes."""
    choice = _exact_choice(vectors, *reversed(embedding.shape))
    if "tpu" in _compute.get().fused:
        choice["tpu"] = "one_pass"
    return _call("search", choice, vectors, embedding, half_square)


def scan(function: Callable[[Any, Any], tuple[Any, Any]], init: jax.Array, xs: Any) -> Any:
    """`lax.scan` over the levels of a quantizer. `init` is [batch, frames, dim]."""
    choice = {"default": "loop"}
    if init[..., 0].size in STEP_FRAMES:
        choice = _on_gpus("unrolled", choice)  # a CUDA graph cannot hold the loop
    return _call("scan", choice, init, function=function, xs=xs)


def heads_side_by_side(num_heads: int, head_dim: int) -> int:
    """How many heads of keys the ring of a stream holds side by side. All platforms share its form."""
    choice = {"default": "lanes" if "tpu" in _compute.get().fused else "heads"}
    return _implementations("ring", RINGS, choice)["default"](num_heads, head_dim)


def step(part: Part, state: Any, x: jax.Array, lengths: jax.Array | None) -> StepResult:
    """Step a part of the network. Gradients are computed layer by layer, or in rows on TPUs."""
    is_long = state is None or _positions(x) not in few_rows.FEW_ROWS
    if part.operation not in PARTS or (part.operation == "transformer" and is_long):
        return part.step_layers(state, x, lengths)
    implementations = _implementations(part.operation, PARTS[part.operation], part_choice(part, x))
    if implementations == {"default": layer_by_layer}:
        return part.step_layers(state, x, lengths)
    # JAX traces the rule of a gradient later, outside of `computing`, so both are passed on.
    context = _compute.get(), _precision()
    return _step(implementations, context, part, state, x, lengths)


def _positions(x: jax.Array) -> int:
    """In all rows of [batch, time, channels]."""
    return x.size // x.shape[-1]


def part_choice(part: Part, x: jax.Array) -> Choice:
    """What computes a part of the network, on each platform."""
    compute, table, choice = _compute.get(), PARTS[part.operation], {"default": "layers"}
    is_tpu = "tpu" in compute.fused
    if part.operation == "network":
        choice |= {"cpu": "small_pieces", "cuda": "large_pieces"}
        return choice | {"tpu": "large_pieces"} if is_tpu else choice
    if is_tpu and "rows" in table:
        return choice | _tpu_choice(part, x)
    if compute.capability is None:
        return choice
    if part.operation == "transformer":
        return choice | {"cuda": "few_rows"}
    if _positions(x) < STEP_POSITIONS.stop:
        return choice
    can_fuse = "cuda" in compute.fused and triton_stages.fits(part, x)
    if can_fuse and triton_stages.is_available(compute.capability):
        if _stays_whole(x):
            return choice | {"cuda": "triton"}
        triton_stages.say_that_programs_are_divided()
    return choice | {"cuda": "few_passes"} if "few_passes" in table else choice


def _tpu_choice(part: Any, x: jax.Array) -> Choice:
    """For stages and ends."""
    # XLA fills the rows of registers with those of the batch if these suffice. Otherwise it cuts time into as
    # many parts, and several positions a row save nothing.
    if part.channels() >= LANES or x.shape[0] < SUBLANES or not x.size or not part.fits_in_rows():
        return {}
    if "pallas" in PARTS[part.operation] and part.fits_in_pallas(x) and _stays_whole(x):
        return {"tpu": "pallas"}
    return {} if part.operation == "decoder_back" and x.shape[1] in SHORT_STEP else {"tpu": "rows"}


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _step(implementations: Implementations, _: tuple, part: Part, *inputs: Any) -> StepResult:
    calls = {platform: functools.partial(call, part) for platform, call in implementations.items()}
    return _dispatch(calls, *inputs)


def _step_back(implementations: Implementations, part: Part, *inputs: Any) -> StepResult:
    """The same, with only what can be differentiated as it is."""
    if not WAYS_BACK.keys() & set(implementations.values()):
        return layer_by_layer(part, *inputs)
    ways = {platform: WAYS_BACK.get(call, layer_by_layer) for platform, call in implementations.items()}
    return _dispatch({platform: functools.partial(way, part) for platform, way in ways.items()}, *inputs)


@_step.defjvp
def _step_jvp(
    implementations: Implementations, context: tuple, primals: tuple, tangents: tuple
) -> tuple[Any, Any]:
    with computing(*context):
        return jax.jvp(functools.partial(_step_back, implementations), primals, tangents)
