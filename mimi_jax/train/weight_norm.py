"""Weight normalization (arXiv 1602.07868): a kernel as a length and a direction for each channel.

Kyutai trains all convolutions of SEANet this way and publishes ordinary kernels ("we train using weight_norm
but then the weights are pre-processed for inference"). This package does the same: models have ordinary
kernels, and only training sees lengths and directions.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

# The axes of a kernel over which torch's `weight_norm` takes the norm: all but the first axis in torch's own
# order. That axis holds the output channels, or in a transposed convolution the input channels.
NORM_AXES = {
    3: (0, 1),  # `Conv1d`: [taps, in, out]
    4: (0, 1, 2),  # `nnx.Conv` in two dimensions: [taps, taps, in, out]
    5: (0, 3, 4),  # `ConvTranspose1d`: [2, groups, in / groups, stride, out / groups]
}


class NormalizedKernel(NamedTuple):
    """Trained in place of the kernel `length * direction / norm(direction)`."""

    length: jax.Array
    direction: jax.Array


def _norm(kernel: jax.Array) -> jax.Array:
    squares = jnp.sum(kernel**2, axis=NORM_AXES[kernel.ndim], keepdims=True)
    return jnp.sqrt(jnp.maximum(squares, 1e-30))  # a channel of zeros has no direction to divide by


def normalize(kernel: jax.Array) -> NormalizedKernel:
    """A length and a direction that stand for this kernel."""
    return NormalizedKernel(_norm(kernel), kernel)


def fold(weight: jax.Array | NormalizedKernel) -> jax.Array:
    """The kernel that a length and a direction stand for. An array is returned as it is."""
    if isinstance(weight, NormalizedKernel):
        return weight.direction * (weight.length / _norm(weight.direction))
    return weight
