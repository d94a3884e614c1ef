"""Windowed self-attention with rotary positions (reference: `MimiAttention`)."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import ArrayLike, DTypeLike

from mimi_jax.nn.streaming import StreamingLayer
from mimi_jax.ops import policy
from mimi_jax.ops.attention import visible
from mimi_jax.ops.pieces import step_in_pieces


@functools.lru_cache(maxsize=32)
def turns(size: int, head_dim: int, theta: float) -> np.ndarray:
    """Cosines, then sines, that positions below `size` are rotated by: float32 [size, 1, head_dim].

    Constants, which XLA:CPU would compute anew for every head. The longest wave is about 2 pi theta long.
    """
    half = head_dim // 2
    frequencies = 1 / np.float32(theta) ** (np.arange(half, dtype=np.float32) / np.float32(half))
    angles = np.arange(size, dtype=np.float32)[:, None, None] * frequencies
    return np.concatenate([np.cos(angles), np.sin(angles)], axis=-1)


def rotate(x: jax.Array, turns: ArrayLike) -> jax.Array:
    """Rotary position embedding, in float32 (RoFormer, arXiv 2104.09864; the half-split pairs of Llama).

    Args:
        x: [batch, time, heads, head_dim].
        turns: [time, 1, head_dim] or [batch, time, 1, head_dim], of x's positions, of which only the
            differences matter to attention.
    """
    cos, sin = jnp.split(jnp.asarray(turns), 2, axis=-1)
    first, second = (half.astype(jnp.float32) for half in jnp.split(x, 2, axis=-1))
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


# How many new steps the ring takes in before the oldest one that any of them still sees is overwritten; more
# are attended to beside it. With Mimi's window of 250 the ring has 256 slots.
SPARE = 7


class AttentionState(NamedTuple):
    """A ring of slots: the key of step t stands in slot t % slots, rotated to the position of its slot.

    So a key is written once and never moved or rotated again, and no position grows: a stream loses no
    precision, however long it lasts.
    """

    key: jax.Array  # [batch, key_value_heads, slots, head_dim]
    value: jax.Array  # [batch, key_value_heads, slots, head_dim]
    position: jax.Array  # int32 [batch], of the next step, less whole rounds; from `slots` on, all are full


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
        shape = batch_size, self.num_key_value_heads, self.slots, self.head_dim
        return AttentionState(
            jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.zeros(batch_size, jnp.int32)
        )

    def step(
        self, state: AttentionState | None, x: jax.Array, lengths: jax.Array | None = None
    ) -> tuple[AttentionState | None, jax.Array]:
        if state is not None and x.shape[1] > self.slots:
            return step_in_pieces(self.step, state, x, lengths, self.slots)
        batch, time, _ = x.shape
        query = self.query_proj(x).reshape(batch, time, self.num_heads, self.head_dim)
        key = self.key_proj(x).reshape(batch, time, self.num_key_value_heads, self.head_dim)
        value = self.value_proj(x).reshape(key.shape)
        if state is None:
            turn = turns(time, self.head_dim, self.rope_theta)
            out = policy.attention(rotate(query, turn), rotate(key, turn), value, window=self.window)
        else:
            past, state = state, self._write(state, key, value, lengths)
            if time <= SPARE:
                out = self._attend_to_ring(state, query, jnp.arange(1 - time, 1))
            else:
                out = self._attend_to_ring(past, query, jnp.arange(1, time + 1), key, value)
        return state, self.output_proj(out.reshape(batch, time, self.num_heads * self.head_dim))

    def _rotate(self, x: jax.Array, positions: jax.Array) -> jax.Array:
        # A query may stand beyond the ring, and then see the round before. One that stands before it sees
        # nothing else, so it does not matter what its negative position is taken for.
        return rotate(x, jnp.asarray(turns(3 * self.slots, self.head_dim, self.rope_theta))[positions])

    def _write(
        self, state: AttentionState, key: jax.Array, value: jax.Array, lengths: jax.Array | None
    ) -> AttentionState:
        """Put new steps, of which there are no more than slots, into theirs."""
        time, slots = key.shape[1], self.slots
        positions = (state.position[:, None] + jnp.arange(time)) % slots
        key = self._rotate(key, positions)
        end = state.position + time
        end = jnp.where(end < 2 * slots, end, slots + end % slots)
        if lengths is not None:  # a row that stands still writes nowhere
            positions = jnp.where(lengths[:, None] > 0, positions, slots)
            end = jnp.where(lengths > 0, end, state.position)
        rows = jnp.arange(len(key))[:, None]
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
        """Attention to what is in the ring, and to keys and values that are not in it yet.

        Args:
            ahead: int [time], of the queries, counted from the newest step in the ring.
            key, value: of the queries' own steps; None where the ring holds them.
        """
        batch, time, heads, head_dim = query.shape
        slots, key_value_heads = self.slots, self.num_key_value_heads
        groups = heads // key_value_heads
        newest = (ring.position[:, None] - 1) % slots
        positions = newest + ahead
        # A slot after the newest one holds a step of the round before, from which a query is one further.
        before = jnp.arange(slots) > newest
        queries = jnp.stack([self._rotate(query, positions), self._rotate(query, positions + slots)], axis=1)
        queries = queries.reshape(batch, 2, time, key_value_heads, groups, head_dim)
        queries = jnp.transpose(queries, (0, 3, 4, 1, 2, 5))
        products = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
        # The ring comes first, or XLA:CPU rearranges it for the product.
        scores = jnp.moveaxis(products("bhsd,bhgrtd->bhsgrt", ring.key, queries), 2, -1)
        scores = jnp.where(before[:, None, None, None], scores[:, :, :, 1], scores[:, :, :, 0])
        key_positions = jnp.arange(slots) - jnp.where(before, slots, 0)
        if key is not None:
            new = products("bhgtd,bshd->bhgts", queries[:, :, :, 0], self._rotate(key, positions))
            scores = jnp.concatenate([scores, new], axis=-1)
            key_positions = jnp.concatenate([key_positions, positions], axis=-1)
        first = newest + 1 - jnp.minimum(ring.position, slots)[:, None]
        mask = visible(positions[:, :, None], key_positions[:, None], first[:, :, None], self.window)
        # Not -inf: a row that has not begun and stands still sees nothing at all.
        lowest = jnp.finfo(scores.dtype).min
        scores = jnp.where(mask[:, None, None], scores / math.sqrt(head_dim), lowest)
        weights = jax.nn.softmax(scores, axis=-1).astype(query.dtype)
        # Heads before time here too, or XLA:CPU copies the whole ring to another layout.
        out = products("bhgts,bhsd->bhgtd", weights[..., :slots], ring.value)
        if value is not None:
            out += products("bhgts,bshd->bhgtd", weights[..., slots:], value)
        return jnp.transpose(out, (0, 3, 1, 2, 4)).reshape(query.shape).astype(query.dtype)
