"""Clips for the tests of audio files."""

from pathlib import Path
from typing import Any

import numpy as np
import soundfile

RATE = 24_000


def speech_like(num_samples: int = RATE, channels: int = 1) -> np.ndarray:
    """float32 [channels, samples]: a tone of changing loudness, with another pitch in each channel."""
    t = np.arange(num_samples) / RATE
    tones = [np.sin(2 * np.pi * 220 * (c + 1) * t) * (0.4 + 0.3 * np.sin(7 * t)) for c in range(channels)]
    return np.array(tones, np.float32)


def noise(num_samples: int = RATE) -> np.ndarray:
    """float32 [1, samples] of noise, which no format can compress to almost nothing."""
    return np.random.default_rng(0).normal(0, 0.1, (1, num_samples)).astype(np.float32)


def write(path: Path, audio: np.ndarray, rate: int = RATE, **options: Any) -> Path:
    soundfile.write(path, audio.T, rate, **options)
    return path


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.corrcoef(a.ravel(), b.ravel())[0, 1])
