"""How close decoded audio is to the original: SI-SDR, STOI and ViSQOL, of NumPy arrays."""

import functools
import warnings
from typing import Any

import numpy as np
import soxr

STOI_SECONDS = 0.41  # STOI compares stretches of 30 columns, a hundredth of a second each
VISQOL_SECONDS = 0.65  # of the shortest clip in which ViSQOL finds a patch to compare
VISQOL_RATE = 16_000  # Hz, of its speech mode


def si_sdr(reference: np.ndarray, estimate: np.ndarray) -> float:
    """Compute the scale-invariant signal-to-distortion ratio (Le Roux et al., arXiv 1811.02508).

    Args:
        reference, estimate: float arrays of the same shape. All channels count as one signal.

    Returns:
        The ratio in dB. Higher is better. It is infinite for a scaled copy, or above 100 dB by
        rounding. It is NaN if the reference or the estimate is silent.

    Raises:
        ValueError: the shapes differ.
    """
    if reference.shape != estimate.shape:
        raise ValueError(
            "reference and estimate must have the same shape, got"
            f" {list(reference.shape)} and {list(estimate.shape)}"
        )
    reference, estimate = reference.ravel().astype(np.float64), estimate.ravel().astype(np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        target = reference * (np.dot(estimate, reference) / np.dot(reference, reference))
        return float(10 * np.log10(np.sum(target**2) / np.sum((estimate - target) ** 2)))


def stoi(reference: np.ndarray, estimate: np.ndarray, sampling_rate: int) -> float:
    """Compute the short-time objective intelligibility, 1 for the same sound. It needs pystoi.

    Args:
        reference, estimate: float [channels, samples], whose channels are mixed.
        sampling_rate: Hz.

    Raises:
        ValueError: less than STOI_SECONDS of the reference is louder than 40 dB below its loudest part.
    """
    from pystoi import stoi

    with warnings.catch_warnings():
        # pystoi only warns, and returns 1e-5
        warnings.filterwarnings("error", "Not enough STFT frames", RuntimeWarning)
        try:
            return float(stoi(reference.mean(axis=0), estimate.mean(axis=0), sampling_rate))
        except RuntimeWarning as warning:
            raise ValueError(f"STOI needs {STOI_SECONDS} s of sound, without the silence") from warning


def visqol(reference: np.ndarray, estimate: np.ndarray, sampling_rate: int) -> float:
    """Compute ViSQOL's estimate of the mean opinion score, from 1 to 5. It needs visqol-python.

    Args:
        reference, estimate: float [channels, samples], whose channels are mixed.
        sampling_rate: Hz.

    Raises:
        ValueError: no part of the reference is loud for long enough to be compared.
    """
    mono = (audio.mean(axis=0) for audio in (reference, estimate))
    low = [soxr.resample(audio, sampling_rate, VISQOL_RATE).astype(np.float64) for audio in mono]
    try:
        return float(_visqol().measure_from_arrays(*low, VISQOL_RATE).moslqo)
    except IndexError as error:  # what visqol-python raises when it has no patch to compare
        raise ValueError("ViSQOL finds no speech in it") from error


@functools.cache
def _visqol() -> Any:
    from visqol import VisqolApi

    api = VisqolApi()
    # Its other model gives up to two points more. By default it takes that one where LiteRT is missing.
    api.create(mode="speech", use_lattice_model=True)
    return api
