"""Windowed self-attention with rotary positions (reference: `MimiAttention`)."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Float, Int

from mimi_jax.nn.streaming import Lengths, StreamingLayer
from mimi_jax.ops import policy
from mimi_jax.ops.attention import visible
from mimi_jax.ops.lanes import narrow, scores_of_two_rounds, widen, write_slots
from mimi_jax.ops.pieces import step_in_pieces


@functools.lru_cache(maxsize=32)
def turns(size: int, head_dim: int, theta: float) -> np.ndarray:
    """The rotations of positions below `size`, cosines and then sines: float32 [size, 1, head_dim].

    They are constants of the program, since XLA:CPU would compute them again for every head.
    """
    half = head_dim // 2
    frequencies = 1 / np.float32(theta) ** (np.arange(half, dtype=np.float32) / np.float32(half))
    angles = np.arange(size, dtype=np.float32)[:, None, None] * frequencies
    return np.concatenate([np.cos(angles), np.sin(angles)], axis=-1)


def rotate(x: Float[Array, "batch time heads head_dim"], turns: ArrayLike) -> jax.Array:
    """Rotary position embedding, in float32 (RoFormer, arXiv 2104.09864; the half-split pairs of Llama).

    Args:
        x: [batch, time, heads, head_dim].
        turns: [batch or 1, time, 1, head_dim], those of the positions of x. Only the differences of
            positions matter to attention.
    """
    cos, sin = jnp.split(jnp.asarray(turns), 2, axis=-1)
    first, second = (half.astype(jnp.float32) for half in jnp.split(x, 2, axis=-1))
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


# The ring has room for this many new steps before the oldest step that they see is overwritten. If more come
# at once, queries attend to them beside the ring. With Mimi's window of 250 the ring has 256 slots.
SPARE = 7


class AttentionState(NamedTuple):
    """A ring of slots. The key of step t is in slot t % slots, rotated to the position of that slot.

    So a key is written once, and never moved or rotated again. Positions do not grow, so that a stream keeps
    its precision however long it lasts. On TPUs several heads lie side by side, as one wide head.
    """

    key: Float[Array, "batch wide_heads slots wide_head_dim"]
    value: Float[Array, "batch wide_heads slots wide_head_dim"]
    # The position of the next step, minus whole rounds of the ring. From `slots` on, all slots are full. A
    # Transformer keeps that of its first layer, for all of them.
    position: Int[Array, " batch"]


def end_of_step(position: jax.Array, time: int, slots: int, lengths: Lengths) -> jax.Array:
    """The position of a ring after a step. It stays below two rounds, and that of an idle row stays."""
    end = position + time
    end = jnp.where(end < 2 * slots, end, slots + end % slots)
    return end if lengths is None else jnp.where(lengths > 0, end, position)


def steps_in_ring(position: jax.Array, slots: int) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Which steps the slots of a ring hold. They count from the first slot of the round of the newest step.

    Returns:
        The newest step, int [batch, 1]; whether a slot holds a step of the round before, bool [batch, slots];
        the step of each slot, int [batch, slots]; and the oldest step that was written, int [batch, 1].
    """
    newest = (position[:, None] - 1) % slots
    slot = jnp.arange(slots, dtype=jnp.int32)[None]
    before = slot > newest
    steps, oldest = slot - jnp.where(before, slots, 0), newest + 1 - jnp.minimum(position, slots)[:, None]
    return newest, before, steps, oldest


class Attention(StreamingLayer):
    """Causal self-attention over a sliding window, with rotary positions and grouped keys and values."""

    def __init__(
        self,
        features: int,
        num_heads: int,
        num_key_value_heads: int,
        head_dim: int,
        window: int,
        *,
        rope_theta: float = 10_000.0,
        use_bias: bool = False,
        rngs: nnx.Rngs,
    ):
        self.num_heads, self.num_key_value_heads, self.head_dim = num_heads, num_key_value_heads, head_dim
        self.window, self.rope_theta = window, rope_theta
        self.slots = window - 1 + SPARE

        def linear(size_in: int, size_out: int) -> nnx.Linear:
            return nnx.Linear(size_in, size_out, use_bias=use_bias, dot_general=policy.product, rngs=rngs)

        self.query_proj = linear(features, num_heads * head_dim)
        self.key_proj = linear(features, num_key_value_heads * head_dim)
        self.value_proj = linear(features, num_key_value_heads * head_dim)
        self.output_proj = linear(num_heads * head_dim, features)

    def init_state(self, batch_size: int, dtype: DTypeLike = jnp.float32) -> AttentionState:
        side_by_side = policy.heads_side_by_side(self.num_key_value_heads, self.head_dim)
        wide_heads, wide_head_dim = self.num_key_value_heads // side_by_side, side_by_side * self.head_dim
        shape = batch_size, wide_heads, self.slots, wide_head_dim
        return AttentionState(
            jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.zeros(batch_size, jnp.int32)
        )

    def step(
        self, state: AttentionState | None, x: Float[Array, "batch time features"], lengths: Lengths = None
    ) -> tuple[AttentionState | None, Float[Array, "batch time features"]]:
        if state is not None and x.shape[1] > self.slots:
            return step_in_pieces(self.step, state, x, lengths, largest=self.slots)
        batch, time, _ = x.shape
        query = self.query_proj(x).reshape(batch, time, self.num_heads, self.head_dim)
        key = self.key_proj(x).reshape(batch, time, self.num_key_value_heads, self.head_dim)
        value = self.value_proj(x).reshape(key.shape)
        if state is None:
            turn = turns(time, self.head_dim, self.rope_theta)[None]
            out = policy.attention(rotate(query, turn), rotate(key, turn), value, window=self.window)
        else:
            past, state = state, self._write(state, key, value, lengths)
            if time <= SPARE:
                out = self._attend_to_ring(state, query, jnp.arange(1 - time, 1, dtype=jnp.int32))
            else:
                out = self._attend_to_ring(past, query, jnp.arange(1, time + 1, dtype=jnp.int32), key, value)
        return state, self.output_proj(out.reshape(batch, time, self.num_heads * self.head_dim))

    def _rotate(self, x: jax.Array, positions: jax.Array) -> jax.Array:
        # A query may stand beyond the ring and see the round before. A query before the ring sees nothing
        # that is in it, so its negative position may count as any other.
        return rotate(x, jnp.asarray(turns(3 * self.slots, self.head_dim, self.rope_theta))[positions])

    def _write(
        self, state: AttentionState, key: jax.Array, value: jax.Array, lengths: jax.Array | None
    ) -> AttentionState:
        """Write new steps into their slots. There are at most as many steps as slots."""
        time, slots = key.shape[1], self.slots
        positions = (state.position[:, None] + jnp.arange(time, dtype=jnp.int32)[None]) % slots
        key = self._rotate(key, positions)
        end = end_of_step(state.position, time, slots, lengths)
        if lengths is not None:  # an idle row writes nothing
            positions = jnp.where(lengths[:, None] > 0, positions, slots)
        if state.key.shape[1] < self.num_key_value_heads:
            write = functools.partial(write_slots, positions=positions)
            return AttentionState(write(state.key, key), write(state.value, value), end)
        rows = jnp.arange(len(key), dtype=jnp.int32)[:, None]
        return AttentionState(
            state.key.at[rows, :, positions].set(key, mode="drop"),
            state.value.at[rows, :, positions].set(value, mode="drop"),
            end,
        )

    def _attend_to_ring(
        self,
        ring: AttentionState,
        query: jax.Array,
        ahead: jax.Array,
        key: jax.Array | None = None,
        value: jax.Array | None = None,
    ) -> jax.Array:
        """Attend to what is in the ring, and to keys and values that are not in it yet.

        Args:
            ahead: int [time], the positions of the queries, counted from the newest step in the ring.
            key, value: those of the queries' own steps; None if the ring holds them.
        """
        batch, time, heads, head_dim = query.shape
        wide_heads, slots, wide_head_dim = ring.key.shape[1:]
        side_by_side, groups = self.num_key_value_heads // wide_heads, heads // self.num_key_value_heads
        wide = batch, time, wide_heads, wide_head_dim
        newest, before, key_positions, oldest = steps_in_ring(ring.position, slots)
        positions = newest + ahead[None]
        # A query is one round further from the steps of the round before.
        queries = jnp.stack([self._rotate(query, positions), self._rotate(query, positions + slots)], axis=1)
        if side_by_side > 1:
            queries = widen(queries, side_by_side, groups)
        queries = queries.reshape(batch, 2, time, wide_heads, side_by_side * groups, wide_head_dim)
        queries = jnp.transpose(queries, (0, 3, 4, 1, 2, 5))
        products = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
        # The ring is the first operand, or XLA:CPU would rearrange it for the product.
        if side_by_side > 1:
            scores = scores_of_two_rounds(ring.key, queries, before)
        else:
            scores = jnp.moveaxis(products("bhsd,bhgrtd->bhsgrt", ring.key, queries), 2, -1)
            scores = jnp.where(before[:, None, None, None], scores[:, :, :, 1], scores[:, :, :, 0])
        if key is not None:
            own_round = queries[:, :, :, 0]
            new = products("bhgtd,bshd->bhgts", own_round, self._rotate(key, positions).reshape(wide))
            scores = jnp.concatenate([scores, new], axis=-1)
            key_positions = jnp.concatenate([key_positions, positions], axis=-1)
        mask = visible(positions[:, :, None], key_positions[:, None], oldest[:, :, None], self.window)
        # Not -inf: an idle row whose stream has not begun sees nothing at all.
        lowest = jnp.finfo(scores.dtype).min
        scores = jnp.where(mask[:, None, None], scores / math.sqrt(head_dim), lowest)
        weights = jax.nn.softmax(scores, axis=-1).astype(query.dtype)
        # Heads come before time here too, or XLA:CPU would copy the whole ring to another layout.
        out = products("bhgts,bhsd->bhgtd", weights[..., :slots], ring.value)
        if value is not None:
            out += products("bhgts,bshd->bhgtd", weights[..., slots:], value.reshape(wide))
        out = jnp.transpose(out, (0, 3, 1, 2, 4)).reshape(batch, time, heads, wide_head_dim)
        if side_by_side > 1:
            out = narrow(out, side_by_side, groups)
        return out.astype(query.dtype)
