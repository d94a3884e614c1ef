"""The measures, and the worker processes that compute them."""

import os
import signal
import sys
from pathlib import Path

import numpy as np
import pytest

from mimi_jax import load_audio
from mimi_jax.quality import evaluation, scoring
from mimi_jax.quality.metrics import STOI_SECONDS, VISQOL_SECONDS, stoi, visqol
from mimi_jax.quality.scoring import Scorer, Scores, score

SAMPLE = Path(__file__).parents[2] / "mimi_jax" / "samples" / "speech.flac"


def noise(seconds: float, rate: int = 24_000) -> np.ndarray:
    """float32 [1, samples]."""
    return np.random.default_rng(0).normal(0, 0.1, (1, round(seconds * rate))).astype(np.float32)


def test_measures_tell_good_from_bad():
    speech, hiss = load_audio(SAMPLE)[:, :72_000], 0.2 * noise(3)
    fakes = [speech + 1e-4 * hiss, speech + hiss, hiss]
    si_sdrs, stois, visqols = zip(*score(speech, fakes, 24_000, with_visqol=True), strict=True)
    distances = [evaluation._mel_distance(speech, fake, 24_000) for fake in fakes]
    assert sorted(si_sdrs, reverse=True) == list(si_sdrs)
    assert sorted(distances) == list(distances)
    assert sorted(stois, reverse=True) == list(stois) and stois[0] > 0.99 and stois[2] < 0.5
    assert sorted(visqols, reverse=True) == list(visqols) and visqols[0] > 4 and visqols[2] < 2


@pytest.mark.parametrize("rate", [16_000, 24_000, 48_000])
@pytest.mark.parametrize(
    ("measure", "shortest", "error"),
    [(stoi, STOI_SECONDS, "STOI needs 0.41 s of sound"), (visqol, VISQOL_SECONDS, "ViSQOL finds no speech")],
)
def test_the_shortest_clips(measure, shortest: float, error: str, rate: int):
    audio = noise(shortest, rate)
    assert measure(audio, audio + 0.1 * audio[:, ::-1], rate) > 0.5
    audio = noise(shortest - 0.015, rate)
    with pytest.raises(ValueError, match=error):
        measure(audio, audio, rate)


def test_silence_is_no_sound_for_stoi():
    audio = np.pad(noise(0.3), ((0, 0), (0, 48_000)))
    with pytest.raises(ValueError, match=r"STOI needs 0\.41 s of sound, without the silence"):
        stoi(audio, audio, 24_000)


def test_audio_that_is_decoded_to_silence_cannot_be_scored():
    with pytest.raises(ValueError, match="si_sdr is NaN; the model may decode it to silence"):
        score(noise(1), [np.zeros((1, 24_000), np.float32)], 24_000, with_visqol=False)


def test_an_error_of_a_library_is_the_reason(monkeypatch: pytest.MonkeyPatch):
    def fail(*_):
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr(scoring, "stoi", fail)
    with pytest.raises(ValueError, match="ZeroDivisionError: division by zero"):
        score(noise(1), [noise(1)], 24_000, with_visqol=False)


def test_a_worker_scores_without_jax():
    audio, fake = noise(1), noise(1) + 0.01
    with Scorer(with_visqol=False) as scorer:
        assert scorer.wait(scorer.submit(audio, [fake], 24_000)) == score(audio, [fake], 24_000, False)
        modules = scorer._worker.submit(eval, "[*__import__('sys').modules]").result()
    assert "pystoi" in modules and "jax" not in modules and "jax" in sys.modules


def test_a_worker_that_dies_costs_one_clip():
    audio = noise(1)
    with Scorer(with_visqol=False) as scorer:
        pid = scorer._worker.submit(os.getpid).result()
        future = scorer.submit(noise(60), [noise(60)] * 50, 24_000)
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(ValueError, match="the process that compared it with the original has died"):
            scorer.wait(future)
        (scores,) = scorer.wait(scorer.submit(audio, [audio], 24_000))
    assert isinstance(scores, Scores)
