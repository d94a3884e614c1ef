"""Rotary positions, and what the attention layer remembers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mimi_jax.nn.attention import Attention, rotate, turns
from tests.models import noise, random_module, relative_error


def test_rotate_turns_pairs_of_halves():
    """The first half of the features are the real parts, the second half the imaginary parts."""
    x, positions, theta = noise(2, 5, 3, 8), np.array([3, 0, 1, 2, 100]), 50.0
    angles = positions[:, None] * theta ** -(np.arange(4) / 4)
    expected = (x[..., :4] + 1j * x[..., 4:]) * np.exp(1j * angles)[:, None]
    actual = rotate(jnp.asarray(x), turns(101, 8, theta)[None, positions])
    assert relative_error(actual, np.concatenate([expected.real, expected.imag], axis=-1)) < 1e-6


@pytest.mark.parametrize("shift", [1, 7, 250])
def test_only_relative_positions_matter(shift: int):
    query, key = (jnp.asarray(noise(1, 6, 2, 8, seed=seed)) for seed in (1, 2))

    def scores(first: int) -> jax.Array:
        turn = turns(256, 8, 1e4)[None, first : first + 6]
        rotated = rotate(query, turn), rotate(key, turn)
        return jnp.einsum("bqhd,bkhd->bhqk", *rotated)

    assert relative_error(scores(shift), scores(0)) < 1e-5
    assert relative_error(rotate(query, turns(1, 8, 1e4)[None]), query) == 0


def test_attention_forgets_after_its_window():
    layer = jax.jit(random_module(lambda rngs: Attention(6, 2, 2, 4, 4, rngs=rngs)))
    x = jnp.asarray(noise(2, 30, 6))
    assert relative_error(layer(x)[:, -1], layer(x[:, -4:])[:, -1]) < 1e-5
