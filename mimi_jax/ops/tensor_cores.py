"""Products of float32 on the tensor cores of NVIDIA GPUs, as exact as those of float32 units.

Tensor cores round what they multiply to TF32, 11 bits. So each number is split into the 11 bits and the rest,
and three products are added up in float32: all but rest times rest, which is as small as float32's rounding.
XLA does this where a product asks for the algorithm `TF32_TF32_F32_X3` (`jax.lax.DotAlgorithmPreset`).

If XLA partitions a program between devices, it forgets the algorithm of products of two matrices (in JAX 0.10
and 0.12), and they become plain TF32. So this is for programs of one device. XLA computes a product in one
device kernel, made by Triton, or in three of cuBLAS, whichever is faster where the program is compiled.
"""

import functools
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

ALGORITHM = "TF32_TF32_F32_X3"

Product = Callable[[jax.Array, jax.Array], jax.Array]

# GPUs whose tensor cores compute three TF32 products faster than float32 units compute one. The numbers are
# ten times their compute capability: A100 (52 and 19.5 TFLOP/s in data sheets), H100 and H200 (165 and 67),
# B200 and B300 (about 370 and 78). On others they take longer: 1.5 times as long on A10, L4 and L40S, 3 times
# on RTX 3090, 4090 and 5090.
FAST = (80, 90, 100, 103)

# The largest error of products of vectors of 256 numbers, in units of the product of their norms. It is
# 2.3e-7 in float32, 2.9e-7 in this algorithm, 1.6e-6 in three products of bfloat16, and 9.3e-5 in TF32.
LARGEST_ERROR = 6e-7


def on_tensor_cores(function: Callable) -> Callable:
    """The same function, but the products in it use the algorithm."""

    @functools.wraps(function)
    def wrapped(*args: Any, **options: Any) -> Any:
        with jax.default_matmul_precision(ALGORITHM):
            return function(*args, **options)

    return wrapped


def convolution_by_shifts(
    x: jax.Array, kernel: jax.Array, *, stride: int = 1, dilation: int = 1, product: Product = jnp.matmul
) -> jax.Array:
    """Compute one product for all strides of the kernel, and add up its parts, each shifted in time.

    So x is read once and never copied, which helps CPUs too where outputs are few. Taps must be a multiple of
    the stride, and a dilated kernel must have a stride of 1.

    Args:
        product: multiplies [batch, time, in] with [in, out].
    """
    taps, size_in, size_out = kernel.shape
    batch, time, _ = x.shape
    parts, strides = taps // stride, time // stride
    x = x[:, : strides * stride].reshape(batch, strides, stride * size_in)
    kernel = jnp.swapaxes(kernel.reshape(parts, stride * size_in, size_out), 0, 1)
    products = jnp.split(product(x, kernel.reshape(stride * size_in, parts * size_out)), parts, axis=2)
    steps = strides - (parts - 1) * dilation
    shifted = [each[:, part * dilation :][:, :steps] for part, each in enumerate(products)]
    return functools.reduce(jnp.add, shifted)


def capability_of(device: Any) -> int | None:
    """Ten times the compute capability of an NVIDIA GPU; None for other devices."""
    try:
        return round(10 * float(device.compute_capability)) if device.platform == "gpu" else None
    except (AttributeError, ValueError):  # AMD's GPUs give a name, such as "gfx942"
        return None


@functools.cache
def are_exact(device: Any) -> bool:
    """Compute one product on a GPU. A compiler may take the algorithm for another one, and say nothing.

    Warns:
        RuntimeWarning: the product is not as exact as in float32.
    """
    generator = np.random.default_rng(0)
    x, kernel = (generator.standard_normal(shape, np.float32) for shape in ((1, 128, 256), (256, 512)))
    try:
        with jax.ensure_compile_time_eval():  # a model may be made while something is traced
            product = jax.jit(on_tensor_cores(jnp.matmul))(*jax.device_put((x, kernel), device))
            result = jax.device_get(product)
    except (ValueError, RuntimeError) as reason:
        return _warn(device, str(reason))
    errors = np.abs(result - x.astype(np.float64) @ kernel.astype(np.float64))
    error = np.max(errors / np.linalg.norm(x, axis=-1, keepdims=True) / np.linalg.norm(kernel, axis=0))
    return bool(error < LARGEST_ERROR) or _warn(device, f"its error is {error:.1e} and not {LARGEST_ERROR}")


def _warn(device: Any, reason: str) -> bool:
    warnings.warn(
        f"float32 products do not use the tensor cores of this {device.device_kind}, since {ALGORITHM} is not"
        f' exact here ({reason}). They are as exact, but slower. precision="F32_F32_F32" avoids this warning',
        RuntimeWarning,
        stacklevel=4,
    )
    return False
