"""Spectra of audio: the mel scale, the short-time Fourier transform, and a distance between two clips.

The mel scale follows HTK's formula, as in `torchaudio` and `transformers`.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

WINDOWS = tuple(2**power for power in range(6, 11))  # samples; the five scales of a mel comparison
NUM_BANDS = 64
LOWEST = 64.0  # Hz
FLOOR = 1e-5  # is added to mel bands before their logarithm


def to_mel(hertz: ArrayLike) -> np.ndarray:
    return 2595 * np.log10(1 + np.asarray(hertz) / 700)


def to_hertz(mel: ArrayLike) -> np.ndarray:
    return 700 * (10 ** (np.asarray(mel) / 2595) - 1)


def mel_filters(window: int, sampling_rate: int, num_bands: int, lowest: float = 0.0) -> np.ndarray:
    """Return overlapping triangles whose corners are equally far apart on the mel scale.

    Args:
        window: length of the Fourier transform in samples.
        sampling_rate: Hz.
        num_bands: number of triangles.
        lowest: where the first triangle begins, in Hz. The last one ends at half the sampling rate.

    Returns:
        float32 [num_bands, window / 2 + 1]. Each triangle has height 1. A band that lies between two bins
        is zero.
    """
    corners = to_hertz(np.linspace(to_mel(lowest), to_mel(sampling_rate / 2), num_bands + 2))
    bins = np.fft.rfftfreq(window, 1 / sampling_rate)
    rising = (bins - corners[:-2, None]) / np.diff(corners)[:-1, None]
    falling = (corners[2:, None] - bins) / np.diff(corners)[1:, None]
    return np.maximum(0, np.minimum(rising, falling)).astype(np.float32)


def stft(x: jax.Array, window: int) -> jax.Array:
    """Short-time Fourier transform with a Hann window and a hop of a quarter of the window.

    It equals `torch.stft(center=False)` divided by the norm of the window, which is what `torchaudio`
    computes with `normalized=True`.

    Args:
        x: float [..., samples], at least `window` samples.
        window: length of the transform in samples, a multiple of 4.

    Returns:
        complex [..., columns, window / 2 + 1].
    """
    hop = window // 4
    if x.dtype.itemsize < 4:  # the Fourier transform takes no half precision
        x = x.astype(jnp.float32)
    hops = x[..., : x.shape[-1] // hop * hop].reshape(*x.shape[:-1], -1, hop)
    columns = hops.shape[-2] - 3
    # The gradient of four shifted views is an addition; the gradient of a gather is a slow scatter.
    windows = jnp.concatenate([hops[..., i : i + columns, :] for i in range(4)], axis=-1)
    hann = np.sin(np.pi * np.arange(window) / window) ** 2
    hann = (hann / np.sqrt(np.sum(hann**2))).astype(np.float32)
    return jnp.fft.rfft(windows * jnp.expand_dims(hann.astype(x.dtype), range(x.ndim)))


def mel_spectrogram(x: jax.Array, window: int, sampling_rate: int, power: float) -> jax.Array:
    """Compute magnitudes or their squares in mel bands, with a hop of a quarter of the window.

    Args:
        x: float [..., samples], a multiple of the hop.
        window: length of the transform in samples, a multiple of 4.
        sampling_rate: Hz.
        power: of magnitudes, 1 or 2, as in `torchaudio`.

    Returns:
        float [..., samples / hop, NUM_BANDS].
    """
    side = (window - window // 4) // 2
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(side, side)], mode="reflect")
    spectrum = stft(x, window)
    bins = spectrum.real**2 + spectrum.imag**2
    if power == 1:
        bins = jnp.sqrt(jnp.maximum(bins, 1e-14))  # the gradient of a magnitude is infinite at zero
    return bins @ mel_filters(window, sampling_rate, NUM_BANDS, LOWEST).T.astype(bins.dtype)


@jax.jit(static_argnames="sampling_rate")
def mel_distance(real: ArrayLike, fake: ArrayLike, sampling_rate: int) -> jax.Array:
    """Compute the mean absolute difference in dB of mel magnitudes, over the five scales of `WINDOWS`.

    Args:
        real, fake: float [..., samples], of the same shape.
        sampling_rate: Hz.

    Returns:
        float scalar.
    """
    differences = []
    for window in WINDOWS:
        x, y = (mel_spectrogram(jnp.asarray(audio), window, sampling_rate, 1) for audio in (real, fake))
        differences.append(jnp.mean(jnp.abs(jnp.log10(FLOOR + x) - jnp.log10(FLOOR + y))))
    return 20 * jnp.mean(jnp.stack(differences))
