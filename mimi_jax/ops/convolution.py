"""Convolutions, what they see, products and ELU, each in several ways that give the same numbers.

The first way of each table is the plain one, to which tests compare the others. `policy` chooses.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from mimi_jax.ops.eigen import with_gradients_for_eigen
from mimi_jax.ops.fusible import convolution_by_multiply_adds, elu_by_min_max, join_by_sum
from mimi_jax.ops.tensor_cores import convolution_by_shifts, on_tensor_cores


def plain_convolution(x: jax.Array, kernel: jax.Array, *, stride: int = 1, dilation: int = 1) -> jax.Array:
    """Convolve x [batch, time, in] with kernel [taps, in, out], without padding."""
    return lax.conv_general_dilated(
        x, kernel, (stride,), "VALID", rhs_dilation=(dilation,), dimension_numbers=("NWC", "WIO", "NWC")
    )


def convolution_by_strides(
    x: jax.Array, kernel: jax.Array, *, stride: int = 1, dilation: int = 1
) -> jax.Array:
    """Compute one product for each stride of the kernel, with float32 sums.

    Raises:
        ValueError: the kernel is dilated, or its taps are not a multiple of the stride.
    """
    taps, size_in, size_out = kernel.shape
    if taps % stride or dilation > 1:
        raise ValueError(f"{taps=} must be a multiple of {stride=}, and {dilation=} must be 1")
    batch, time, _ = x.shape
    parts, steps = taps // stride, (time - taps) // stride + 1
    kernel = kernel.reshape(parts, stride * size_in, size_out)
    total = jnp.zeros((), jnp.float32)
    for part in range(parts):
        strides = x[:, part * stride : (part + steps) * stride].reshape(batch, steps, stride * size_in)
        total += jnp.matmul(strides, kernel[part], preferred_element_type=jnp.float32)
    return total.astype(x.dtype)


JOINS: dict[str, Callable[..., jax.Array]] = {
    "plain": lambda past, x: jnp.concatenate([past, x], axis=1),
    "sum": join_by_sum,
}


# Products of activations [..., in] and a kernel [in, out], as `nnx.Linear` asks `lax.dot_general` for them.


def product_with_float32_sums(x: jax.Array, kernel: jax.Array, dimension_numbers, **options) -> jax.Array:
    """Add up in float32, as GPUs and TPUs do by themselves, and round the sums to the dtype of `x`."""
    options["preferred_element_type"] = jnp.float32
    return lax.dot_general(x, kernel, dimension_numbers, **options).astype(x.dtype)


def product_as_convolution(x: jax.Array, kernel: jax.Array, dimension_numbers=None, **options) -> jax.Array:
    """Call the product a convolution of one tap, which XLA:CPU gives to another library."""
    y = plain_convolution(x.reshape(1, math.prod(x.shape[:-1]), x.shape[-1]), kernel[None])
    return y.reshape(*x.shape[:-1], kernel.shape[1])


CONVOLUTIONS: dict[str, Callable[..., jax.Array]] = {
    "plain": plain_convolution,
    "gradients_for_eigen": with_gradients_for_eigen(plain_convolution),
    "strides": convolution_by_strides,
    "tensor_cores": on_tensor_cores(convolution_by_shifts),
    "multiply_adds": with_gradients_for_eigen(convolution_by_multiply_adds),
    "shifts": with_gradients_for_eigen(
        functools.partial(convolution_by_shifts, product=product_as_convolution)
    ),
}

PRODUCTS: dict[str, Callable[..., jax.Array]] = {
    "plain": lax.dot_general,
    "float32_sums": product_with_float32_sums,
    "convolution": product_as_convolution,
    "tensor_cores": on_tensor_cores(lax.dot_general),
}


def elu_by_exp(x: jax.Array) -> jax.Array:
    """ELU from an exponential, which XLA:CPU computes in half the time of `expm1`.

    Near zero it is less exact than `expm1` by what 1 is rounded by in the dtype of `x`.
    """
    return jnp.where(x > 0, x, jnp.exp(jnp.where(x > 0, 0, x)) - 1)


def elu_in_float32(x: jax.Array) -> jax.Array:
    """ELU in half precision, rounded once: XLA:CPU computes `expm1` one number at a time, and `exp` 8 or 16.

    Near zero, where exp(x) - 1 loses digits, the first terms of its series are exact to float32.
    """
    y = x.astype(jnp.float32)
    negative = jnp.where(y > 0, 0, y)
    near_zero = negative + negative**2 / 2 + negative**3 / 6
    below = jnp.where(negative > -(2**-6), near_zero, jnp.exp(negative) - 1)
    return jnp.where(y > 0, y, below).astype(x.dtype)


ELUS: dict[str, Callable[..., jax.Array]] = {
    "plain": jax.nn.elu,
    "exp": elu_by_exp,
    "float32": elu_in_float32,
    "min_max": elu_by_min_max,
}
