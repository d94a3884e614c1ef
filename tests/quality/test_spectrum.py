"""Spectra against an oracle in NumPy, and the gradient of the mel distance against finite differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mimi_jax.quality.spectrum import mel_distance, mel_filters, stft

RATE = 24_000


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32) * 0.1


@pytest.mark.parametrize("window", [64, 1024])
def test_stft_transforms_overlapping_windows(window: int):
    x, hop = noise(2, 1, 3000), window // 4
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(window) / window)
    windows = [x[..., i : i + window] * hann for i in range(0, 3000 // hop * hop - window + 1, hop)]
    expected = np.fft.rfft(np.stack(windows, axis=-2)) / np.sqrt(np.sum(hann**2))
    np.testing.assert_allclose(stft(jnp.asarray(x), window), expected, atol=1e-6)


def test_mel_filters_are_triangles():
    filters = mel_filters(1024, RATE, 64, 64.0)
    assert filters.shape == (64, 513)
    hertz = np.fft.rfftfreq(1024, 1 / RATE)
    assert filters[:, hertz <= 64].max() == 0
    peaks = hertz[filters.argmax(axis=1)]
    assert np.all(np.diff(peaks) > 0)
    # Two triangles that overlap add up to 1. The last one has no neighbour where it falls.
    inside = (hertz > peaks[0]) & (hertz < peaks[-1])
    np.testing.assert_allclose(filters.sum(axis=0)[inside], 1, atol=1e-5)


def test_mel_distance_of_equal_audio_is_zero():
    x = jnp.asarray(noise(1, 1, 2400))
    # Not exactly zero, since the compiler may fuse the two sides differently.
    assert mel_distance(x, x, RATE) < 1e-6


def test_mel_distance_of_half_the_amplitude_is_six_decibels():
    x = jnp.asarray(noise(1, 1, 24_000))
    # One band in six, over the five scales, is empty: its logarithm is the floor at any loudness.
    assert 4 < float(mel_distance(x, x / 2, RATE)) < 6.03


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_mel_distance_of_audio_in_half_precision(dtype: jnp.dtype):
    x, y = (jnp.asarray(noise(1, 1, 2400, seed=i)).astype(dtype) for i in range(2))
    expected = mel_distance(x.astype(jnp.float32), y.astype(jnp.float32), RATE)
    assert mel_distance(x, y, RATE).dtype == jnp.float32
    assert float(mel_distance(x, y, RATE)) == pytest.approx(float(expected), rel=1e-5)


def test_the_gradient_of_the_mel_distance_is_its_slope():
    """Along a random direction, in float64, where a finite difference is exact to six digits."""
    with jax.enable_x64(True):
        x, y, direction = (jnp.asarray(noise(2, 1, 1920, seed=i), jnp.float64) for i in range(3))
        below, above = (mel_distance(x, y + step * direction, RATE) for step in (-1e-6, 1e-6))
        slope = (above - below) / 2e-6
        gradient = jnp.vdot(jax.grad(mel_distance, argnums=1)(x, y, RATE), direction)
    assert float(abs(slope)) > 1e-5
    assert float(gradient) == pytest.approx(float(slope), rel=1e-4)
