"""Weight normalization (arXiv 1602.07868): a kernel as a length and a direction for each channel.

Kyutai trains all convolutions of the SEANet halves so, and publishes the kernels that come of it
("we train using weight_norm but then the weights are pre-processed for inference"). So does this package:
models have plain kernels, and only training sees the pairs.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

# The axes of a kernel over which torch's `weight_norm` takes the norm: all but the first of torch's own
# order, which is the output channel, or in a transposed convolution the input channel.
NORM_AXES = {
    3: (0, 1),  # `Conv1d`: [taps, in, out]
    4: (0, 1, 2),  # `nnx.Conv` in two dimensions: [taps, taps, in, out]
    5: (0, 3, 4),  # `ConvTranspose1d`: [2, groups, in / groups, stride, out / groups]
}


class NormalizedKernel(NamedTuple):
    """What is trained in place of a kernel, which is `length * direction / norm(direction)`."""

    length: jax.Array
    direction: jax.Array


def _norm(kernel: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.sum(kernel**2, axis=NORM_AXES[kernel.ndim], keepdims=True))


def normalize(kernel: jax.Array) -> NormalizedKernel:
    return NormalizedKernel(_norm(kernel), kernel)


def fold(weight: jax.Array | NormalizedKernel) -> jax.Array:
    """The kernel that a pair stands for; anything else as it is."""
    if isinstance(weight, NormalizedKernel):
        return weight.direction * (weight.length / _norm(weight.direction))
    return weight
