"""The one rule of visibility, and every implementation of attention against the definition."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mimi_jax.ops import policy
from mimi_jax.ops.attention import banded_attention, reference_attention, visible
from mimi_jax.ops.fused_attention import cudnn_attention, splash_attention
from tests.models import noise, relative_error


def test_visible():
    """Window 3: a query sees itself and the two keys before it, none after, and none before position 1."""
    queries, keys = jnp.arange(6)[:, None], jnp.arange(6)[None]
    assert visible(queries, keys, 1, 3).astype(int).tolist() == [
        [0, 0, 0, 0, 0, 0],
        [0, 1, 0, 0, 0, 0],
        [0, 1, 1, 0, 0, 0],
        [0, 1, 1, 1, 0, 0],
        [0, 0, 1, 1, 1, 0],
        [0, 0, 0, 1, 1, 1],
    ]


def attention_by_loops(query: np.ndarray, key: np.ndarray, value: np.ndarray, window: int) -> np.ndarray:
    """One row: each query's average of the values, weighted by its softmax over the window."""
    time, heads, head_dim = query.shape
    share = heads // key.shape[1]
    out = np.zeros(query.shape)
    for t, head in np.ndindex(time, heads):
        seen = slice(max(0, t - window + 1), t + 1)
        scores = key[seen, head // share] @ query[t, head] / math.sqrt(head_dim)
        weights = np.exp(scores - scores.max())
        out[t, head] = weights @ value[seen, head // share] / weights.sum()
    return out


@pytest.mark.parametrize("attend", [reference_attention, banded_attention])
@pytest.mark.parametrize(
    ("time", "window", "heads", "key_value_heads"),
    [(1, 4, 2, 2), (4, 4, 2, 2), (13, 4, 4, 2), (12, 4, 4, 1), (9, 4, 2, 1), (5, 1, 2, 2), (5, 8, 2, 2)],
)
def test_attention_equals_the_loops(attend, time: int, window: int, heads: int, key_value_heads: int):
    query = noise(2, time, heads, 6, seed=1)
    key, value = (noise(2, time, key_value_heads, 6, seed=seed) for seed in (2, 3))
    out = jax.jit(functools.partial(attend, window=window))(query, key, value)
    for row in range(2):
        expected = attention_by_loops(query[row], key[row], value[row], window)
        assert relative_error(out[row], expected) < 1e-6


def gradients(attend, query, key, value, weights) -> tuple[jax.Array, ...]:
    def loss(q, k, v):
        return jnp.vdot(attend(q, k, v), weights)

    return jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(query, key, value)


def test_gradients_of_banded_attention_equal_the_reference():
    tensors = noise(2, 13, 4, 6), noise(2, 13, 2, 6, seed=1), noise(2, 13, 2, 6, seed=2)
    weights = noise(2, 13, 4, 6, seed=3)
    actual, expected = (
        gradients(functools.partial(attend, window=4), *tensors, weights)
        for attend in (banded_attention, reference_attention)
    )
    for a, e in zip(actual, expected, strict=True):
        assert relative_error(a, e) < 1e-5


# time, window, key_value_heads: within one block of 128 and beyond, a window that is wider than a block
@pytest.mark.parametrize(("time", "window", "key_value_heads"), [(100, 30, 2), (300, 250, 2), (300, 30, 1)])
def test_splash_attention_equals_the_reference(time: int, window: int, key_value_heads: int):
    """Forward and gradient; in the interpreter, which runs a TPU kernel on any machine."""
    query, weights = noise(2, time, 2, 64, seed=1), noise(2, time, 2, 64, seed=4)
    key, value = (noise(2, time, key_value_heads, 64, seed=seed) for seed in (2, 3))
    splash = functools.partial(splash_attention, window=window, interpret=True)
    reference = functools.partial(reference_attention, window=window)
    tensors = query, key, value
    assert relative_error(jax.jit(splash)(*tensors), reference(*tensors)) < 1e-5
    actual, expected = (gradients(attend, *tensors, weights) for attend in (splash, reference))
    for a, e in zip(actual, expected, strict=True):
        assert relative_error(a, e) < 1e-5


@pytest.mark.gpu
@pytest.mark.parametrize(("time", "window", "dtype"), [(100, 30, jnp.float16), (750, 250, jnp.bfloat16)])
def test_cudnn_attention_equals_the_reference(time: int, window: int, dtype):
    """Forward and gradient, as far as the dtype goes; and it is what the automatic choice takes."""
    if jax.default_backend() != "gpu":
        pytest.skip(f"needs an NVIDIA GPU; JAX computes on {jax.default_backend()}")
    tensors = [jnp.asarray(noise(2, time, 8, 64, seed=seed), dtype) for seed in range(4)]
    query, key, value, _ = tensors
    exact = [tensor.astype(jnp.float32) for tensor in tensors]
    cudnn = functools.partial(cudnn_attention, window=window)
    reference = functools.partial(reference_attention, window=window)
    out = jax.jit(cudnn)(query, key, value)
    assert relative_error(out, reference(*exact[:3])) < 1e-2
    with policy.computing(policy.resolve("auto")):
        chosen = jax.jit(functools.partial(policy.attention, window=window))(query, key, value)
    np.testing.assert_array_equal(chosen, out)
    for a, e in zip(gradients(cudnn, *tensors), gradients(reference, *exact), strict=True):
        assert relative_error(a, e) < 2e-2
