"""A long input in pieces of time, so that what is computed on the way takes little memory."""

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import lax

State = TypeVar("State")


def step_in_pieces(
    step: Callable, state: State, x: jax.Array, lengths: jax.Array | None, size: int
) -> tuple[State, jax.Array]:
    """`step(state, x, lengths)`, computed `size` positions of x at a time.

    Args:
        step: maps a state, x [batch, time, channels] and lengths to the next state and an output.
        lengths: int [batch], how much of each row is real; None for all.
    """
    batch, time, channels = x.shape
    if time <= size:
        return step(state, x, lengths)

    def step_piece(state: State, piece: tuple[jax.Array, jax.Array]) -> tuple[State, jax.Array]:
        start, x = piece
        return step(state, x, None if lengths is None else jnp.clip(lengths - start, 0, x.shape[1]))

    count, rest = divmod(time, size)
    pieces = jnp.moveaxis(x[:, : time - rest].reshape(batch, count, size, channels), 1, 0)
    # Inside `shard_map` a carry must differ between the devices from the start, as x does.
    zero = jnp.zeros_like(x[:, 0, 0])
    state = jax.tree.map(lambda s: s + jnp.expand_dims(zero, range(1, s.ndim)).astype(s.dtype), state)
    state, y = lax.scan(step_piece, state, (jnp.arange(0, time - rest, size, dtype=jnp.int32), pieces))
    y = jnp.moveaxis(y, 0, 1).reshape(batch, count * y.shape[2], y.shape[3])
    if rest:
        state, end = step_piece(state, (jnp.array(time - rest, jnp.int32), x[:, time - rest :]))
        y = jnp.concatenate([y, end], axis=1)
    return state, y
