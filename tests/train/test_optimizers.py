"""The learning rate of each step, seen in what the optimizers do with a gradient that stays the same."""

import itertools
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from mimi_jax.train.optimizers import make_optimizers, update
from tests.train.recipes import tiny_recipe

RATE = 0.1


def rates(optimizer, steps: int) -> list[float]:
    """How far a weight moves in each step: with a constant gradient, Adam moves it by the learning rate."""
    weights: Any = {"x": jnp.zeros(())}
    state, places = optimizer.init(weights), [0.0]
    for _ in range(steps):
        weights, state, _ = update(optimizer, {"x": jnp.ones(())}, state, weights)
        places.append(float(weights["x"]))
    return [before - after for before, after in itertools.pairwise(places)]


@pytest.mark.parametrize(
    ("start", "head_start", "model_steps", "judge_steps"),
    [
        pytest.param(0, 0, 12, 12, id="no waiting"),
        pytest.param(5, 4, 8, 7, id="both wait"),
        pytest.param(9, 5, 9, 3, id="the head start does not end"),
        pytest.param(20, 5, 12, 0, id="no discriminator comes"),
    ],
)
def test_a_cosine_ends_with_the_last_step_that_learns(
    start: int, head_start: int, model_steps: int, judge_steps: int
):
    recipe = tiny_recipe(
        steps=12,
        optimizer__schedule="cosine",
        optimizer__learning_rate=RATE,
        losses__adversarial=4.0,
        losses__adversarial_start=start,
        discriminator__head_start=head_start,
    )
    for optimizer, steps in zip(make_optimizers(recipe), (model_steps, judge_steps), strict=True):
        expected = RATE * (1 + np.cos(np.pi * np.arange(steps) / max(steps, 1))) / 2
        np.testing.assert_allclose(rates(optimizer, steps), expected, rtol=1e-3)
