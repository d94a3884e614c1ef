"""Convolutions against loops in NumPy."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mimi_jax.nn.conv import Conv1d, ConvTranspose1d
from mimi_jax.nn.streaming import StreamingLayer
from tests.models import noise, random_module, relative_error


def run(layer: StreamingLayer, x: np.ndarray, lengths: list[int] | None = None) -> np.ndarray:
    return np.asarray(layer(jnp.asarray(x), None if lengths is None else jnp.array(lengths)))


def conv_by_loops(x: np.ndarray, layer: Conv1d, padding: tuple[int, int], mode: str) -> np.ndarray:
    """x [time, in] -> [time', out]: each output is a sum over the taps of a window of the padded input."""
    kernel, bias = np.asarray(layer.kernel), np.asarray(layer.bias)
    x = np.pad(x, (padding, (0, 0)), mode="edge" if mode == "replicate" else "constant")
    reach = (len(kernel) - 1) * layer.dilation
    windows = [
        x[start : start + reach + 1 : layer.dilation] for start in range(0, len(x) - reach, layer.stride)
    ]
    return np.stack([np.einsum("ki,kio->o", window, kernel) for window in windows]) + bias


CONVS = [
    # kernel_size, stride, dilation, pad_mode
    (1, 1, 1, "constant"),
    (7, 1, 1, "constant"),
    (3, 1, 4, "constant"),
    (4, 1, 3, "replicate"),
    (8, 4, 1, "constant"),
    (4, 2, 1, "replicate"),
    (3, 3, 1, "constant"),
    (3, 2, 2, "replicate"),
]


@pytest.mark.parametrize(("kernel_size", "stride", "dilation", "pad_mode"), CONVS)
def test_conv_sees_the_past_and_its_own_stride(kernel_size: int, stride: int, dilation: int, pad_mode: str):
    layer = random_module(
        lambda rngs: Conv1d(3, 2, kernel_size, stride=stride, dilation=dilation, pad_mode=pad_mode, rngs=rngs)
    )
    x = noise(2, 12, 3)
    before = (kernel_size - 1) * dilation + 1 - stride
    expected = [conv_by_loops(row, layer, (before, 0), pad_mode) for row in x]
    assert relative_error(run(layer, x), expected) < 1e-6


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("pad_mode", ["constant", "replicate"])
@pytest.mark.parametrize("length", [1, 2, 7, 8])
def test_a_clip_that_fills_no_whole_stride_is_padded_at_its_end(causal: bool, pad_mode: str, length: int):
    layer = random_module(lambda rngs: Conv1d(3, 2, 7, stride=4, causal=causal, pad_mode=pad_mode, rngs=rngs))
    x = np.where(np.arange(8)[:, None] < length, noise(8, 3), np.nan)
    before = 3 if causal else 2
    padding = (before, 3 - before - length % -4)
    expected = conv_by_loops(x[:length], layer, padding, pad_mode)
    assert relative_error(run(layer, x[None], [length])[0, : len(expected)], expected) < 1e-6


def test_the_activation_comes_before_the_padding():
    plain = random_module(lambda rngs: Conv1d(3, 2, 3, pad_mode="replicate", rngs=rngs))
    activated = random_module(
        lambda rngs: Conv1d(3, 2, 3, pad_mode="replicate", activation=jax.nn.elu, rngs=rngs)
    )
    x = noise(2, 5, 3)
    assert relative_error(run(activated, x), run(plain, np.where(x > 0, x, np.expm1(x)))) < 1e-6


def transposed_by_loops(x: np.ndarray, layer: ConvTranspose1d, trim_left: int) -> np.ndarray:
    """x [time, in] -> [time * stride, out]: each input adds its two strides of outputs to the sum."""
    kernel, bias = np.asarray(layer.kernel), np.asarray(layer.bias)
    _, groups, size_in, stride, size_out = kernel.shape
    kernel = np.concatenate(kernel[::-1], axis=2)  # [groups, in, 2 * stride, out]
    y = np.zeros(((len(x) + 1) * stride, groups, size_out))
    for time, group, channel in np.ndindex(len(x), groups, size_in):
        end = (time + 2) * stride
        y[end - 2 * stride : end, group] += x[time, group * size_in + channel] * kernel[group, channel]
    return y.reshape(len(y), -1)[trim_left : trim_left + len(x) * stride] + bias


TRANSPOSED = [
    # stride, groups, causal, trim_right_ratio
    (2, 1, True, 1.0),
    (5, 1, True, 1.0),
    (2, 6, True, 1.0),
    (3, 2, True, 1.0),
    (1, 1, True, 1.0),
    (5, 1, False, 1.0),
    (4, 6, False, 1.0),
    (5, 2, True, 0.5),
    (5, 1, True, 0.0),
]


@pytest.mark.parametrize(("stride", "groups", "causal", "ratio"), TRANSPOSED)
def test_transposed(stride: int, groups: int, causal: bool, ratio: float):
    layer = random_module(
        lambda rngs: ConvTranspose1d(
            6, 12, stride, groups=groups, causal=causal, trim_right_ratio=ratio, rngs=rngs
        )
    )
    x = noise(2, 4, 6)
    trim_left = stride - (math.ceil(stride * ratio) if causal else stride // 2)
    expected = [transposed_by_loops(row, layer, trim_left) for row in x]
    assert relative_error(run(layer, x), expected) < 1e-6
    lengths = [3, 1]
    ragged = np.where(np.arange(4)[:, None] < np.array(lengths)[:, None, None], x, np.nan)
    y = run(layer, ragged, lengths)
    for row, length in enumerate(lengths):
        alone = transposed_by_loops(x[row, :length], layer, trim_left)
        assert relative_error(y[row, : length * stride], alone) < 1e-6


def test_a_kernel_shorter_than_the_stride_is_refused():
    with pytest.raises(
        ValueError, match="kernel_size=2 must be at least stride=3, or the convolution skips inputs"
    ):
        random_module(lambda rngs: Conv1d(3, 2, 2, stride=3, rngs=rngs))


def test_a_part_of_a_stride_is_refused():
    layer = random_module(lambda rngs: Conv1d(3, 2, 4, stride=2, rngs=rngs))
    with pytest.raises(ValueError, match="time must be a multiple of stride=2, got 5; pad it"):
        run(layer, noise(1, 5, 3))
