"""What is computed in one of several ways, all of which give the same numbers: convolutions, products, ELU
and windowed attention.

One rule says which key a query sees: `visible`. "reference" is the way to read; the other backends are
faster, on the machines and for the lengths that `attend` knows. Each takes

    query       [batch, time, heads, head_dim], rotated
    key, value  [batch, time, key_value_heads, head_dim]
    window      how many keys a query sees, its own included

and returns [batch, time, heads, head_dim].
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from mimi_jax.config import ceil_div

HALF_PRECISION = (jnp.bfloat16, jnp.float16)

# Numbers of rows whose products XLA:CPU (of jaxlib 0.10) computes up to twice as fast if they are called
# convolutions: it gives those of one tap to Eigen, and products to YNNPACK, which is better with more rows.
NARROW = range(3, 33)


def conv1d(x: jax.Array, kernel: jax.Array, *, stride: int = 1, dilation: int = 1) -> jax.Array:
    """Unpadded convolution of x [batch, time, in] with kernel [taps, in, out]."""

    def convolve(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return lax.conv_general_dilated(
            x, kernel, (stride,), "VALID", rhs_dilation=(dilation,), dimension_numbers=("NWC", "WIO", "NWC")
        )

    if x.dtype not in HALF_PRECISION or kernel.shape[0] % stride or dilation > 1:
        return convolve(x, kernel)
    # XLA:CPU has no convolutions in half precision, but products of whole strides.
    by_strides = functools.partial(_convolve_strides, stride=stride)
    return lax.platform_dependent(x, kernel, cpu=by_strides, default=convolve)


def _convolve_strides(x: jax.Array, kernel: jax.Array, *, stride: int) -> jax.Array:
    """One product for each stride of the kernel, with float32 sums."""
    batch, time, size_in = x.shape
    parts, size_out = kernel.shape[0] // stride, kernel.shape[2]
    steps = (time - kernel.shape[0]) // stride + 1
    kernel = kernel.reshape(parts, stride * size_in, size_out)
    total = jnp.zeros((), jnp.float32)
    for part in range(parts):
        strides = x[:, part * stride : (part + steps) * stride].reshape(batch, steps, stride * size_in)
        total += jnp.matmul(strides, kernel[part], preferred_element_type=jnp.float32)
    return total.astype(x.dtype)


def elu(x: jax.Array) -> jax.Array:
    """`jax.nn.elu`. XLA:CPU takes half as long for an exponential as for `expm1`, which is more exact near
    zero by what 1 is rounded by in float32, but by much more in half precision."""
    if x.dtype in HALF_PRECISION:
        return jax.nn.elu(x)
    return jnp.where(x > 0, x, jnp.exp(jnp.where(x > 0, 0, x)) - 1)


def dot_general(x: jax.Array, y: jax.Array, dimensions, **options) -> jax.Array:
    """`lax.dot_general` of activations [..., in] and a kernel [in, out], as `nnx.Linear` calls it.

    With float32 sums, as GPUs and TPUs have; XLA:CPU is also several times faster so.
    """

    def with_float32_sums(x: jax.Array, y: jax.Array) -> jax.Array:
        options["preferred_element_type"] = jnp.float32
        return lax.dot_general(x, y, dimensions, **options).astype(x.dtype)

    def as_convolution(x: jax.Array, y: jax.Array) -> jax.Array:
        return conv1d(x.reshape(1, -1, x.shape[-1]), y[None]).reshape(*x.shape[:-1], y.shape[1])

    default = functools.partial(lax.dot_general, dimension_numbers=dimensions, **options)
    if x.dtype in HALF_PRECISION:
        return lax.platform_dependent(x, y, cpu=with_float32_sums, default=default)
    if x[..., 0].size in NARROW:
        return lax.platform_dependent(x, y, cpu=as_convolution, default=default)
    return default(x, y)


def visible(
    query_positions: jax.Array, key_positions: jax.Array, first_position: jax.Array | int, window: int
) -> jax.Array:
    """Whether a query sees a key: one of the `window` newest, itself included, that exist."""
    distance = query_positions - key_positions
    return (distance >= 0) & (distance < window) & (key_positions >= first_position)


def _attend(query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array) -> jax.Array:
    """Softmax attention of [..., time, heads, head_dim] under a mask [..., queries, keys]."""
    *rest, heads, head_dim = query.shape
    key_value_heads = key.shape[-2]
    grouped = query.reshape(*rest, key_value_heads, heads // key_value_heads, head_dim)
    scores = jnp.einsum("...qhgd,...khd->...hgqk", grouped, key, preferred_element_type=jnp.float32)
    scores = jnp.where(mask[..., None, None, :, :], scores / math.sqrt(head_dim), -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    return jnp.einsum("...hgqk,...khd->...qhgd", weights, value).reshape(query.shape)


def reference_attention(query, key, value, *, window):
    """Every query against every key: O(time^2), and the definition the others are tested against."""
    positions = jnp.arange(query.shape[1])
    return _attend(query, key, value, visible(positions[:, None], positions[None, :], 0, window))


def banded_attention(query, key, value, *, window):
    """Queries in blocks of `window`, each against its own and the block before: O(time * window)."""
    batch, time, heads, head_dim = query.shape
    num_blocks = ceil_div(time, window)
    after = num_blocks * window - time
    query = jnp.pad(query, ((0, 0), (0, after), (0, 0), (0, 0)))
    query = query.reshape(batch, num_blocks, window, heads, head_dim)

    def with_block_before(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, ((0, 0), (window, after), (0, 0), (0, 0)))
        x = x.reshape(batch, num_blocks + 1, window, *x.shape[2:])
        return jnp.concatenate([x[:, :-1], x[:, 1:]], axis=2)

    positions = jnp.arange(num_blocks)[:, None, None] * window + jnp.arange(-window, window)
    mask = visible(positions[:, 0, window:, None], positions, 0, window)
    out = _attend(query, with_block_before(key), with_block_before(value), mask)
    return out.reshape(batch, num_blocks * window, heads, head_dim)[:, :time]


def cudnn_attention(query, key, value, *, window):
    """cuDNN's flash attention: NVIDIA GPUs, bfloat16 or float16."""
    # Its window does not count the query's own key; without `is_causal` it may see the future (jax #39576).
    return jax.nn.dot_product_attention(
        query, key, value, is_causal=True, local_window_size=(window - 1, 0), implementation="cudnn"
    )


def splash_attention(query, key, value, *, window, interpret=False):
    """The Pallas kernel for TPUs; `interpret` runs it anywhere, slowly.

    It cannot be partitioned by the compiler: on several chips call it inside `shard_map`, which must be told
    not to check how its results differ between devices (`check_vma=False`).
    """
    # Imported here: Pallas takes a second, and only TPUs need it.
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        BlockSizes,
        LocalMask,
        MultiHeadMask,
        make_splash_mha_single_device,
    )

    _, time, heads, head_dim = query.shape
    blocks = BlockSizes.get_default()
    after = -time % blocks.block_q  # padding, which comes last, so no real query sees it
    query, key, value = (
        jnp.swapaxes(jnp.pad(x, ((0, 0), (0, after), (0, 0), (0, 0))), 1, 2)
        for x in (query / math.sqrt(head_dim), key, value)
    )
    mask = MultiHeadMask([LocalMask((time + after, time + after), (window - 1, 0), 0)] * heads)
    kernel = make_splash_mha_single_device(mask, block_sizes=blocks, interpret=interpret)
    out: Any = jax.vmap(kernel)(query, key, value)  # an array, unless it is asked for residuals too
    return jnp.swapaxes(out, 1, 2)[:, :time]


BACKENDS: dict[str, Callable[..., jax.Array]] = {
    "reference": reference_attention,
    "banded": banded_attention,
    "cudnn": cudnn_attention,
    "splash": splash_attention,
}


FIRST_WITH_FLASH = 8.0  # compute capability: Ampere


def choose_backend(time: int, window: int) -> str:
    """The faster of the two that work on every platform, in every dtype.

    Blocks pay as soon as they leave out more keys than they add.
    """
    return "banded" if time > 2 * window else "reference"


def attend(query: jax.Array, key: jax.Array, value: jax.Array, *, window: int) -> jax.Array:
    """The fastest way for these inputs on this machine: fused kernels compute in half precision only."""
    choices = {"default": functools.partial(BACKENDS[choose_backend(query.shape[1], window)], window=window)}
    device = jax.local_devices()[0]
    if query.dtype in HALF_PRECISION:
        if device.platform == "gpu" and float(getattr(device, "compute_capability", 0)) >= FIRST_WITH_FLASH:
            choices["cuda"] = functools.partial(cudnn_attention, window=window)
        in_shard_map = (
            jax.sharding.get_abstract_mesh().manual_axes and not jax.typeof(query).manual_axis_type.varying
        )
        if device.platform == "tpu" and (jax.device_count() == 1 or in_shard_map):
            choices["tpu"] = functools.partial(splash_attention, window=window)
    return lax.platform_dependent(query, key, value, **choices)
