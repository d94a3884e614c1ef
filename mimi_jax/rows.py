"""Rows of a batch of streams: pause, reset and move them.

Each function is one map over the arrays of a state, whichever layers they belong to, since all of them
have the batch on their first axis and are zero when fresh.
"""

from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

State = TypeVar("State")


def batch_size(state: State) -> int:
    """How many streams a state is of."""
    return jax.tree.leaves(state)[0].shape[0]


def check_batch_size(state: State, batch: int) -> None:
    """Refuse a state of another number of streams than there are rows of input."""
    if batch_size(state) != batch:
        raise ValueError(f"the state is of {batch_size(state)} streams, the input has {batch} rows")


def select_rows(rows: jax.Array, if_true: State, if_false: State) -> State:
    """For each row of a batch, the state `if_true` or `if_false`; `rows` is bool [batch]."""

    def select(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.where(jnp.expand_dims(rows, range(1, a.ndim)), a, b)

    return jax.tree.map(select, if_true, if_false)


def check_mask_of_rows(name: str, rows: ArrayLike, batch: int) -> jax.Array:
    """Refuse what is not bool [batch], such as the numbers of rows."""
    rows = jnp.asarray(rows)
    if rows.dtype != bool or rows.shape != (batch,):
        raise ValueError(f"{name} must be bool [batch={batch}], got {rows.dtype} {list(rows.shape)}")
    return rows


def reset_rows(state: State, rows: ArrayLike) -> State:
    """Turn some rows of a batch of streams into fresh streams.

    Args:
        state: from `init_encoder_state`, `init_decoder_state` or a step.
        rows: bool [batch], True for the rows to start anew.

    Returns:
        The state to go on with, the other rows untouched.

    Raises:
        ValueError: `rows` is not bool [batch].
    """
    return _reset_rows(state, check_mask_of_rows("rows", rows, batch_size(state)))


@jax.jit
def _reset_rows(state: State, rows: jax.Array) -> State:
    return select_rows(rows, jax.tree.map(jnp.zeros_like, state), state)


def take_rows(state: State, rows: ArrayLike) -> State:
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


def put_rows(state: State, rows: ArrayLike, streams: State) -> State:
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
    rows = _check_numbers(rows, batch_size(state))
    if not isinstance(rows, jax.core.Tracer) and len(set(rows.tolist())) < len(rows):
        raise ValueError(f"rows must be different, each takes one stream, got {rows.tolist()}")

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


def _check_numbers(rows: ArrayLike, batch: int) -> jax.Array:
    """Row numbers as an int array [count]."""
    if not isinstance(rows, jax.core.Tracer):
        rows = np.asarray(rows)
    if not jnp.issubdtype(rows.dtype, jnp.integer) or rows.ndim > 1:
        raise ValueError(
            f"rows must be the numbers of rows, int [count], got {rows.dtype} {list(rows.shape)};"
            " np.flatnonzero makes them of a mask"
        )
    rows = rows.reshape(-1)
    if not isinstance(rows, jax.core.Tracer) and not all(0 <= row < batch for row in rows):
        raise ValueError(f"rows must lie in [0, {batch}), got {rows.tolist()}")
    return jnp.asarray(rows)
