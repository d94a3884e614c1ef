"""Rows of a batch of streams: reset them, and move them from batch to batch.

Every array of a state has the batch on its first axis, and is zero when the streams are fresh. So each
function is one map over all arrays, whatever layers they belong to. To pause rows, use the argument `active`
of `encode_step` and `decode_step`.
"""

import contextlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jax.typing import ArrayLike

from mimi_jax.boundary import as_numpy, check_rows, let_xla_shard, transfers_allowed
from mimi_jax.nn.streaming import State, batch_size, select_rows


@transfers_allowed()
def reset_rows(state: State, rows: ArrayLike | Sequence[bool]) -> State:
    """Turn some rows of a batch of streams into fresh streams.

    Args:
        state: from `init_encoder_state`, `init_decoder_state` or a step.
        rows: bool [batch], True for the rows to reset.

    Returns:
        The state to continue with. The other rows do not change.

    Raises:
        ValueError: `rows` is not bool [batch].
    """
    return _reset_rows(state, check_rows("rows", rows, batch_size(state)))


@jax.jit
def _reset_rows(state: State, rows: jax.Array) -> State:
    return select_rows(rows, jax.tree.map(jnp.zeros_like, state), state)


@transfers_allowed()
def take_rows(state: State, rows: ArrayLike | Sequence[int]) -> State:
    """Copy some streams out of a batch, to move them to another batch or to save them.

    Args:
        state: of a batch of streams.
        rows: int [count], or one integer: the numbers of the rows, from 0.

    Returns:
        The state of a batch of these streams, in the order of `rows`.

    Raises:
        ValueError: `rows` are not integers in [0, batch). Inside `jit` their values are not known, and a row
            outside the batch gives NaN, and the smallest number in integers.
    """
    return _take_rows(state, _check_numbers(rows, batch_size(state)))


@jax.jit
def _take_rows(state: State, rows: jax.Array) -> State:
    def take(state: State, rows: jax.Array) -> State:
        return jax.tree.map(lambda leaf: jnp.take(leaf, rows, axis=0, mode="fill"), state)

    sharding = jax.typeof(jax.tree.leaves(state)[0]).sharding
    return let_xla_shard(take, sharding.mesh, PartitionSpec(), state, rows)


@transfers_allowed()
def put_rows(state: State, rows: ArrayLike | Sequence[int], streams: State) -> State:
    """Replace some rows of a batch by other streams.

    Args:
        state: of a batch of streams.
        rows: int [count], or one integer: the numbers of the rows, from 0.
        streams: the state of `count` streams of the same model, from `take_rows` or `load_state`.

    Returns:
        The state to continue with. The other rows do not change.

    Raises:
        ValueError: `rows` are not distinct integers in [0, batch), or `streams` are of another number, model,
            half or dtype. Inside `jit` the values of `rows` are not known, and a stream for a row outside the
            batch is dropped.
    """
    rows = _check_numbers(rows, batch_size(state), distinct=True)

    def form(state: State, batch: int):
        return jax.tree.map(lambda leaf: ((batch, *leaf.shape[1:]), leaf.dtype), state)

    if form(streams, batch_size(streams)) != form(state, batch_size(streams)):
        raise ValueError("streams must have the same model, half and dtype as the state that takes them")
    if batch_size(streams) != len(rows):
        raise ValueError(
            f"there must be one stream for each row, got {batch_size(streams)} streams for {len(rows)} rows"
        )
    return _put_rows(state, rows, streams)


@jax.jit
def _put_rows(state: State, rows: jax.Array, streams: State) -> State:
    def put(state: State, rows: jax.Array, streams: State) -> State:
        return jax.tree.map(lambda leaf, new: leaf.at[rows].set(new), state, streams)

    sharding = jax.typeof(jax.tree.leaves(state)[0]).sharding
    return let_xla_shard(put, sharding.mesh, PartitionSpec(*sharding.spec[:1]), state, rows, streams)


def _check_numbers(rows: ArrayLike | Sequence[int], batch: int, distinct: bool = False) -> jax.Array:
    """Row numbers as int32 [count]. Inside `jit` their values are not known, so they are not checked."""
    numbers = rows if isinstance(rows, jax.Array) else as_numpy("rows", rows)
    if isinstance(rows, Sequence) and not rows:
        numbers = numbers.astype(np.int32)  # NumPy takes an empty list for floats
    if not jnp.issubdtype(numbers.dtype, jnp.integer) or numbers.ndim > 1:
        raise ValueError(
            f"rows must be the numbers of rows, int [count], got {numbers.dtype} {list(numbers.shape)};"
            " np.flatnonzero turns a mask into numbers"
        )
    with contextlib.suppress(jax.errors.TracerArrayConversionError):
        values = np.atleast_1d(np.asarray(numbers)).tolist()
        if not all(0 <= value < batch for value in values):
            raise ValueError(f"rows must lie in [0, {batch}), got {values}")
        if distinct and len(set(values)) < len(values):
            raise ValueError(f"rows must be distinct, since each takes one stream, got {values}")
    numbers = jnp.atleast_1d(jnp.asarray(numbers, jnp.int32))
    return jnp.where(numbers < 0, batch, numbers)  # JAX would count negative ones from the end
