"""Products and convolutions of few rows, as in a step of one stream, for XLA:GPU.

Device kernels that compute so little take longer to start than to run. So these are written such that XLA
makes few device kernels of them, all of which a CUDA graph can hold.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

Step = Callable[[Any, Any], tuple[Any, Any]]

# XLA passes at least so many rows to cuBLAS as they are. It pads fewer rows first, in a device kernel of its
# own.
ENOUGH_ROWS = 8
FEW_ROWS = range(1, ENOUGH_ROWS)


def product_of_repeated_rows(x: jax.Array, kernel: jax.Array, dimension_numbers, **options) -> jax.Array:
    """Repeat the rows until there are enough. The device kernel that computes `x` writes them too."""
    *axes, size = x.shape
    rows = x.reshape(-1, 1, size)
    repeated = jnp.broadcast_to(rows, (len(rows), -(-ENOUGH_ROWS // len(rows)), size))
    options["preferred_element_type"] = jnp.float32
    y = lax.dot_general(repeated.reshape(-1, size), kernel, (((1,), (0,)), ((), ())), **options)
    y = y.reshape(*repeated.shape[:2], kernel.shape[1])[:, 0]
    return y.reshape(*axes, kernel.shape[1]).astype(x.dtype)


def product_as_sums(x: jax.Array, *kernels: jax.Array) -> jax.Array:
    """Multiply [..., in] with kernels [in, out] side by side, by multiplications and sums in float32.

    XLA:GPU computes them in one device kernel with the norm that gives `x`. The kernels are not copied.
    """
    kernel = jnp.concatenate(kernels, axis=1).astype(jnp.float32)
    rows = x.reshape(-1, x.shape[-1]).T.astype(jnp.float32)
    sums = jnp.sum(rows[:, :, None] * kernel[:, None], axis=0)
    return sums.reshape(*x.shape[:-1], kernel.shape[1]).astype(x.dtype)


def convolution_by_windows(
    x: jax.Array, kernel: jax.Array, *, stride: int = 1, dilation: int = 1
) -> jax.Array:
    """Compute one product: what each output sees, side by side, and all taps of the kernel.

    A CUDA graph can hold products, and it cannot hold cuDNN's convolutions.
    """
    taps, size_in, size_out = kernel.shape
    steps = (x.shape[1] - (taps - 1) * dilation - 1) // stride + 1
    last = (steps - 1) * stride + 1
    parts = [x[:, start : start + last : stride] for start in range(0, taps * dilation, dilation)]
    if size_in == 1:  # of a waveform, a product would be too narrow
        taps_in_float32 = kernel.astype(jnp.float32)[:, None]
        total = sum(part.astype(jnp.float32) * tap for part, tap in zip(parts, taps_in_float32, strict=True))
        return jnp.asarray(total).astype(x.dtype)
    windows = jnp.concatenate(parts, axis=-1)
    few = windows.shape[0] * steps in FEW_ROWS
    product = product_of_repeated_rows if few else lax.dot_general
    y = product(
        windows,
        kernel.reshape(taps * size_in, size_out),
        (((2,), (0,)), ((), ())),
        preferred_element_type=jnp.float32,
    )
    return y.astype(x.dtype)


def scan_in_a_loop(init: jax.Array, *, function: Step, xs: Any) -> tuple[Any, Any]:
    return lax.scan(function, init, xs)


def scan_unrolled(init: jax.Array, *, function: Step, xs: Any) -> tuple[Any, Any]:
    """`lax.scan` without a loop. What is a NumPy array in `xs` reaches the function as a constant."""
    carry, results = init, []
    leaves, structure = jax.tree.flatten(xs)
    for level in zip(*leaves, strict=True):
        carry, result = function(carry, jax.tree.unflatten(structure, level))
        results.append(result)
    return carry, jax.tree.map(lambda *ys: jnp.stack(ys), *results)


SCANS: dict[str, Callable[..., tuple[Any, Any]]] = {"loop": scan_in_a_loop, "unrolled": scan_unrolled}
