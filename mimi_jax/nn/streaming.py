"""The contract of a streaming layer, and what all layers share.

A layer maps [batch, time, channels] to [batch, time', channels'], of a whole clip or piece by piece:

    state = layer.init_state(batch_size, dtype)
    state, y = layer.step(state, x, lengths)

    y = layer(x, lengths)

and for every way of cutting `x` into pieces that are whole multiples of the layer's stride

    layer(concat(pieces)) == concat(each step's y).

A state is a value: a pytree of arrays that are all zero when fresh, carry the batch on their first axis,
and keep structure, shapes and dtypes from step to step. So pausing, resetting or moving one row of a
batch is one `jax.tree.map` over the state of the whole model, and no layer knows about it.

`lengths`, int [batch] or None for "all of it", says how much of each row of `x` is real. A row whose
real part ends inside a step ends its stream there, with exactly the output it would have alone; a row of
which nothing is real keeps its state. Ragged batches, clips that are no whole number of frames, streams
that pause and streams that end are one mechanism.
"""

from collections.abc import Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from mimi_jax.ops import policy

State = TypeVar("State")


class StreamingLayer(nnx.Module):
    """Base of all layers. A subclass writes `step`, and the other two where it needs them."""

    def init_state(self, batch_size: int, dtype: DTypeLike = jnp.float32) -> Any:
        """The state of `batch_size` fresh streams."""
        raise NotImplementedError

    def step(self, state: Any, x: jax.Array, lengths: jax.Array | None = None) -> tuple[Any, jax.Array]:
        """Go on from `state` by the time of `x`; None stands for fresh, and `x` for a whole clip."""
        raise NotImplementedError

    def output_lengths(self, lengths: jax.Array | None) -> jax.Array | None:
        """How much of each row of the output is real."""
        return lengths

    def __call__(self, x: jax.Array, lengths: jax.Array | None = None) -> jax.Array:
        return self.step(None, x, lengths)[1]


def step_all(
    layers: Sequence[StreamingLayer], states: tuple | None, x: jax.Array, lengths: jax.Array | None
) -> tuple[tuple, jax.Array]:
    """Step layers one after the other; `states` is the tuple of theirs, or None for a whole clip."""
    new_states = []
    for layer, state in zip(layers, states or [None] * len(layers), strict=True):
        state, x = layer.step(state, x, lengths)
        lengths = layer.output_lengths(lengths)
        new_states.append(state)
    return tuple(new_states), x


class Chain(StreamingLayer):
    """Layers one after the other; its state is the tuple of theirs.

    `mimi_jax.ops.policy` computes the chain layer by layer, or as one where it has a way to do that.
    """

    operation = ""

    def layers(self) -> Sequence[StreamingLayer]:
        raise NotImplementedError

    def init_state(self, batch_size: int, dtype: DTypeLike = jnp.float32) -> tuple:
        return tuple(layer.init_state(batch_size, dtype) for layer in self.layers())

    def step(
        self, state: tuple | None, x: jax.Array, lengths: jax.Array | None = None
    ) -> tuple[tuple, jax.Array]:
        return policy.step(self, state, x, lengths)

    def step_layers(
        self, state: tuple | None, x: jax.Array, lengths: jax.Array | None = None
    ) -> tuple[tuple, jax.Array]:
        """Step one layer after the other."""
        return step_all(self.layers(), state, x, lengths)

    def output_lengths(self, lengths: jax.Array | None) -> jax.Array | None:
        for layer in self.layers():
            lengths = layer.output_lengths(lengths)
        return lengths


def is_real(lengths: jax.Array, size: int) -> jax.Array:
    """bool [batch, size]: which of the first `size` positions of each row lie before its end."""
    return jnp.arange(size) < lengths[:, None]


def fill_beyond(x: jax.Array, lengths: jax.Array | None, pad_mode: str) -> jax.Array:
    """Overwrite what lies beyond each row's end, so that it cannot matter what stood there.

    Args:
        x: [batch, time, channels].
        lengths: int [batch], the real positions of each row; None for all.
        pad_mode: "constant" writes zeros, "replicate" each row's last real value.
    """
    if lengths is None:
        return x
    filling = jnp.zeros((), x.dtype)
    if pad_mode == "replicate":
        last = jnp.maximum(lengths - 1, 0)[:, None, None]
        filling = jnp.take_along_axis(x, last, axis=1)
    return jnp.where(is_real(lengths, x.shape[1])[:, :, None], x, filling)


def batch_size(state: Any) -> int:
    """How many streams a state is of."""
    return jax.tree.leaves(state)[0].shape[0]


def select_rows(rows: jax.Array, if_true: State, if_false: State) -> State:
    """For each row of a batch, the state `if_true` or `if_false`; `rows` is bool [batch]."""

    def select(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.where(jnp.expand_dims(rows, range(1, a.ndim)), a, b)

    return jax.tree.map(select, if_true, if_false)


def keep_idle_rows(lengths: jax.Array | None, new_state: State, state: State) -> State:
    """The new state, but the old one of the rows of which nothing was real in this step."""
    return new_state if lengths is None else select_rows(lengths > 0, new_state, state)
