"""The mel scale (HTK's formula, as in `torchaudio` and `transformers`). NumPy only."""

import numpy as np


def mel_filters(window: int, sampling_rate: int, num_bands: int, lowest: float = 0.0) -> np.ndarray:
    """Overlapping triangles whose corners are equally far apart on the mel scale.

    Args:
        window: samples of the Fourier transform they are for.
        sampling_rate: Hz.
        num_bands: how many.
        lowest: Hz, where the first triangle begins; the last one ends at half the sampling rate.

    Returns:
        float32 [num_bands, window / 2 + 1], each of height 1. A band between two bins is empty.
    """
    corners = to_hertz(np.linspace(to_mel(lowest), to_mel(sampling_rate / 2), num_bands + 2))
    bins = np.fft.rfftfreq(window, 1 / sampling_rate)
    rising = (bins - corners[:-2, None]) / np.diff(corners)[:-1, None]
    falling = (corners[2:, None] - bins) / np.diff(corners)[1:, None]
    return np.maximum(0, np.minimum(rising, falling)).astype(np.float32)


def to_mel(hertz):
    return 2595 * np.log10(1 + np.asarray(hertz) / 700)


def to_hertz(mel):
    return 700 * (10 ** (np.asarray(mel) / 2595) - 1)
