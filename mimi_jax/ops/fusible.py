"""What XLA:GPU fuses with its neighbours, so that fewer activations are written to memory and read back.

It fuses operations on single elements, reductions and padding, but not what cuDNN and cuBLAS compute, and a
concatenation only if it is the last operation. It computes a cheap operation again for each use, and writes
an expensive one once. So these are cheap.
"""

import jax
import jax.numpy as jnp


def convolution_by_multiply_adds(
    x: jax.Array, kernel: jax.Array, *, stride: int = 1, dilation: int = 1
) -> jax.Array:
    """Multiply and add element by element, with float32 sums. This pays with few inputs or few outputs.

    XLA fuses it with what comes before and after it, so that its inputs or outputs need no memory.
    """
    x, kernel, dtype = x.astype(jnp.float32), kernel.astype(jnp.float32), x.dtype
    total, end = jnp.zeros((), jnp.float32), x.shape[1] - (kernel.shape[0] - 1) * dilation
    for tap in range(kernel.shape[0]):
        start = tap * dilation
        total += x[:, start : start + end : stride, :, None] * kernel[tap][None, None]
    return jnp.sum(total, axis=2).astype(dtype)


def join_by_sum(past: jax.Array, x: jax.Array) -> jax.Array:
    """Add both, padded with zeros to the length of the result: XLA:GPU fuses that into a reduction.

    It would write what is concatenated to memory.
    """
    after, before = (((0, 0), pad, (0, 0)) for pad in ((0, x.shape[1]), (past.shape[1], 0)))
    return jnp.pad(past, after) + jnp.pad(x, before)


def elu_by_min_max(x: jax.Array) -> jax.Array:
    """ELU in float32 without a choice, so cheap that XLA:GPU fuses it into convolutions by multiply-adds."""
    y = x.astype(jnp.float32)
    return (jnp.maximum(y, 0) + (jnp.exp(jnp.minimum(y, 0)) - 1)).astype(x.dtype)
