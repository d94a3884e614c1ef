"""A Transformer's step of few rows gives the numbers of its layers, one after the other."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mimi_jax import MimiConfig
from mimi_jax.nn.streaming import select_rows
from mimi_jax.nn.transformer import Transformer
from tests.models import noise, random_module, relative_error

CONFIG = MimiConfig(
    hidden_size=32,
    upsample_groups=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=4,
    head_dim=8,
    sliding_window=10,
)


@pytest.mark.parametrize(
    "changes",
    [{}, {"num_key_value_heads": 2}, {"attention_bias": True}, {"hidden_act": "relu", "rope_theta": 50.0}],
    ids=str,
)
def test_a_step_of_few_rows_is_a_step(changes: dict):
    """For several rounds of the ring, in rows that begin and pause at different times."""
    transformer = random_module(lambda rngs: Transformer(dataclasses.replace(CONFIG, **changes), rngs=rngs))
    expected_state = state = transformer.init_state(3)
    by_layers, by_few_rows = jax.jit(transformer.step_layers), jax.jit(transformer.step_few_rows)
    generator = np.random.default_rng(0)
    for number in range(40):
        x = jnp.asarray(noise(3, 2, 32, seed=number))
        lengths = jnp.asarray(2 * generator.integers(0, 2, 3), jnp.int32)
        expected_state, expected = by_layers(expected_state, x, lengths)
        state, out = by_few_rows(state, x, lengths)
        active = lengths > 0
        zeros = jnp.zeros_like(out)
        assert relative_error(*(select_rows(active, y, zeros) + 1e-9 for y in (out, expected))) < 1e-5
        for leaf, other in zip(jax.tree.leaves(state), jax.tree.leaves(expected_state), strict=True):
            np.testing.assert_allclose(leaf, other, rtol=0, atol=1e-5)


def test_only_the_first_layer_holds_the_position():
    transformer = random_module(lambda rngs: Transformer(CONFIG, rngs=rngs))
    state = transformer.init_state(1)
    for step in (transformer.step_layers, transformer.step_few_rows):
        new_state, _ = jax.eval_shape(step, state, jnp.zeros((1, 2, 32)))
        assert jax.tree.structure(new_state) == jax.tree.structure(state)
        assert [layer.position is None for layer in new_state] == [False, True, True]
