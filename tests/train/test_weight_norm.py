import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mimi_jax.checkpoint.layouts.names import CONV, conv_transpose, fold_weight_norm
from mimi_jax.train.weight_norm import NormalizedKernel, fold, normalize

SHAPES = {"conv": (3, 4, 6), "conv2d": (3, 9, 2, 5), "conv_transpose": (2, 1, 6, 4, 3)}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_folding_gives_the_kernel(shape: tuple[int, ...]):
    kernel = jax.random.normal(jax.random.key(0), shape)
    np.testing.assert_allclose(fold(normalize(kernel)), kernel, rtol=1e-6)
    pair = normalize(kernel)
    np.testing.assert_allclose(
        fold(NormalizedKernel(2 * pair.length, 5 * pair.direction)), 2 * kernel, rtol=1e-6
    )


@pytest.mark.parametrize(
    ("name", "layout"),
    [("conv", CONV), ("conv_transpose", conv_transpose(1))],
    ids=["conv", "conv_transpose"],
)
def test_lengths_are_those_of_torch(name: str, layout):
    """torch takes the norm over all axes but the first, in its own order of axes."""
    kernel = np.asarray(jax.random.normal(jax.random.key(1), SHAPES[name]))
    theirs = np.ascontiguousarray(layout.save(kernel))
    length = np.linalg.norm(theirs.reshape(len(theirs), -1), axis=1)
    np.testing.assert_allclose(normalize(jnp.asarray(kernel)).length.ravel(), length, rtol=1e-6)
    g = 3 * length.reshape(-1, 1, 1)
    pair = NormalizedKernel(jnp.asarray(3 * normalize(jnp.asarray(kernel)).length), jnp.asarray(kernel))
    np.testing.assert_allclose(fold(pair), layout.load(fold_weight_norm(g, theirs)), rtol=1e-5)


def test_the_gradient_does_not_lengthen_the_direction():
    kernel = jax.random.normal(jax.random.key(2), (3, 4, 6))
    pair = normalize(kernel)
    gradient = jax.grad(lambda pair: jnp.sum(jnp.sin(fold(pair))))(pair)
    along = jnp.sum(gradient.direction * pair.direction, axis=(0, 1))
    np.testing.assert_allclose(along, 0, atol=1e-5)
    assert float(jnp.abs(gradient.length).min()) > 0


def test_a_channel_of_zeros_stays_zero_and_can_learn():
    kernel = jax.random.normal(jax.random.key(3), (3, 4, 6)).at[:, :, 2].set(0)
    pair = normalize(kernel)
    np.testing.assert_allclose(fold(pair), kernel, rtol=1e-6)
    gradient = jax.grad(lambda pair: jnp.sum(fold(pair)))(pair)
    assert all(np.isfinite(part).all() for part in gradient)
    assert gradient.direction[:, :, 2].any()


def test_other_weights_do_not_change():
    bias = jnp.ones(3)
    assert fold(bias) is bias
