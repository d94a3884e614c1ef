import jax.numpy as jnp
import numpy as np
import pytest

from mimi_jax.ops.pieces import piece_size, step_in_pieces
from tests.models import noise


@pytest.mark.parametrize(
    ("time", "largest", "unit", "size"),
    [
        (1000, 600, 100, 500),  # two pieces without a rest, rather than 600 and 400
        (1000, 400, 200, 400),  # no multiple of 200 above half of 400 divides 1000
        (700, 600, 100, 600),  # seven units have no divisor above half of six
        (1200, 600, 100, 600),
    ],
)
def test_pieces_leave_no_rest_if_they_can(time: int, largest: int, unit: int, size: int):
    assert piece_size(time, largest, unit) == size


@pytest.mark.parametrize("time", [1, 4, 5, 8, 11])
def test_pieces_are_steps_one_after_the_other(time: int):
    def step(state, x, lengths):
        sums = state[:, None] + jnp.cumsum(x, axis=1)
        return sums[:, -1], sums

    x = jnp.asarray(noise(2, time, 3))
    expected = step(jnp.zeros((2, 3)), x, None)
    for result, whole in zip(
        step_in_pieces(step, jnp.zeros((2, 3)), x, None, largest=4), expected, strict=True
    ):
        np.testing.assert_allclose(result, whole, rtol=1e-5, atol=1e-5)
