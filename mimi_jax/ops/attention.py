"""Windowed attention in plain XLA: the rule, the definition, and a faster way for long inputs.

`visible` is the one rule of which key a query sees. Each function of the table takes

    query       [batch, time, heads, head_dim], rotated
    key, value  [batch, time, key_value_heads, head_dim]
    window      how many keys a query sees, its own included

and returns [batch, time, heads, head_dim].
"""

import math

import jax
import jax.numpy as jnp

from mimi_jax.config import ceil_div


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


def reference_attention(query, key, value, *, window):
    """Every query against every key: O(time^2). This is the definition; tests compare the others to it."""
    positions = jnp.arange(query.shape[1])
    return _attend(query, key, value, visible(positions[:, None], positions[None, :], 0, window))


def banded_attention(query, key, value, *, window):
    """Each window of queries against its own keys and those of the window before: O(time * window)."""
    batch, time, heads, head_dim = query.shape
    num_windows = ceil_div(time, window)
    after = num_windows * window - time
    query = jnp.pad(query, ((0, 0), (0, after), (0, 0), (0, 0)))
    query = query.reshape(batch, num_windows, window, heads, head_dim)

    def with_window_before(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, ((0, 0), (window, after), (0, 0), (0, 0)))
        x = x.reshape(batch, num_windows + 1, window, *x.shape[2:])
        return jnp.concatenate([x[:, :-1], x[:, 1:]], axis=2)

    positions = jnp.arange(num_windows)[:, None, None] * window + jnp.arange(-window, window)[None, None]
    mask = visible(positions[:, 0, window:, None], positions, 0, window)
    out = _attend(query, with_window_before(key), with_window_before(value), mask)
    return out.reshape(batch, num_windows * window, heads, head_dim)[:, :time]
