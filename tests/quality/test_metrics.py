import math

import numpy as np
import pytest

from mimi_jax.quality.metrics import si_sdr

TONE = np.sin(np.arange(1000) * 0.1)[None]
OTHER = np.cos(np.arange(1000) * 0.1)[None]
OTHER -= TONE * np.sum(OTHER * TONE) / np.sum(TONE**2)  # orthogonal
OTHER *= math.sqrt(np.sum(TONE**2) / np.sum(OTHER**2))  # and of the same power


@pytest.mark.parametrize(
    ("scale", "distortion", "expected"), [(1, 0.1, 20), (-3, 0.3, 20), (1, 1, 0), (1, 10, -20)]
)
def test_known_ratios(scale: float, distortion: float, expected: float):
    assert si_sdr(TONE, scale * TONE + distortion * OTHER) == pytest.approx(expected, abs=1e-6)


def test_limits():
    assert si_sdr(TONE, TONE * 2) == math.inf
    assert si_sdr(TONE, TONE * 0) != si_sdr(TONE, TONE * 0)  # NaN, since an estimate of silence gives 0 / 0
    assert math.isnan(si_sdr(TONE * 0, TONE))


def test_shapes_must_agree():
    with pytest.raises(ValueError, match=r"must have the same shape, got \[1, 1000\] and \[1, 999\]"):
        si_sdr(TONE, TONE[:, 1:])
