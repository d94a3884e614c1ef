"""What a streaming layer is, and what all of them share.

A layer maps [batch, time, channels] to [batch, time', channels'], a whole clip at once or piece by piece:

    y = layer(x, lengths)

    state = layer.init_state(batch_size, dtype)
    state, y = layer.step(state, x, lengths)

Both give the same numbers. However `x` is cut into pieces, if each is a multiple of the layer's stride,

    layer(concat(pieces)) == concat(the y of each step)

A state is a value: a pytree of arrays. All of them are zero when the stream is fresh, and have the batch on
axis 0. Their structure, shapes and dtypes never change. So to pause, reset or move one row of a batch is one
`jax.tree.map` over the state of the whole model, and no layer need know of it.

`lengths`, int [batch], says how much of each row of `x` is real; None stands for all of it. If the real part
of a row ends inside a step, its stream ends there, with exactly the output that the row would have alone. If
nothing of a row is real, it keeps its state. This one mechanism serves ragged batches, clips of any length,
streams that pause and streams that end.
"""

from collections.abc import Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from mimi_jax.nn.module import Module
from mimi_jax.ops import policy

State = TypeVar("State")
Lengths = Int[Array, " batch"] | None


class StreamingLayer(Module):
    """The base of all layers. A subclass defines `step`, and the others where it needs them."""

    def init_state(self, batch_size: int, dtype: DTypeLike = jnp.float32) -> Any:
        """The state of `batch_size` fresh streams."""
        raise NotImplementedError

    def step(
        self, state: Any, x: Float[Array, "batch time in"], lengths: Lengths = None
    ) -> tuple[Any, Float[Array, "batch time_out out"]]:
        """Continue streams by the time of `x`. A state of None means that `x` is a whole clip."""
        raise NotImplementedError

    def output_lengths(self, lengths: Lengths) -> Lengths:
        """How much of each row of the output is real."""
        return lengths

    def __call__(
        self, x: Float[Array, "batch time in"], lengths: Lengths = None
    ) -> Float[Array, "batch time_out out"]:
        return self.step(None, x, lengths)[1]


def step_all(
    layers: Sequence[StreamingLayer],
    states: tuple | None,
    x: Float[Array, "batch time in"],
    lengths: Lengths,
) -> tuple[tuple, Float[Array, "batch time_out out"]]:
    """Step layers one after the other.

    Args:
        states: the tuple of their states. None for whole clips, after which no state is left.
    """
    new_states = []
    for layer, state in zip(layers, states or [None] * len(layers), strict=True):
        if state is None:
            x = layer(x, lengths)
        else:
            state, x = layer.step(state, x, lengths)
        lengths = layer.output_lengths(lengths)
        new_states.append(state)
    return tuple(new_states), x


class Chain(StreamingLayer):
    """Layers one after the other. Its state is the tuple of their states.

    `mimi_jax.ops.policy` computes a chain layer by layer, or as one if `PARTS` has a way for its `operation`.
    """

    operation = ""

    def layers(self) -> Sequence[StreamingLayer]:
        raise NotImplementedError

    def init_state(self, batch_size: int, dtype: DTypeLike = jnp.float32) -> tuple:
        return tuple(layer.init_state(batch_size, dtype) for layer in self.layers())

    def step(
        self, state: tuple | None, x: Float[Array, "batch time in"], lengths: Lengths = None
    ) -> tuple[tuple, Float[Array, "batch time_out out"]]:
        return policy.step(self, state, x, lengths)

    def step_layers(
        self, state: tuple | None, x: Float[Array, "batch time in"], lengths: Lengths = None
    ) -> tuple[tuple, Float[Array, "batch time_out out"]]:
        """`step`, computed layer by layer."""
        return step_all(self.layers(), state, x, lengths)

    def output_lengths(self, lengths: Lengths) -> Lengths:
        for layer in self.layers():
            lengths = layer.output_lengths(lengths)
        return lengths


def is_real(lengths: Int[Array, " batch"], size: int) -> Bool[Array, "batch {size}"]:
    """Which of the first `size` positions of each row come before its end."""
    return jnp.arange(size, dtype=lengths.dtype)[None] < lengths[:, None]


def fill_beyond(
    x: Float[Array, "batch time channels"], lengths: Lengths, pad_mode: str
) -> Float[Array, "batch time channels"]:
    """Overwrite what comes after the end of each row, so that its values cannot matter.

    Args:
        pad_mode: "constant" writes zeros, "replicate" writes the last real value of each row.
    """
    if lengths is None:
        return x
    filling = jnp.zeros((), x.dtype)
    if pad_mode == "replicate":
        last = jnp.maximum(lengths - 1, 0)[:, None, None]
        filling = jnp.take_along_axis(x, last, axis=1)
    return jnp.where(is_real(lengths, x.shape[1])[:, :, None], x, filling)


def batch_size(state: Any) -> int:
    """How many streams a state belongs to."""
    return jax.tree.leaves(state)[0].shape[0]


def select_rows(rows: Bool[Array, " batch"], if_true: State, if_false: State) -> State:
    """Take each row of a state from `if_true` or from `if_false`."""

    def select(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.where(jnp.expand_dims(rows, range(1, a.ndim)), a, b)

    return jax.tree.map(select, if_true, if_false)


def keep_idle_rows(lengths: Lengths, new_state: State, state: State) -> State:
    """The new state, but the old state of each row without a real position in this step."""
    return new_state if lengths is None else select_rows(lengths > 0, new_state, state)
