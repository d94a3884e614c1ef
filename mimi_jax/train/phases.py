"""2-D convolutions of more channels and no strides, with the results of others: faster on CPUs.

XLA writes the gradient at the input of a strided convolution as a convolution whose input has holes, which on
CPUs is a naive loop. Columns that lie a whole number of strides apart meet the same taps of the kernel. If
each such phase is a channel of its own, the stride is gone, and so are the holes.

The products of a convolution of a spectrogram, which has two channels, are too small to be fast. So it gives
two columns at once, as channels. Their kernels are the same one at two places, with zeros beside. This takes
half the time, and the gradient at the spectrogram takes a quarter.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from mimi_jax.config import ceil_div

FEW_CHANNELS = 4  # those of the spectrogram of stereo


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
    (rows, (before, after)), (_, stride), (_, length, _, filters) = padding, strides, kernel.shape
    columns = (width + before + after - length) // stride + 1  # of the result
    together = 2 if stride == 1 and channels <= FEW_CHANNELS else 1
    phases = stride * together
    taps = ceil_div(phases - stride + length, phases)  # of each phase; some may be zeros
    steps = ceil_div(columns, together) - 1 + taps
    end = steps * phases - width - before  # columns after the last that is met are cut
    x = lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), (0, 0, 0), (before, end, 0), (0, 0, 0)])
    x = x.reshape(batch, height, steps, phases * channels)
    shifted = [
        jnp.pad(kernel, [(0, 0), (shift, taps * phases - shift - length), (0, 0), (0, 0)])
        for shift in range(0, phases, stride)
    ]
    kernel = jnp.stack(shifted, axis=3).reshape(-1, taps, phases * channels, together * filters)
    y = lax.conv_general_dilated(x, kernel, (1, 1), [rows, (0, 0)], rhs_dilation=rhs_dilation, **options)
    return y.reshape(batch, y.shape[1], -1, filters)[:, :, :columns]
