"""A convolution by phases and its gradients are those of an ordinary one."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

from mimi_jax.train.discriminator import DILATIONS, ScaleDiscriminator
from mimi_jax.train.phases import conv_general_dilated

LAYOUT = lax.ConvDimensionNumbers((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2))


@pytest.mark.parametrize("dilation", DILATIONS)
@pytest.mark.parametrize(
    ("columns", "taps", "stride", "padding"),
    [
        (33, 9, 2, (4, 4)),
        (32, 9, 2, (4, 4)),
        (17, 4, 3, (1, 2)),
        (10, 3, 2, (0, 0)),
        (9, 9, 1, (4, 4)),
        (12, 9, 1, (4, 4)),
        (9, 4, 1, (0, 1)),
        (9, 2, 3, (0, 0)),
    ],
)
def test_results_and_gradients_equal_those_of_lax(
    columns: int, taps: int, stride: int, padding: tuple[int, int], dilation: int
):
    keys = jax.random.split(jax.random.key(0), 3)
    x, kernel = jax.random.normal(keys[0], (2, 12, columns, 3)), jax.random.normal(keys[1], (3, taps, 3, 5))

    def run(conv):
        def call(x, kernel):
            pads = [(dilation, dilation), padding]
            return conv(
                x,
                kernel,
                (1, stride),
                pads,
                rhs_dilation=(dilation, 1),
                dimension_numbers=LAYOUT,
                precision="highest",
            )

        result, pull_back = jax.vjp(call, x, kernel)
        return result, *pull_back(jax.random.normal(keys[2], result.shape))

    for ours, theirs in zip(run(conv_general_dilated), run(lax.conv_general_dilated), strict=True):
        assert ours.shape == theirs.shape
        np.testing.assert_allclose(ours, theirs, atol=1e-5 * float(jnp.abs(theirs).max()))


@pytest.mark.parametrize(("batch", "rows"), [(0, 4), (2, 0)])
def test_nothing_gives_nothing(batch: int, rows: int):
    x, kernel = jnp.ones((batch, rows, 9, 3)), jnp.ones((3, 9, 3, 5))
    result = conv_general_dilated(x, kernel, (1, 1), [(1, 1), (4, 4)], dimension_numbers=LAYOUT)
    assert result.shape == (batch, rows, 9, 5)


def test_the_discriminator_has_no_convolution_with_holes():
    judge = ScaleDiscriminator(1, 4, 128, rngs=nnx.Rngs(0))

    def loss(audio: jax.Array) -> Any:
        return sum(jnp.sum(feature**2) for feature in judge(audio)[1])

    program = str(jax.make_jaxpr(jax.grad(loss))(jnp.ones((1, 1, 2000))))
    assert "conv_general_dilated" in program
    assert "lhs_dilation=(1, 2)" not in program
    assert "window_strides=(1, 2)" not in program
