"""The one rule of visibility, rotary positions, and every backend against the definition."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mimi_jax.attention import (
    BACKENDS,
    Attention,
    choose_backend,
    reference_attention,
    rotate,
    visible,
)
from tests.models import noise, random_module, relative_error


def test_visible():
    """Window 3: a query sees itself and the two keys before it, none after, and none before position 1."""
    queries, keys = jnp.arange(6)[:, None], jnp.arange(6)
    assert visible(queries, keys, 1, 3).astype(int).tolist() == [
        [0, 0, 0, 0, 0, 0],
        [0, 1, 0, 0, 0, 0],
        [0, 1, 1, 0, 0, 0],
        [0, 1, 1, 1, 0, 0],
        [0, 0, 1, 1, 1, 0],
        [0, 0, 0, 1, 1, 1],
    ]


def attention_by_loops(query: np.ndarray, key: np.ndarray, value: np.ndarray, window: int) -> np.ndarray:
    """One row, all keys real: each query's average of the values, weighted by its softmax over the window."""
    time, heads, head_dim = query.shape
    past, share = len(key) - time, heads // key.shape[1]
    out = np.zeros(query.shape)
    for t, head in np.ndindex(time, heads):
        seen = slice(max(0, past + t - window + 1), past + t + 1)
        scores = key[seen, head // share] @ query[t, head] / math.sqrt(head_dim)
        weights = np.exp(scores - scores.max())
        out[t, head] = weights @ value[seen, head // share] / weights.sum()
    return out


# time, window, past, num_past (for two rows; None: all real), heads, key_value_heads
COMBINATIONS = [
    (1, 4, 0, None, 2, 2),
    (4, 4, 0, None, 2, 2),
    (13, 4, 0, None, 4, 2),
    (12, 4, 3, [0, 3], 2, 2),
    (13, 4, 3, [2, 1], 4, 1),
    (3, 4, 3, [3, 0], 2, 2),
    (9, 4, 7, [6, 2], 2, 1),  # more past than the window needs
    (9, 4, 2, None, 2, 2),  # less
    (5, 1, 0, None, 2, 2),
    (5, 1, 2, [2, 0], 2, 2),
    (5, 8, 7, [1, 7], 2, 2),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("time", "window", "past", "num_past", "heads", "key_value_heads"), COMBINATIONS)
def test_backends_equal_the_loops(
    backend: str,
    time: int,
    window: int,
    past: int,
    num_past: list[int] | None,
    heads: int,
    key_value_heads: int,
):
    query = noise(2, time, heads, 6, seed=1)
    key, value = (noise(2, past + time, key_value_heads, 6, seed=seed) for seed in (2, 3))
    real = None if num_past is None else jnp.array(num_past)
    out = jax.jit(lambda q, k, v, n: BACKENDS[backend](q, k, v, window=window, num_past=n))(
        query, key, value, real
    )
    for row in range(2):
        start = 0 if num_past is None else past - num_past[row]
        expected = attention_by_loops(query[row], key[row, start:], value[row, start:], window)
        assert relative_error(out[row], expected) < 1e-6


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "reference"])
def test_gradients_of_backends_equal_the_reference(backend: str):
    tensors = noise(2, 13, 4, 6), noise(2, 16, 2, 6, seed=1), noise(2, 16, 2, 6, seed=2)
    weights, num_past = noise(2, 13, 4, 6, seed=3), jnp.array([1, 3])

    def gradients(attend):
        def loss(q, k, v):
            return jnp.vdot(attend(q, k, v, window=4, num_past=num_past), weights)

        return jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(*tensors)

    for actual, expected in zip(gradients(BACKENDS[backend]), gradients(reference_attention), strict=True):
        assert relative_error(actual, expected) < 1e-5


def test_long_inputs_take_the_banded_backend():
    assert [choose_backend(time, 250) for time in (1, 500, 501)] == ["reference", "reference", "banded"]


def test_an_unknown_backend_is_refused():
    with pytest.raises(ValueError, match="attention must be one of reference, banded, got 'flash'"):
        random_module(lambda rngs: Attention(6, 2, 2, 4, 4, backend="flash", rngs=rngs))


def test_rotate_turns_pairs_of_halves():
    """The first half of the features are the real parts, the second half the imaginary parts."""
    x, positions, theta = noise(2, 5, 3, 8), np.array([-3, 0, 1, 2, 100]), 50.0
    angles = positions[:, None] * theta ** -(np.arange(4) / 4)
    expected = (x[..., :4] + 1j * x[..., 4:]) * np.exp(1j * angles)[:, None]
    actual = rotate(jnp.asarray(x), jnp.asarray(positions), theta)
    assert relative_error(actual, np.concatenate([expected.real, expected.imag], axis=-1)) < 1e-6


@pytest.mark.parametrize("shift", [-7, 1, 250])
def test_only_relative_positions_matter(shift: int):
    query, key = (jnp.asarray(noise(1, 6, 2, 8, seed=seed)) for seed in (1, 2))

    def scores(first: int) -> jax.Array:
        positions = jnp.arange(first, first + 6)
        rotated = rotate(query, positions, 1e4), rotate(key, positions, 1e4)
        return jnp.einsum("bqhd,bkhd->bhqk", *rotated)

    assert relative_error(scores(shift), scores(0)) < 1e-5
    assert relative_error(rotate(query, jnp.zeros(6), 1e4), query) == 0


def test_attention_forgets_after_its_window():
    layer = jax.jit(random_module(lambda rngs: Attention(6, 2, 2, 4, 4, rngs=rngs)))
    x = jnp.asarray(noise(2, 30, 6))
    assert relative_error(layer(x)[:, -1], layer(x[:, -4:])[:, -1]) < 1e-5
