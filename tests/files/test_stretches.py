"""A stretch of a file, from one time to another, as manifests ask for it."""

import io
from pathlib import Path

import numpy as np
import pytest
import soundfile

from mimi_jax.files.audio import AudioReader, load_audio, save_audio
from tests.files.clips import RATE, noise


def audio_bytes(num_samples: int, form: str = "WAV") -> bytes:
    file = io.BytesIO()
    soundfile.write(file, noise(num_samples).T, RATE, format=form)
    return file.getvalue()


@pytest.mark.parametrize("form", ["WAV", "FLAC", "OGG"])
def test_a_stretch_has_the_samples_of_the_whole_file(form: str):
    audio = audio_bytes(50_000, form)
    samples = np.concatenate(list(AudioReader(io.BytesIO(audio), "it")), axis=1)
    reader = AudioReader(io.BytesIO(audio), "it", start=0.5, end=1.25)
    assert reader.num_samples == 18_000
    np.testing.assert_array_equal(np.concatenate(list(reader), axis=1), samples[:, 12_000:30_000])
    to_end = np.concatenate(list(AudioReader(io.BytesIO(audio), "it", start=0.5)), axis=1)
    np.testing.assert_array_equal(to_end, samples[:, 12_000:])


@pytest.mark.parametrize(("form", "subtype"), [("MP3", None), ("OGG", "VORBIS"), ("OGG", "OPUS")])
def test_a_late_stretch_of_a_lossy_file_has_the_samples_of_the_whole_file(form: str, subtype: str | None):
    """These decoders remember what came before, so a stretch must be read from somewhat earlier."""
    file = io.BytesIO()
    soundfile.write(file, noise(20 * RATE).T, RATE, format=form, subtype=subtype)
    samples = np.concatenate(list(AudioReader(io.BytesIO(file.getvalue()), "it")), axis=1)
    for start in (1.0, 5.5, 7.25, 12.125, 19.5):
        reader = AudioReader(io.BytesIO(file.getvalue()), "it", start=start, end=start + 0.5)
        first = round(start * RATE)
        stretch = np.concatenate(list(reader), axis=1)
        # mpg123 may round the last bits otherwise.
        np.testing.assert_allclose(
            stretch, samples[:, first : first + RATE // 2], atol=1e-6 if form == "MP3" else 0
        )


@pytest.mark.parametrize(
    ("start", "end", "error"),
    [
        (3.0, None, "no audio from 3 s to its end: it is 2 s long"),
        (1.0, 2.5, "is 2 s long, so it ends before 2.5 s"),
    ],
)
def test_a_stretch_outside_the_file_is_refused(start: float, end: float | None, error: str):
    with pytest.raises(ValueError, match=error):
        AudioReader(io.BytesIO(audio_bytes(2 * RATE)), "it", start=start, end=end)


def test_a_stretch_may_end_slightly_after_the_file():
    reader = AudioReader(io.BytesIO(audio_bytes(2 * RATE)), "it", start=1.0, end=2.05)
    assert np.concatenate(list(reader), axis=1).shape[1] == RATE


@pytest.mark.parametrize("suffix", [".wav", ".flac"])
def test_a_late_stretch_does_not_read_all_that_stands_before_it(tmp_path: Path, suffix: str):
    class Counting(io.FileIO):
        num_bytes = 0

        def readinto(self, buffer) -> int:
            count = super().readinto(buffer)
            self.num_bytes += count
            return count

    # Without the number of samples, libFLAC reads this file 40 times while it looks for the place.
    path, rate = tmp_path / f"long{suffix}", 22_050
    save_audio(path, np.sin(0.01 * np.arange(120 * rate)).astype(np.float32), rate)
    raw = Counting(path)
    with io.BufferedReader(raw) as file:
        (piece,) = AudioReader(file, "the file", rate, start=100.0, end=101.0)
    np.testing.assert_array_equal(piece, load_audio(path, rate)[:, 100 * rate : 101 * rate])
    assert raw.num_bytes < path.stat().st_size / 2
