"""A stretch of a file, from one time to another, as manifests ask for it."""

import io
from pathlib import Path

import numpy as np
import pytest
import soundfile

from mimi_jax.files.audio import AudioReader, load_audio, save_audio
from mimi_jax.files.containers import mpeg
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
        np.testing.assert_array_equal(stretch, samples[:, first : first + RATE // 2])


@pytest.mark.parametrize("has_note", [True, False])
@pytest.mark.parametrize("mode", ["CONSTANT", "VARIABLE"])
@pytest.mark.parametrize(("rate", "channels"), [(16_000, 1), (44_100, 1), (44_100, 2)])
def test_any_stretch_of_an_mp3_file_has_the_samples_of_the_whole_file(
    rate: int, channels: int, mode: str, has_note: bool, capfd: pytest.CaptureFixture[str]
):
    """The audio of a frame begins in those before it, and mpg123 complains on stderr if it is not there."""
    file = io.BytesIO()
    options = {"format": "MP3", "bitrate_mode": mode, "compression_level": 0.4}
    with soundfile.SoundFile(file, "w", rate, channels, **options) as sound:
        sound.write(noise(10 * rate * channels).reshape(-1, channels))
    header = mpeg.parse(data := file.getvalue())
    assert header is not None
    audio = data if has_note else data[header.size :]

    def read(start: float, end: float | None) -> np.ndarray:
        reader = AudioReader(io.BytesIO(audio), "it", None, channels, start, end)
        return np.concatenate(list(reader), axis=1)

    whole = read(0.0, None)
    for start, end in [(0.9, 1.1), (1.001, 1.002), (2.34, 5.6), (5.0, None), (9.7, None), (9.9, 9.91)]:
        expected = whole[:, round(start * rate) : None if end is None else round(end * rate)]
        np.testing.assert_array_equal(read(start, end), expected)
    assert capfd.readouterr().err == ""


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


class Counting(io.FileIO):
    """A file that counts the bytes that are read."""

    num_bytes = 0

    def readinto(self, buffer) -> int:
        count = super().readinto(buffer)
        self.num_bytes += count
        return count


@pytest.mark.parametrize("suffix", [".wav", ".flac"])
def test_a_late_stretch_does_not_read_all_that_stands_before_it(tmp_path: Path, suffix: str):
    # Without the number of samples, libFLAC reads this file 40 times while it looks for the place.
    path, rate = tmp_path / f"long{suffix}", 22_050
    save_audio(path, np.sin(0.01 * np.arange(120 * rate)).astype(np.float32), rate)
    raw = Counting(path)
    with io.BufferedReader(raw) as file:
        (piece,) = AudioReader(file, "the file", rate, start=100.0, end=101.0)
    np.testing.assert_array_equal(piece, load_audio(path, rate)[:, 100 * rate : 101 * rate])
    assert raw.num_bytes < path.stat().st_size / 2


def test_the_frames_of_an_mp3_file_are_searched_once(tmp_path: Path):
    path, rate = tmp_path / "long.mp3", 22_050
    save_audio(path, noise(120 * rate), rate)
    whole = load_audio(path, rate)
    for start in (100, 50, 110):
        raw = Counting(path)
        with io.BufferedReader(raw) as file:
            (piece,) = AudioReader(file, "the file", rate, start=start, end=start + 1.0)
        np.testing.assert_array_equal(piece, whole[:, start * rate : (start + 1) * rate])
        assert raw.num_bytes < path.stat().st_size / 4
    save_audio(path, noise(60 * rate), rate)
    with path.open("rb") as file, pytest.raises(ValueError, match="it is 60 s long"):
        AudioReader(file, "the file", rate, start=100.0, end=101.0)
