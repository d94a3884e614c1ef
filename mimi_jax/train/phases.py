"""2-D convolutions of more channels and no strides, with the results of others: faster on CPUs.

XLA writes the gradient at the input of a strided convolution as a convolution whose input has holes, which on
CPUs is a naive loop. Columns that lie a whole number of strides apart meet the same taps of the kernel. If
each such phase is a channel of its own, the stride is gone, and so are the holes.

The products of a convolution of a spectrogram, which has two channels, are too small to be fast. So it gives
several columns at once, as channels. Their kernels are the same one at several places, with zeros beside. Two
columns take half the time of one, and the gradient at the spectrogram takes a third with eight.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from mimi_jax.config import ceil_div

FEW_CHANNELS = 4  # those of the spectrogram of stereo
COLUMNS, COLUMNS_BACK = 2, 8  # at once, for a result of few channels and for the gradient at its input


def conv_general_dilated(
    x: jax.Array, kernel: jax.Array, strides: Any, padding: Any, **options: Any
) -> jax.Array:
    """`lax.conv_general_dilated` for `nnx.Conv`, where columns have a stride and rows do not.

    Args:
        x: [batch, rows, columns, channels].
        kernel: [rows, columns, channels of x, channels of the result].
        strides: (1, stride).
        padding: zeros before and after the rows, and before and after the columns.
        options: as in `lax`; `rhs_dilation` is (dilation, 1).
    """
    (rows, columns), (_, stride) = padding, strides

    def convolve(x: jax.Array, kernel: jax.Array, together: int) -> jax.Array:
        x, taps, count = _phases(x, kernel, stride, columns, together)
        y = lax.conv_general_dilated(x, taps, (1, 1), [rows, (0, 0)], **options)
        return y.reshape(*y.shape[:2], y.shape[2] * together, kernel.shape[-1])[:, :, :count]

    if stride > 1 or x.shape[-1] > FEW_CHANNELS:
        return convolve(x, kernel, 1)

    @jax.custom_jvp
    def call(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return convolve(x, kernel, COLUMNS)

    @call.defjvp
    def differentiate(primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
        (x, kernel), (dx, dkernel) = primals, tangents
        return call(x, kernel), convolve(dx, kernel, COLUMNS_BACK) + convolve(x, dkernel, COLUMNS)

    return call(x, kernel)


def _phases(
    x: jax.Array, kernel: jax.Array, stride: int, padding: tuple[int, int], together: int
) -> tuple[jax.Array, jax.Array, int]:
    """The columns of x and of the kernel with those of each phase as channels, and the number of results.

    Args:
        padding: zeros before and after the columns.
        together: how many results a column of the new convolution has, as channels.
    """
    batch, height, width, channels = x.shape
    (before, after), (_, length, _, filters) = padding, kernel.shape
    columns = (width + before + after - length) // stride + 1  # of the result
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
    return x, kernel, columns
