"""What steps compute on GPUs gives the numbers of the plain ways."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mimi_jax.ops.convolution import plain_convolution
from mimi_jax.ops.few_rows import SCANS, convolution_by_windows, product_as_sums, product_of_repeated_rows
from tests.models import noise, relative_error


@pytest.mark.parametrize("size_in", [1, 6])
@pytest.mark.parametrize("time", [16, 41])
@pytest.mark.parametrize(
    ("taps", "stride", "dilation"), [(1, 1, 1), (7, 1, 1), (8, 4, 1), (7, 2, 1), (3, 1, 4), (10, 5, 1)]
)
def test_a_convolution_by_windows_is_the_plain_one(
    taps: int, stride: int, dilation: int, time: int, size_in: int
):
    x, kernel = noise(2, time, size_in), noise(taps, size_in, 5, seed=1)
    expected, out = (
        convolve(jnp.asarray(x), jnp.asarray(kernel), stride=stride, dilation=dilation)
        for convolve in (plain_convolution, convolution_by_windows)
    )
    assert out.shape == expected.shape
    assert relative_error(out, expected) < 1e-6


@pytest.mark.parametrize("batch", [1, 2, 3, 5])
def test_products_of_few_rows_are_the_plain_one(batch: int):
    x, kernel = noise(batch, 2, 6), noise(6, 5, seed=1)
    repeated = product_of_repeated_rows(jnp.asarray(x), jnp.asarray(kernel), (((2,), (0,)), ((), ())))
    sums = product_as_sums(jnp.asarray(x), jnp.asarray(kernel[:, :3]), jnp.asarray(kernel[:, 3:]))
    assert relative_error(repeated, x @ kernel) < 1e-6
    assert relative_error(sums, x @ kernel) < 1e-6


def test_half_precision_adds_in_float32():
    x, kernel = (jnp.asarray(noise(*shape), jnp.bfloat16) for shape in ((1, 2, 512), (512, 8)))
    expected = np.asarray(x, np.float32) @ np.asarray(kernel, np.float32)
    repeated = product_of_repeated_rows(x, kernel, (((2,), (0,)), ((), ())))
    convolved = convolution_by_windows(x, kernel[None])
    for out in (repeated, product_as_sums(x, kernel), convolved):
        assert out.dtype == jnp.bfloat16
        np.testing.assert_allclose(out.astype(jnp.float32), expected, rtol=2**-8, atol=1e-2)


def test_an_unrolled_scan_is_the_loop():
    def step(total: jax.Array, level: tuple) -> tuple[jax.Array, jax.Array]:
        number, x = level
        return total + number * x, total

    numbers, x = np.arange(4, dtype=np.int32), jnp.arange(12, dtype=jnp.int32).reshape(4, 3)
    loop, unrolled = (scan(jnp.ones(3, jnp.int32), function=step, xs=(numbers, x)) for scan in SCANS.values())
    jax.tree.map(np.testing.assert_array_equal, unrolled, loop)
