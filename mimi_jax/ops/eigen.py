"""Gradients of convolutions as XLA:CPU gives them to Eigen, the library that computes them fast.

Eigen takes [batch, time, in] and [taps, in, out]. JAX writes gradients in other orders of these axes. XLA:CPU
rewrites them, but neither in loops such as `lax.scan`, nor in what it finds in a branch, such as those by
platform. There it computes them one number at a time, ten times slower or more (in JAX 0.10 and 0.11).
"""

import functools
from collections.abc import Callable

import jax
from jax import lax

Convolution = Callable[..., jax.Array]  # of x [batch, time, in] with a kernel [taps, in, out]


def with_gradients_for_eigen(convolution: Convolution) -> Convolution:
    """The same function, whose gradients need no rewriting."""

    def convolve(x: jax.Array, kernel: jax.Array, *, stride: int = 1, dilation: int = 1) -> jax.Array:
        call = jax.custom_jvp(functools.partial(convolution, stride=stride, dilation=dilation))
        plain = functools.partial(
            lax.conv_general_dilated, window_strides=(stride,), padding="VALID", rhs_dilation=(dilation,)
        )

        @call.defjvp
        def differentiate(primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
            (x, kernel), (dx, dkernel) = primals, tangents
            # The transposes of these two have their axes in order.
            from_x = plain(dx, kernel.swapaxes(1, 2), dimension_numbers=("NWC", "WOI", "NWC"))
            from_kernel = plain(x.T, dkernel.swapaxes(0, 1), dimension_numbers=("CWN", "IWO", "WNC"))
            return call(x, kernel), from_x + from_kernel.swapaxes(0, 1)

        return call(x, kernel)

    return convolve
