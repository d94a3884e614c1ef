"""The search of a codebook for the code that is nearest to a vector."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from mimi_jax.ops.tensor_cores import on_tensor_cores


def first_argmax(x: jax.Array) -> jax.Array:
    """Where each last axis is greatest, the first place if there are several: int32.

    On CPUs it takes half the time of `jnp.argmax`, which XLA does not vectorize.
    """
    is_greatest = x == jnp.max(x, axis=-1, keepdims=True)
    indices = lax.broadcasted_iota(jnp.int32, x.shape, x.ndim - 1)
    # Nothing is greatest among NaN, and the index must still be a valid one.
    last = x.shape[-1] - 1
    return jnp.min(jnp.where(is_greatest, indices, last), axis=-1)


def plain_search(vectors: jax.Array, embedding: jax.Array, half_square: jax.Array) -> jax.Array:
    """Find the nearest codes, the first one if several are equally near.

    Args:
        vectors: float32 [..., dim].
        embedding: float32 [codebook_size, dim].
        half_square: float32 [codebook_size], half the squared norm of each embedding.

    Returns:
        int32 [...].
    """
    half_square = jnp.expand_dims(half_square, range(vectors.ndim - 1))
    # |v - e|^2 / 2 without the part that is the same for every e, and negated.
    return first_argmax(vectors @ embedding.T - half_square)


def search_in_one_pass(vectors: jax.Array, embedding: jax.Array, half_square: jax.Array) -> jax.Array:
    """`plain_search` for TPUs: XLA computes the argmax with the product, and writes out no distances.

    For NaN, it finds another code than `plain_search`. Neither has a meaning.
    """
    half_square = jnp.expand_dims(half_square, range(vectors.ndim - 1))
    return lax.argmax(vectors @ embedding.T - half_square, vectors.ndim - 1, jnp.int32)


SEARCHES: dict[str, Callable[..., jax.Array]] = {
    "plain": plain_search,
    "one_pass": search_in_one_pass,
    "tensor_cores": on_tensor_cores(plain_search),
}
