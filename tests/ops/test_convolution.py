"""Each way to compute a convolution, a product or ELU gives the numbers of the plain one."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.typing import DTypeLike

from mimi_jax.ops import policy
from mimi_jax.ops.convolution import CONVOLUTIONS, ELUS, JOINS, PRODUCTS
from tests.models import noise, relative_error


@pytest.mark.parametrize(("taps", "stride"), [(1, 1), (3, 1), (8, 4), (10, 5)])
def test_a_convolution_by_strides_is_the_plain_one(taps: int, stride: int):
    x, kernel = noise(2, 40, 6), noise(taps, 6, 5, seed=1)
    plain, strides = (CONVOLUTIONS[name](x, kernel, stride=stride) for name in ("plain", "strides"))
    assert relative_error(strides, plain) < 1e-6


def results(name: str, x: np.ndarray, kernel: np.ndarray, **how: int) -> list[jax.Array]:
    """What a convolution gives, and its gradients."""
    convolution = functools.partial(CONVOLUTIONS[name], **how)
    out, pull_back = jax.jit(lambda x, kernel: jax.vjp(convolution, x, kernel))(x, kernel)
    return [out, *pull_back(noise(*out.shape, seed=2))]


@pytest.mark.parametrize(("taps", "stride", "dilation"), [(7, 1, 1), (3, 1, 2), (8, 4, 1), (10, 5, 1)])
@pytest.mark.parametrize("name", ["plain", "gradients_for_eigen", "multiply_adds", "shifts"])
def test_XLA_need_not_rewrite_gradients_of_convolutions(name: str, taps: int, stride: int, dilation: int):
    """What it gives to Eigen on CPUs has its axes in this order. It does not rewrite others in loops."""
    x, kernel = noise(2, 45, 6), noise(taps, 6, 5, seed=1)
    convolution = functools.partial(CONVOLUTIONS[name], stride=stride, dilation=dilation)
    gradients = jax.grad(lambda *inputs: jnp.sum(jnp.sin(convolution(*inputs))), argnums=(0, 1))
    program = jax.jit(gradients).lower(x, kernel).as_text()
    orders = re.findall("dim_numbers = (.*?), window", program)
    assert len(orders) >= 2
    assert (set(orders) == {"[b, 0, f]x[0, i, o]->[b, 0, f]"}) == (name != "plain")


@pytest.mark.parametrize(("taps", "stride", "dilation"), [(7, 1, 1), (3, 1, 2), (8, 4, 1), (1, 2, 1)])
@pytest.mark.parametrize(("size_in", "size_out"), [(1, 5), (2, 5), (6, 1)])
def test_a_convolution_by_multiply_adds_is_the_plain_one(
    taps: int, stride: int, dilation: int, size_in: int, size_out: int
):
    x, kernel = noise(2, 41, size_in), noise(taps, size_in, size_out, seed=1)
    how = {"stride": stride, "dilation": dilation}
    pairs = zip(results("multiply_adds", x, kernel, **how), results("plain", x, kernel, **how), strict=True)
    for multiply_adds, plain in pairs:
        assert relative_error(multiply_adds, plain) < 1e-6


@pytest.mark.parametrize(
    ("taps", "stride", "dilation"), [(1, 1, 1), (3, 1, 1), (3, 1, 4), (7, 1, 2), (8, 4, 1), (10, 5, 1)]
)
@pytest.mark.parametrize("size_out", [1, 5])
def test_a_convolution_by_shifts_is_the_plain_one(taps: int, stride: int, dilation: int, size_out: int):
    x, kernel = noise(2, 43, 6), noise(taps, 6, size_out, seed=1)
    how = {"stride": stride, "dilation": dilation}
    for shifts, plain in zip(
        results("shifts", x, kernel, **how), results("plain", x, kernel, **how), strict=True
    ):
        assert relative_error(shifts, plain) < 1e-6


def test_a_join_by_sum_is_a_concatenation():
    past, x = noise(2, 3, 4), noise(2, 9, 4, seed=1)
    past[0], x[1, 0] = np.nan, np.inf  # neither reaches the other
    np.testing.assert_array_equal(JOINS["sum"](past, x), JOINS["plain"](past, x))


def test_a_convolution_by_strides_refuses_what_it_cannot_compute():
    with pytest.raises(ValueError, match="taps=7 must be a multiple of stride=2, and dilation=1 must be 1"):
        CONVOLUTIONS["strides"](noise(1, 40, 3), noise(7, 3, 4), stride=2)


@pytest.mark.parametrize("name", ["float32_sums", "convolution"])
def test_products_are_the_plain_one(name: str):
    x, kernel, dimensions = noise(2, 4, 6), noise(6, 5, seed=1), (((2,), (0,)), ((), ()))
    out = PRODUCTS[name](jnp.asarray(x), jnp.asarray(kernel), dimension_numbers=dimensions)
    assert relative_error(out, x @ kernel) < 1e-6


@pytest.mark.parametrize("name", ["exp", "min_max"])
def test_elu_is_exact_to_the_rounding_of_one(name: str):
    elu = ELUS[name]
    x = np.concatenate([np.linspace(-20, 20, 4001), [1e-8, -1e-8, 1e4, -1e4]]).astype(np.float32)
    exact = np.where(x > 0, x, np.expm1(np.minimum(x.astype(np.float64), 0)))
    np.testing.assert_allclose(jax.jit(elu)(x), exact, rtol=0, atol=1.2e-7)
    slopes = jax.vmap(jax.grad(elu))(jnp.array([-1e4, -1.0, 0.0, 1.0, 1e4]))
    np.testing.assert_allclose(slopes, [0, np.exp(-1), 1, 1, 1], rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_elu_in_half_precision_is_rounded_once(dtype: DTypeLike):
    """For every number of 16 bits, except those that XLA:CPU takes for zero."""
    numbers = np.arange(2**16, dtype=np.uint16).view(dtype)
    with np.errstate(invalid="ignore"):  # signalling NaN
        numbers = numbers[np.isfinite(numbers)]
    exact = numbers.astype(np.float64)
    is_normal = np.abs(exact) >= float(jnp.finfo(dtype).smallest_normal)
    numbers, exact = numbers[is_normal], exact[is_normal]
    exact = np.where(exact > 0, exact, np.expm1(np.minimum(exact, 0))).astype(dtype)
    np.testing.assert_array_equal(jax.jit(policy.elu)(numbers), exact)


def test_elu_by_min_max_computes_half_precision_in_float32():
    x = jnp.linspace(-20, 20, 4001).astype(jnp.bfloat16)
    expected = ELUS["min_max"](x.astype(jnp.float32)).astype(jnp.bfloat16)
    np.testing.assert_array_equal(jax.jit(ELUS["min_max"])(x), expected)


@pytest.mark.parametrize(("taps", "stride", "dilation"), [(3, 1, 1), (8, 4, 1), (7, 2, 1), (3, 1, 2)])
def test_half_precision_adds_in_float32(taps: int, stride: int, dilation: int):
    """Only the inputs and the output are rounded, whichever way it is computed."""
    x, kernel = (jnp.asarray(noise(*shape), jnp.bfloat16) for shape in ((2, 40, 128), (taps, 128, 16)))
    how = {"stride": stride, "dilation": dilation}
    expected = policy.convolution(x.astype(jnp.float32), kernel.astype(jnp.float32), **how)
    out = policy.convolution(x, kernel, **how)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(out.astype(jnp.float32), expected, rtol=2**-8, atol=1e-2)
