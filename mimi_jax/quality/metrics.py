"""How close decoded audio is to the original."""

import numpy as np


def si_sdr(reference: np.ndarray, estimate: np.ndarray) -> float:
    """Compute the scale-invariant signal-to-distortion ratio (Le Roux et al., arXiv 1811.02508).

    Args:
        reference, estimate: float arrays of the same shape. All channels count as one signal.

    Returns:
        The ratio in dB. Higher is better. It is infinite for a scaled copy, and NaN if the reference is
        silent.

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
