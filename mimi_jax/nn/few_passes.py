"""The layers next to the waveform, written so that XLA:GPU moves fewer activations through memory.

There activations are largest. The numbers are those of the layers one after the other.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from mimi_jax.nn.streaming import Lengths, step_all
from mimi_jax.ops import policy

StepResult = tuple[tuple, Float[Array, "batch time_out out"]]


def step_encoder_front(
    layers: Sequence[Any], state: tuple, x: Float[Array, "batch samples in"], lengths: Lengths
) -> StepResult:
    """Step the first convolution and the `EncoderStage` after it."""
    first, stage = layers
    step_first = policy.asking(convolution="multiply_adds")(first.step)
    first_state, (block_state, *rest_state) = state
    block, *rest = stage.layers()
    y = step_all(block.layers(), block_state, step_first(first_state, x, lengths)[1], lengths)[1]
    # The widest activations are computed again, since reading them would take longer. XLA must not see that
    # they are the same, nor that `y` is a convolution to which it could add them. States are made of the
    # second ones: XLA fuses the first ones only into a single operation.
    x, y = lax.optimization_barrier((x, y))
    first_state, x = step_first(first_state, x, lengths)
    block_state, _ = step_all(block.layers(), block_state, x, lengths)
    rest_state, y = step_all(rest, tuple(rest_state), block.skip(x) + y, lengths)
    return (first_state, (block_state, *rest_state)), y


def step_decoder_back(
    layers: Sequence[Any], state: tuple, x: Float[Array, "batch time in"], lengths: Lengths
) -> StepResult:
    """Step the last `DecoderStage` and the convolution after it."""
    (stage, last), (stage_state, last_state) = layers, state
    stage_state, y = stage.step(stage_state, x, lengths)
    lengths = stage.output_lengths(lengths)

    def cast(tree: Any, dtype: DTypeLike) -> Any:
        return jax.tree.map(lambda a: a if a.dtype == jnp.int32 else a.astype(dtype), tree)

    # XLA fuses ELU into a reduction if nothing between them is rounded.
    with policy.asking(convolution="multiply_adds", join="sum"):
        last_state, y = cast(last, jnp.float32).step(*cast((last_state, y), jnp.float32), lengths)
    return cast(((stage_state, last_state), y), x.dtype)
