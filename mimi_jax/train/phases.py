"""2-D convolutions with strides, as convolutions without them: their gradients are fast on CPUs.

XLA writes the gradient at the input of a strided convolution as a convolution whose input has holes, which on
CPUs is a naive loop. Columns that lie a whole number of strides apart meet the same taps of the kernel. If
each such phase is a channel of its own, the stride is gone, and so are the holes.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from mimi_jax.config import ceil_div


def conv_general_dilated(
    x: jax.Array, kernel: jax.Array, strides: Any, padding: Any, *, rhs_dilation: Any, **options: Any
) -> jax.Array:
    """`lax.conv_general_dilated` for `nnx.Conv`, where columns have a stride and rows do not.

    Args:
        x: [batch, rows, columns, channels].
        kernel: [rows, columns, channels of x, channels of the result].
        strides: (1, stride).
        padding: zeros before and after the rows, and before and after the columns.
        rhs_dilation: (dilation, 1).
        options: as in `lax`.
    """
    batch, height, width, channels = x.shape
    (rows, (before, after)), (_, stride) = padding, strides
    taps = ceil_div(kernel.shape[1], stride)  # of each phase; the last may be a zero
    steps = (width + before + after - kernel.shape[1]) // stride + taps
    end = steps * stride - width - before  # columns after the last that is met are cut
    x = lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), (0, 0, 0), (before, end, 0), (0, 0, 0)])
    x = x.reshape(batch, height, steps, stride * channels)
    kernel = jnp.pad(kernel, [(0, 0), (0, taps * stride - kernel.shape[1]), (0, 0), (0, 0)])
    kernel = kernel.reshape(kernel.shape[0], taps, stride * channels, kernel.shape[3])
    return lax.conv_general_dilated(x, kernel, (1, 1), [rows, (0, 0)], rhs_dilation=rhs_dilation, **options)
