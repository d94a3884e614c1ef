"""A Transformer's step of few rows, for XLA:GPU: the numbers of its layers, in few device kernels.

What depends on positions alone is computed once for all layers. The products that follow a norm are computed
with it, and the scores, the softmax and the sum of the values are one device kernel.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from mimi_jax.nn.attention import Attention, AttentionState, end_of_step, rotate, steps_in_ring, turns
from mimi_jax.nn.streaming import Lengths
from mimi_jax.ops.attention import visible
from mimi_jax.ops.few_rows import product_as_sums


class Clock(NamedTuple):
    """Where in the rings of all layers a step takes place."""

    written: jax.Array  # int [batch, time], the slots of the new keys; beyond the ring in idle rows
    end: jax.Array  # int [batch], the position after the step
    # The rotations [batch, time, 1, head_dim] of the keys, and of the queries for keys that were written in
    # this round of the ring or in the round before.
    key_turns: jax.Array
    near_turns: jax.Array
    far_turns: jax.Array


def step_few_rows(
    blocks: Sequence[Any], state: tuple[AttentionState, ...], x: jax.Array, lengths: Lengths
) -> tuple[tuple[AttentionState, ...], jax.Array]:
    """Step layers one after the other. The first state holds the position of all of them.

    Args:
        blocks: the layers of a `Transformer`.
        x: [batch, time, features]. There are few rows, all in all.
    """
    clock = _read_clock(blocks[0].attention, state[0].position, x.shape[1], lengths)
    new_state = ()
    for block, old in zip(blocks, state, strict=True):
        attend = functools.partial(_attend, block.attention, clock, old)
        new, x = block.step_by(attend, lambda x, block=block: product_as_sums(x, block.mlp_in.kernel[...]), x)
        new_state += (new,)
    return new_state, x


def _read_clock(attention: Attention, position: jax.Array, time: int, lengths: Lengths) -> Clock:
    """What one layer knows about the positions of a step. All layers of a Transformer know the same."""
    slots = attention.slots
    steps = jnp.arange(time, dtype=jnp.int32)[None]
    written, end = (position[:, None] + steps) % slots, end_of_step(position, time, slots, lengths)
    queries = (end[:, None] - 1) % slots + steps + (1 - time)
    table = jnp.asarray(turns(3 * slots, attention.head_dim, attention.rope_theta))
    # XLA cannot look up and attend in one device kernel.
    found = lax.optimization_barrier(table[jnp.concatenate([written, queries, queries + slots], axis=1)])
    if lengths is not None:  # an idle row writes nothing
        written = jnp.where(lengths[:, None] > 0, written, slots)
    return Clock(written, end, *jnp.split(found, 3, axis=1))


def _attend(
    attention: Attention, clock: Clock, state: AttentionState, x: jax.Array
) -> tuple[AttentionState, jax.Array]:
    """`Attention.step`: x [batch, time, features] -> the same."""
    batch, time, _ = x.shape
    heads, key_heads, head_dim = attention.num_heads, attention.num_key_value_heads, attention.head_dim
    linears = attention.query_proj, attention.key_proj, attention.value_proj
    y = product_as_sums(x, *[linear.kernel[...] for linear in linears])
    if biases := [linear.bias[...] for linear in linears if linear.bias is not None]:
        y += jnp.concatenate(biases)[None, None]
    # XLA cannot divide channels into heads and attend in one device kernel.
    y = lax.optimization_barrier(y.reshape(batch, time, heads + 2 * key_heads, head_dim))
    query, key, value = jnp.split(y, [heads, heads + key_heads], axis=2)
    new_key, new_value = (
        _write(state.key, rotate(key, clock.key_turns), clock),
        _write(state.value, value, clock),
    )
    # Otherwise XLA would write and attend in one device kernel, and it would have to copy the ring first.
    new_key, new_value = lax.optimization_barrier((new_key, new_value))
    state = AttentionState(new_key, new_value, clock.end)
    weights = jax.nn.softmax(_scores(attention, query, state, clock), axis=-1).astype(x.dtype)
    values = state.value[:, :, None, None].astype(jnp.float32)
    out = jnp.sum(weights[..., None].astype(jnp.float32) * values, axis=-2)
    out = jnp.transpose(out, (0, 3, 1, 2, 4)).astype(x.dtype)
    return state, attention.output_proj(out.reshape(batch, time, heads * head_dim))


def _write(ring: jax.Array, new: jax.Array, clock: Clock) -> jax.Array:
    """Write [batch, time, heads, head_dim] into the ring. To pass over all of it takes no longer to start."""
    slot = jnp.arange(ring.shape[2], dtype=jnp.int32)[None, None, :, None]
    for step in range(new.shape[1]):
        here = slot == clock.written[:, step, None, None, None]
        ring = jnp.where(here, new[:, step, :, None], ring)
    return ring


def _scores(attention: Attention, query: jax.Array, ring: AttentionState, clock: Clock) -> jax.Array:
    """Masked scores, float32 [batch, key_value_heads, groups, time, slots].

    Both halves of the channels are added up apart. If a rotated query were put together of its halves, XLA
    would need a device kernel of its own for it.
    """
    batch, time, _, head_dim = query.shape
    key_heads, slots = ring.key.shape[1:3]
    query = jnp.transpose(query.reshape(batch, time, key_heads, -1, head_dim), (0, 2, 3, 1, 4))
    first, second = (half.astype(jnp.float32)[..., None, :] for half in jnp.split(query, 2, axis=-1))
    keys = (half[:, :, None, None].astype(jnp.float32) for half in jnp.split(ring.key, 2, axis=-1))

    def rotated(turns: jax.Array) -> tuple[jax.Array, jax.Array]:
        cos, sin = jnp.split(turns[:, None, None], 2, axis=-1)  # [batch, 1, 1, time, 1, head_dim / 2]
        return first * cos - second * sin, second * cos + first * sin

    newest, before, key_positions, oldest = steps_in_ring(clock.end, slots)
    products = jnp.zeros((), jnp.float32)
    for near, far, key in zip(*map(rotated, (clock.near_turns, clock.far_turns)), keys, strict=True):
        half = jnp.where(before[:, None, None, None, :, None], far, near)
        products += half.astype(query.dtype).astype(jnp.float32) * key
    scores = jnp.sum(products, axis=-1) / math.sqrt(head_dim)
    positions = newest + jnp.arange(1 - time, 1, dtype=jnp.int32)[None]
    mask = visible(positions[:, :, None], key_positions[:, None], oldest[:, :, None], attention.window)
    # Not -inf: an idle row whose stream has not begun sees nothing at all.
    return jnp.where(mask[:, None, None], scores, jnp.finfo(scores.dtype).min)
