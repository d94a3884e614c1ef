"""Layers with several positions a row beside the layers themselves."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from mimi_jax.config import MimiConfig
from mimi_jax.nn import polyphase
from mimi_jax.nn.conv import Conv1d
from mimi_jax.nn.seanet import DecoderBack, DecoderStage, EncoderFront, EncoderStage
from mimi_jax.nn.streaming import Chain
from mimi_jax.ops import policy
from tests.models import check_step, noise, random_like, random_module, relative_error

BATCH = 3  # one row ends early, and one is idle
TOLERANCE = 1e-6  # float32, other orders of sums


class Case(NamedTuple):
    operation: str
    ratio: int
    fields: dict[str, Any] = {}  # noqa: RUF012


CASES = {
    "encoder stage": Case("encoder_stage", 4),
    "encoder stage, odd ratio": Case("encoder_stage", 5),
    "encoder stage, dilated blocks": Case("encoder_stage", 4, {"num_residual_layers": 3}),
    "encoder stage, long kernel": Case(
        "encoder_stage", 2, {"residual_kernel_size": 7, "use_conv_shortcut": True}
    ),
    "encoder front": Case("encoder_front", 4),
    "encoder front, ratio of one": Case("encoder_front", 1, {"kernel_size": 5}),
    "decoder stage": Case("decoder_stage", 6, {"use_conv_shortcut": True}),
    "decoder back": Case("decoder_back", 4),
    "decoder back, dilated blocks": Case("decoder_back", 3, {"num_residual_layers": 2}),
}


def make_part(case: Case) -> Chain:
    config, channels = MimiConfig(**case.fields), 8

    def build(rngs: nnx.Rngs) -> Chain:
        if case.operation.startswith("encoder"):
            stage = EncoderStage(config, channels, case.ratio, rngs=rngs)
            first = Conv1d(1, channels, config.kernel_size, rngs=rngs)
            ends = EncoderFront(first, stage, inputs_per_step=1)
        else:
            stage = DecoderStage(config, 2 * channels, case.ratio, rngs=rngs)
            last = Conv1d(channels, 1, config.last_kernel_size, activation=policy.elu, rngs=rngs)
            ends = DecoderBack(stage, last, inputs_per_step=1)
        return stage if case.operation == stage.operation else ends

    return random_module(build)


def make_input(part: Chain, case: Case, strides: int) -> jax.Array:
    """[BATCH, time, channels], for so many positions of the lower rate."""
    channels = jax.tree.leaves(part.init_state(1))[0].shape[-1]
    return jnp.asarray(
        noise(BATCH, strides * (case.ratio if case.operation.startswith("encoder") else 1), channels)
    )


# A stride of the encoder's end is shorter than what its first convolution remembers.
@pytest.mark.parametrize(("name", "strides"), [*[(name, 3) for name in CASES], ("encoder front", 1)])
def test_the_numbers_are_those_of_the_layers(name: str, strides: int):
    case = CASES[name]
    part = make_part(case)
    assert polyphase.fits(part)
    x = make_input(part, case, strides)
    state = random_like(part.init_state(BATCH), 1)
    for lengths in (None, jnp.array([x.shape[1], x.shape[1] // 2 + 1, 0], jnp.int32)):
        check_step(jax.jit(polyphase.step), part, state, x, lengths, TOLERANCE)


@pytest.mark.parametrize("name", ["encoder front", "decoder back", "encoder stage, long kernel"])
def test_the_gradients_are_those_of_the_layers(name: str):
    case = CASES[name]
    part = make_part(case)
    x = make_input(part, case, 5)

    def gradients(step: Any) -> Any:
        def loss(part: Chain, x: jax.Array) -> jax.Array:
            return jnp.sum(step(part, part.init_state(BATCH), x, None)[1] ** 2)

        return jax.tree.leaves(jax.jit(jax.grad(loss, (0, 1)))(part, x))

    expected = gradients(lambda part, *inputs: part.step_layers(*inputs))
    for ours, theirs in zip(gradients(polyphase.step), expected, strict=True):
        assert relative_error(ours, theirs) < 10 * TOLERANCE
