"""Pictures of clips of any length, and the spectrograms in them."""

import struct

import numpy as np
import pytest

from mimi_jax.config import ceil_div
from mimi_jax.quality.picture import MAX_COLUMNS, draw, log_mel
from mimi_jax.quality.spectrum import NUM_BANDS, mel_filters

RATE = 24_000


def tone(hertz: float, num_samples: int, rate: int = RATE) -> np.ndarray:
    """float32 [samples]."""
    return np.sin(2 * np.pi * hertz * np.arange(num_samples) / rate).astype(np.float32)


def picture(audio: np.ndarray, num_codebooks: int = 8, title: str = "a clip") -> bytes:
    """Draw audio [channels, samples], a decoded copy of half the amplitude, and random codes."""
    shape = (num_codebooks, ceil_div(audio.shape[1], 1920))
    codes = np.random.default_rng(0).integers(0, 2048, shape)
    rates = {"sampling_rate": RATE, "frame_size": 1920, "codebook_size": 2048}
    return draw(audio, audio / 2, codes, **rates, title=title)


@pytest.mark.parametrize(
    ("num_samples", "channels", "num_codebooks"), [(1, 1, 1), (2 * RATE, 1, 8), (RATE, 2, 32)]
)
def test_picture_is_a_png(num_samples: int, channels: int, num_codebooks: int):
    audio = np.stack([tone(440, num_samples)] * channels)
    png = picture(audio, num_codebooks)
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">II", png[16:24])
    assert 1000 <= width <= 2000
    assert 800 <= height <= 2000
    assert 10_000 < len(png) < 2_000_000


def test_silence_can_be_drawn():
    assert picture(np.zeros((1, RATE), np.float32)).startswith(b"\x89PNG")


def test_a_title_with_dollars_is_no_formula():
    assert picture(tone(440, RATE)[None], title="take$1_$2.wav").startswith(b"\x89PNG")


@pytest.mark.parametrize("rate", [16_000, 24_000, 48_000])
@pytest.mark.parametrize("hertz", [150, 440, 1000, 5000])
def test_a_tone_is_in_its_band(rate: int, hertz: int):
    def mel(hertz: float) -> float:
        return 1127 * np.log(1 + hertz / 700)

    centres = mel(rate / 2) * np.arange(1, NUM_BANDS + 1) / (NUM_BANDS + 1)
    spectrum = log_mel(tone(hertz, rate, rate), rate)[50]
    assert spectrum.argmax() == np.abs(centres - mel(hertz)).argmin()
    assert spectrum.max() - np.median(spectrum) > 40  # dB


@pytest.mark.parametrize("rate", [8000, 16_000, 24_000, 48_000])
def test_no_band_is_empty(rate: int):
    window = 2 ** round(np.log2(rate / 24))
    assert (mel_filters(window, rate, NUM_BANDS).sum(axis=1) > 0).all()


@pytest.mark.parametrize(("num_samples", "columns"), [(1, 1), (RATE, 101), (600 * RATE, MAX_COLUMNS)])
def test_columns_are_every_10_ms_but_never_too_many(num_samples: int, columns: int):
    spectrum = log_mel(np.zeros(num_samples, np.float32), RATE)
    assert spectrum.shape[1] == NUM_BANDS
    assert abs(len(spectrum) - columns) <= 1
