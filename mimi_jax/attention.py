"""Windowed self-attention with rotary positions (reference: `MimiAttention`).

One rule says which key a query sees, offline and in a stream: `visible`. The table `BACKENDS` holds
functions that all give the same numbers, of which "reference" is the one to read. Each takes

    query       [batch, time, heads, head_dim]
    key, value  [batch, past + time, key_value_heads, head_dim], the last `time` those of the queries
    window      how many keys a query sees, its own included
    num_past    int [batch], how many of the past keys are real, the newest ones; None for all

and returns [batch, time, heads, head_dim].
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from mimi_jax.streaming import StreamingLayer, ceil_div


def rotate(x: jax.Array, positions: jax.Array, theta: float) -> jax.Array:
    """Rotary position embedding, in float32 (RoFormer, arXiv 2104.09864; the half-split pairs of Llama).

    Args:
        x: [batch, time, heads, head_dim].
        positions: int [time]. Only their differences matter to attention.
        theta: the longest wavelength is about 2 pi theta positions.
    """
    half = x.shape[-1] // 2
    frequencies = 1.0 / (theta ** (jnp.arange(half, dtype=jnp.float32) / half))
    angles = positions.astype(jnp.float32)[:, None, None] * frequencies
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    first, second = x[..., :half].astype(jnp.float32), x[..., half:].astype(jnp.float32)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)


def visible(
    query_positions: jax.Array, key_positions: jax.Array, first_position: jax.Array | int, window: int
) -> jax.Array:
    """Whether a query sees a key: one of the `window` newest, itself included, that exist."""
    distance = query_positions - key_positions
    return (distance >= 0) & (distance < window) & (key_positions >= first_position)


def _attend(query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array) -> jax.Array:
    """Softmax attention of [..., time, heads, head_dim] under a mask [..., queries, keys]."""
    *rest, heads, head_dim = query.shape
    key_value_heads = key.shape[-2]
    grouped = query.reshape(*rest, key_value_heads, heads // key_value_heads, head_dim)
    scores = jnp.einsum("...qhgd,...khd->...hgqk", grouped, key, preferred_element_type=jnp.float32)
    scores = jnp.where(mask[..., None, None, :, :], scores / math.sqrt(head_dim), -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    return jnp.einsum("...hgqk,...khd->...qhgd", weights, value).reshape(query.shape)


def reference_attention(query, key, value, *, window, num_past=None):
    """Every query against every key: O(time^2), and the definition the others are tested against."""
    time, past = query.shape[1], key.shape[1] - query.shape[1]
    positions = jnp.arange(-past, time)
    first = -past if num_past is None else -num_past[:, None, None]
    mask = visible(positions[past:, None], positions[None, :], first, window)
    return _attend(query, key, value, mask)


def banded_attention(query, key, value, *, window, num_past=None):
    """Queries in blocks of `window`, each against its own and the block before: O(time * window)."""
    batch, time, heads, head_dim = query.shape
    past = key.shape[1] - time
    num_blocks = ceil_div(time, window)
    after = num_blocks * window - time
    query = jnp.pad(query, ((0, 0), (0, after), (0, 0), (0, 0)))
    query = query.reshape(batch, num_blocks, window, heads, head_dim)

    def with_block_before(x: jax.Array) -> jax.Array:
        x = x[:, max(past - window, 0) :]
        x = jnp.pad(x, ((0, 0), (max(window - past, 0), after), (0, 0), (0, 0)))
        x = x.reshape(batch, num_blocks + 1, window, *x.shape[2:])
        return jnp.concatenate([x[:, :-1], x[:, 1:]], axis=2)

    positions = jnp.arange(num_blocks)[:, None, None] * window + jnp.arange(-window, window)
    first = -past if num_past is None else -num_past[:, None, None, None]
    mask = visible(positions[:, 0, window:, None], positions, first, window)
    out = _attend(query, with_block_before(key), with_block_before(value), mask)
    return out.reshape(batch, num_blocks * window, heads, head_dim)[:, :time]


BACKENDS: dict[str, Callable[..., jax.Array]] = {"reference": reference_attention, "banded": banded_attention}


def choose_backend(time: int, window: int) -> str:
    """The fastest backend: blocks pay as soon as they leave out more keys than they add."""
    return "banded" if time > 2 * window else "reference"


class AttentionState(NamedTuple):
    key: jax.Array  # [batch, window - 1, key_value_heads, head_dim], newest last, before rotation
    value: jax.Array  # [batch, window - 1, key_value_heads, head_dim]
    num_past: jax.Array  # int32 [batch], how many of them are real


class Attention(StreamingLayer):
    """Causal self-attention over a sliding window, with rotary positions and grouped keys and values.

    The keys are kept unrotated and rotated anew in each step, at positions counted from its start: a
    stream then never loses precision to large positions, however long it lasts.

    Args:
        backend: a name in `BACKENDS`; None chooses by the number of steps.
    """

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
        backend: str | None = None,
        rngs: nnx.Rngs,
    ):
        if backend is not None and backend not in BACKENDS:
            raise ValueError(f"attention must be one of {', '.join(BACKENDS)}, got {backend!r}")
        self.num_heads, self.num_key_value_heads, self.head_dim = num_heads, num_key_value_heads, head_dim
        self.window, self.rope_theta, self.backend = window, rope_theta, backend

        def linear(size_in: int, size_out: int) -> nnx.Linear:
            return nnx.Linear(size_in, size_out, use_bias=use_bias, rngs=rngs)

        self.query_proj = linear(features, num_heads * head_dim)
        self.key_proj = linear(features, num_key_value_heads * head_dim)
        self.value_proj = linear(features, num_key_value_heads * head_dim)
        self.output_proj = linear(num_heads * head_dim, features)

    def init_state(self, batch_size: int, dtype: DTypeLike = jnp.float32) -> AttentionState:
        shape = (batch_size, self.window - 1, self.num_key_value_heads, self.head_dim)
        # Two arrays, not one twice: JAX refuses to donate one buffer twice.
        return AttentionState(
            jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.zeros(batch_size, jnp.int32)
        )

    def step(
        self, state: AttentionState | None, x: jax.Array, lengths: jax.Array | None = None
    ) -> tuple[AttentionState | None, jax.Array]:
        batch, time, _ = x.shape
        query = self.query_proj(x).reshape(batch, time, self.num_heads, self.head_dim)
        key = self.key_proj(x).reshape(batch, time, self.num_key_value_heads, self.head_dim)
        value = self.value_proj(x).reshape(key.shape)
        num_past = None
        if state is not None:
            num_past = state.num_past
            key = jnp.concatenate([state.key, key], axis=1)
            value = jnp.concatenate([state.value, value], axis=1)
            seen = jnp.minimum(num_past + time, self.window - 1)
            state = AttentionState(key[:, time:], value[:, time:], seen)
        key_positions = jnp.arange(time - key.shape[1], time)
        attend = BACKENDS[self.backend or choose_backend(time, self.window)]
        out = attend(
            rotate(query, jnp.arange(time), self.rope_theta),
            rotate(key, key_positions, self.rope_theta),
            value,
            window=self.window,
            num_past=num_past,
        )
        return state, self.output_proj(out.reshape(batch, time, self.num_heads * self.head_dim))
