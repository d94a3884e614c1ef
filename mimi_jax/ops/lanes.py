"""Heads of attention side by side, for TPUs.

A row of a TPU's registers has 128 lanes, and a head may be narrower. XLA keeps an array of narrow heads
transposed. To write one slot into a ring of them, it would copy the whole ring to another form and back. If
heads fill the lanes, it writes a slot in place.

A group of heads then is one wide head. A query of one of them is zero in the channels of the others, and of
what it finds, its own channels are kept. The products with zeros fill lanes that would be empty.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

SUBLANES, LANES = 8, 128  # the rows of a register, and the numbers in a row


def heads_in_lanes(num_heads: int, head_dim: int) -> int:
    """How many heads lie side by side: as many as the lanes hold, if they divide all heads."""
    counts = [n for n in range(2, num_heads + 1) if num_heads % n == 0 and n * head_dim <= LANES]
    return max(counts, default=1)


# How many heads the ring of a stream holds side by side.
RINGS: dict[str, Callable[[int, int], int]] = {
    "heads": lambda num_heads, head_dim: 1,
    "lanes": heads_in_lanes,
}


def widen(query: jax.Array, count: int, groups: int) -> jax.Array:
    """Write each query into the channels of its own head, with zeros in those of the other heads.

    Args:
        query: [..., heads, head_dim].
        count: how many heads of keys lie side by side.
        groups: how many queries share a head of keys.

    Returns:
        [..., heads, count * head_dim].
    """
    *axes, heads, head_dim = query.shape
    query = jnp.where(_own(count), query.reshape(*axes, -1, count, groups, 1, head_dim), 0)
    return query.reshape(*axes, heads, count * head_dim)


def narrow(out: jax.Array, count: int, groups: int) -> jax.Array:
    """Keep the channels of each query's own head, the inverse of `widen`."""
    *axes, heads, width = out.shape
    out = jnp.where(_own(count), out.reshape(*axes, -1, count, groups, count, width // count), 0)
    return jnp.sum(out, axis=-2).reshape(*axes, heads, width // count)


def scores_of_two_rounds(keys: jax.Array, queries: jax.Array, before: jax.Array) -> jax.Array:
    """Multiply queries with the keys of the ring, some of which are of the round before.

    Queries are rotated for either round. In a short step both products are computed, and one of them is kept.
    In a long step, they are larger than the ring. There the keys are divided by rounds.

    Args:
        keys: [batch, wide_heads, slots, wide_head_dim].
        queries: [batch, wide_heads, groups, 2, time, wide_head_dim], rotated for either round.
        before: bool [batch, slots], which keys are of the round before.

    Returns:
        float32 [batch, wide_heads, groups, time, slots].
    """
    _, _, groups, _, time, width = queries.shape
    if groups * time * 4 <= 2 * width * keys.dtype.itemsize:
        scores = jnp.einsum("bhsd,bhgrtd->bhgrts", keys, queries, preferred_element_type=jnp.float32)
        return jnp.where(before[:, None, None, None], scores[:, :, :, 1], scores[:, :, :, 0])
    before = before[:, None, :, None]
    keys = jnp.concatenate([jnp.where(before, 0, keys), jnp.where(before, keys, 0)], axis=-1)
    queries = jnp.concatenate([queries[:, :, :, 0], queries[:, :, :, 1]], axis=-1)
    return jnp.einsum("bhgtd,bhsd->bhgts", queries, keys, preferred_element_type=jnp.float32)


def write_slots(ring: jax.Array, new: jax.Array, positions: jax.Array) -> jax.Array:
    """Write steps into their slots, each group of heads by itself, so that the ring keeps its form.

    Args:
        ring: [batch, wide_heads, slots, wide_head_dim].
        new: [batch, time, heads, head_dim].
        positions: int [batch, time], the slots; steps beyond the ring are left out.
    """
    batch, wide_heads, _, width = ring.shape
    rows, group = jnp.arange(batch, dtype=jnp.int32), jnp.arange(wide_heads, dtype=jnp.int32)
    new = new.reshape(*positions.shape, wide_heads, width)
    places = rows[:, None, None], group[None, None], positions[:, :, None]
    return ring.at[places].set(new, mode="drop")


def _own(count: int) -> np.ndarray:
    """Which channels belong to which head: bool [count, 1, count, 1]."""
    return np.eye(count, dtype=bool)[:, None, :, None]
