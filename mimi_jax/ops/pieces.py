"""A long input in pieces of time, so that what is computed on the way takes little memory."""

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import lax

State = TypeVar("State")


def piece_size(time: int, largest: int, unit: int) -> int:
    """The size of pieces of at most `largest` positions, both multiples of `unit`.

    It divides `time` if a size above half of `largest` does. A rest would be a program of its own, and its
    output would be copied behind that of the pieces.
    """
    sizes = range(largest, largest // 2, -unit)
    return next((size for size in sizes if time % size == 0), largest)


def step_in_pieces(
    step: Callable, state: State, x: jax.Array, lengths: jax.Array | None, *, largest: int, unit: int = 1
) -> tuple[State, jax.Array]:
    """`step(state, x, lengths)`, computed over pieces of x, one after the other.

    Args:
        step: maps a state, x [batch, time, channels] and lengths to the next state and an output.
        lengths: int [batch], how much of each row is real; None for all.
        largest: how many positions a piece may have.
        unit: of which the size of each piece is a multiple. It divides `largest`.
    """
    batch, time, channels = x.shape
    if time <= largest:
        return step(state, x, lengths)
    size = piece_size(time, largest, unit)

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
