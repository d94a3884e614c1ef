"""Rows of a batch of streams: start them anew, and move them from batch to batch.

Each function is one map over the arrays of a state, whichever layers they belong to, since all of them
have the batch on their first axis and are zero when fresh. `encode_step` and `decode_step` pause rows.
"""

import contextlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from mimi_jax.arguments import check_rows
from mimi_jax.nn.streaming import State, batch_size, select_rows


def reset_rows(state: State, rows: ArrayLike | Sequence[bool]) -> State:
    """Turn some rows of a batch of streams into fresh streams.

    Args:
        state: from `init_encoder_state`, `init_decoder_state` or a step.
        rows: bool [batch], True for the rows to start anew.

    Returns:
        The state to go on with, the other rows untouched.

    Raises:
        ValueError: `rows` is not bool [batch].
    """
    if not jax.tree.leaves(state):  # of a layer that remembers nothing
        return state
    return _reset_rows(state, check_rows("rows", rows, batch_size(state)))


@jax.jit
def _reset_rows(state: State, rows: jax.Array) -> State:
    return select_rows(rows, jax.tree.map(jnp.zeros_like, state), state)


def take_rows(state: State, rows: ArrayLike | Sequence[int]) -> State:
    """Copy some streams out of a batch: to move them to another one, or to save them.

    Args:
        state: of a batch of streams.
        rows: int [count], or one integer: the numbers of the rows, from 0.

    Returns:
        The state of these streams, a batch of their own, in the order of `rows`.

    Raises:
        ValueError: `rows` are not integers, or not all in [0, batch). Inside `jit` their values are not
            known, and rows outside the batch give NaN.
    """
    return _take_rows(state, _check_numbers(rows, batch_size(state)))


@jax.jit
def _take_rows(state: State, rows: jax.Array) -> State:
    return jax.tree.map(lambda leaf: jnp.take(leaf, rows, axis=0, mode="fill"), state)


def put_rows(state: State, rows: ArrayLike | Sequence[int], streams: State) -> State:
    """Put streams from elsewhere into rows of a batch, in place of those that were there.

    Args:
        state: of a batch of streams.
        rows: int [count], or one integer: the numbers of the rows, from 0.
        streams: the state of `count` streams of the same model, from `take_rows` or `load_state`.

    Returns:
        The state to go on with, the other rows untouched.

    Raises:
        ValueError: `rows` are not different integers in [0, batch), or `streams` do not fit: another
            number of them, an encoder's state in a decoder's, another model's or another dtype. Inside
            `jit` the values of `rows` are not known, and streams for rows outside the batch are dropped.
    """
    rows = _check_numbers(rows, batch_size(state), different=True)

    def form(state: State, batch: int):
        return jax.tree.map(lambda leaf: ((batch, *leaf.shape[1:]), leaf.dtype), state)

    if form(streams, batch_size(streams)) != form(state, batch_size(streams)):
        raise ValueError("streams must be a state of the same model, half and dtype as the batch's")
    if batch_size(streams) != len(rows):
        raise ValueError(f"there must be a stream for each row, got {batch_size(streams)} for {len(rows)}")
    return _put_rows(state, rows, streams)


@jax.jit
def _put_rows(state: State, rows: jax.Array, streams: State) -> State:
    return jax.tree.map(lambda leaf, new: leaf.at[rows].set(new), state, streams)


def _check_numbers(rows: ArrayLike | Sequence[int], batch: int, different: bool = False) -> jax.Array:
    """Row numbers as int32 [count]; inside `jit` their values are not known, and not checked."""
    numbers = rows if isinstance(rows, jax.Array) else np.asarray(rows)
    if not jnp.issubdtype(numbers.dtype, jnp.integer) or numbers.ndim > 1:
        raise ValueError(
            f"rows must be the numbers of rows, int [count], got {numbers.dtype} {list(numbers.shape)};"
            " np.flatnonzero makes them of a mask"
        )
    with contextlib.suppress(jax.errors.TracerArrayConversionError):
        values = np.atleast_1d(np.asarray(numbers)).tolist()
        if not all(0 <= value < batch for value in values):
            raise ValueError(f"rows must lie in [0, {batch}), got {values}")
        if different and len(set(values)) < len(values):
            raise ValueError(f"rows must be different, for each takes one stream, got {values}")
    return jnp.atleast_1d(jnp.asarray(numbers, jnp.int32))
