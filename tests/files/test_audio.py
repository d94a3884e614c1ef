"""Every format is read and written correctly, and a file that is not whole is refused."""

import io
import resource
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import soxr

from mimi_jax.config import ceil_div
from mimi_jax.files.audio import (
    FORMATS,
    AudioReader,
    audio_writer,
    load_audio,
    read_audio,
    save_audio,
)
from tests.files.clips import RATE, correlation, noise, speech_like, write


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "clip.wav"


# Reading


@pytest.mark.parametrize(
    ("suffix", "options"),
    [
        (".wav", {"subtype": "PCM_16"}),
        (".wav", {"subtype": "PCM_U8"}),
        (".wav", {"subtype": "PCM_24"}),
        (".wav", {"subtype": "FLOAT"}),
        (".wav", {"subtype": "DOUBLE", "endian": "BIG"}),
        (".wav", {"format": "WAVEX"}),
        (".wav", {"format": "RF64"}),
        (".aiff", {}),
        (".flac", {}),
        (".ogg", {"subtype": "VORBIS"}),
        (".opus", {"format": "OGG", "subtype": "OPUS"}),
        (".mp3", {}),
    ],
)
def test_every_format_is_read(tmp_path: Path, suffix: str, options: dict[str, Any]):
    audio = speech_like()
    loaded = load_audio(write(tmp_path / f"clip{suffix}", audio, **options))
    assert loaded.shape == audio.shape
    assert loaded.dtype == np.float32
    assert loaded.flags.c_contiguous
    assert correlation(loaded, audio) > 0.99


def test_the_content_decides_and_not_the_name(tmp_path: Path):
    write(tmp_path / "clip.flac", speech_like()).rename(tmp_path / "clip.wav")
    assert load_audio(tmp_path / "clip.wav").shape == (1, RATE)


def test_bytes_are_read_like_files(path: Path):
    data = write(path, speech_like()).read_bytes()
    np.testing.assert_array_equal(read_audio(io.BytesIO(data), "shard.tar: clip.wav"), load_audio(path))
    with pytest.raises(ValueError, match=r"shard.tar: clip.wav is cut short"):
        read_audio(io.BytesIO(data[:-1]), "shard.tar: clip.wav")


def test_many_channels_become_their_mean(path: Path):
    audio = speech_like(channels=3)
    write(path, audio, subtype="FLOAT")
    np.testing.assert_allclose(load_audio(path), audio.mean(axis=0, keepdims=True), atol=1e-6)
    np.testing.assert_array_equal(load_audio(path, channels=3), audio)


def test_mono_becomes_stereo_by_doubling(path: Path):
    audio = speech_like()
    write(path, audio, subtype="FLOAT")
    np.testing.assert_array_equal(load_audio(path, channels=2), np.concatenate([audio, audio]))


@pytest.mark.parametrize(("found", "channels"), [(3, 2), (2, 3), (1, 3), (1, 0)])
def test_other_channels_are_refused(path: Path, found: int, channels: int):
    write(path, speech_like(100, found))
    with pytest.raises(ValueError, match=f"has {found} channels and cannot be mixed to {channels}"):
        load_audio(path, channels=channels)


@pytest.mark.parametrize("rate", [8000, 16_000, 22_050, 44_100, 48_000, 96_000])
def test_resampling_keeps_the_sound(path: Path, rate: int):
    write(path, np.sin(2 * np.pi * 440 * np.arange(rate) / rate)[None], rate, subtype="FLOAT")
    loaded = load_audio(path)[0]
    assert loaded.shape == (RATE,)
    expected = np.sin(2 * np.pi * 440 * np.arange(RATE) / RATE)
    np.testing.assert_allclose(loaded[1000:-1000], expected[1000:-1000], atol=1e-4)


@pytest.mark.parametrize("num_samples", [1, 2, 7, 1000, 4801])
@pytest.mark.parametrize("rate", [8000, 22_050, 24_000, 44_100, 48_000, 192_000])
@pytest.mark.parametrize("sampling_rate", [16_000, 24_000])
def test_the_resampled_length_is_rounded_up(path: Path, num_samples: int, rate: int, sampling_rate: int):
    write(path, speech_like(num_samples, channels=2), rate)
    loaded = load_audio(path, sampling_rate, channels=2)
    assert loaded.shape == (2, ceil_div(num_samples * sampling_rate, rate))


def test_a_sampling_rate_must_be_positive(path: Path):
    with pytest.raises(ValueError, match="sampling_rate must be positive, got 0"):
        load_audio(write(path, speech_like(10)), sampling_rate=0)


# Files that are not audio, or not as they should be; those that are not whole are in test_containers.py


@pytest.mark.parametrize("suffix", [".wav", ".mp3", ".ogg", ".raw", ""])
@pytest.mark.parametrize(
    "content",
    [b"this is a text\n" * 50, np.random.default_rng(0).bytes(5000), b"RIFF", b"fLaC", b"OggS", b"ID3"],
    ids=["text", "junk", "RIFF", "fLaC", "OggS", "ID3"],
)
def test_a_file_that_is_not_audio_is_refused(tmp_path: Path, suffix: str, content: bytes):
    path = tmp_path / f"clip{suffix}"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"{path} is (not a WAV|damaged|cut short)") as info:
        load_audio(path)
    assert "\n" not in str(info.value)


def test_the_content_decides_what_a_file_is(tmp_path: Path, path: Path):
    expected = load_audio(write(path, speech_like(1000)))
    for name in ("a.raw", "b.RAW", "c.mp3", "d"):
        (tmp_path / name).write_bytes(path.read_bytes())
        np.testing.assert_array_equal(load_audio(tmp_path / name), expected)


def test_an_empty_file_is_refused(path: Path):
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=f"{path} is empty"):
        load_audio(path)


def test_a_file_without_samples_is_refused(path: Path):
    with pytest.raises(ValueError, match=f"{path} has no samples"):
        load_audio(write(path, np.zeros((1, 0))))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_samples_that_are_not_finite_are_refused(path: Path, value: float):
    audio = speech_like()
    audio[0, 100] = value
    with pytest.raises(ValueError, match=f"{path} has samples that are NaN or infinite"):
        load_audio(write(path, audio, subtype="FLOAT"))


def test_a_rate_that_is_too_low_is_refused(path: Path):
    with pytest.raises(ValueError, match=f"{path} has a rate of 1 Hz; it must be at least 1000"):
        load_audio(write(path, speech_like(), rate=1))


def test_missing_files_and_folders_are_os_errors(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.wav"):
        load_audio(tmp_path / "nowhere.wav")
    with pytest.raises(IsADirectoryError, match=tmp_path.name):
        load_audio(tmp_path)


# Writing


@pytest.mark.parametrize("suffix", [*FORMATS, ".WAV"])
@pytest.mark.parametrize("channels", [1, 2])
def test_saved_audio_is_read_back(tmp_path: Path, suffix: str, channels: int):
    audio = speech_like(channels=channels)
    path = tmp_path / f"clip{suffix}"
    save_audio(path, audio)
    loaded = load_audio(path, channels=channels)
    assert loaded.shape == audio.shape
    assert correlation(loaded, audio) > 0.99
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("suffix", [".wav", ".flac"])
def test_16_bit_audio_is_read_back_bit_for_bit(tmp_path: Path, suffix: str):
    every_value = np.arange(-(2**15), 2**15, dtype=np.int16)
    soundfile.write(tmp_path / "a.wav", every_value, RATE)
    save_audio(tmp_path / f"b{suffix}", load_audio(tmp_path / "a.wav"))
    np.testing.assert_array_equal(soundfile.read(tmp_path / f"b{suffix}", dtype="int16")[0], every_value)
    assert soundfile.info(tmp_path / f"b{suffix}").subtype == "PCM_16"


def test_loud_audio_is_clipped(path: Path):
    save_audio(path, np.array([-1e9, -1.5, -1.0, 0.0, 1.0, 1.5, 1e9]))
    limits = [-(2**15)] * 3 + [0] + [2**15 - 1] * 3
    assert soundfile.read(path, dtype="int16")[0].tolist() == limits


def test_one_axis_is_mono_and_the_rate_is_stored(path: Path):
    save_audio(path, speech_like()[0], sampling_rate=16_000)
    info = soundfile.info(path)
    assert (info.channels, info.frames, info.samplerate) == (1, RATE, 16_000)


def test_minutes_of_vorbis_are_written(tmp_path: Path):
    """libsndfile crashes if they are written at once."""
    save_audio(tmp_path / "long.ogg", np.zeros(300 * RATE, np.float32))
    assert soundfile.info(tmp_path / "long.ogg").frames == 300 * RATE


@pytest.mark.parametrize("name", ["clip", "clip.aac", "wav"])
def test_an_unknown_suffix_is_refused(tmp_path: Path, name: str):
    known = r"must end in \.flac, \.mp3, \.ogg, \.opus, \.wav, got"
    with pytest.raises(ValueError, match=f"{known} {tmp_path / name}"):
        save_audio(tmp_path / name, speech_like())


def test_a_rate_that_the_format_does_not_support_is_refused(tmp_path: Path):
    path = tmp_path / "clip.opus"
    with pytest.raises(
        ValueError, match=f"cannot write {path}: OGG OPUS does not support 1 channels at 22050"
    ):
        save_audio(path, speech_like(), 22_050)
    assert not path.exists()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_audio_that_is_not_finite_is_not_saved(path: Path, value: float):
    with pytest.raises(ValueError, match=f"cannot write {path}: the audio has samples that are NaN"):
        save_audio(path, np.array([0.0, value]))
    assert not path.exists()


def test_a_missing_folder_is_an_os_error(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        save_audio(tmp_path / "nowhere" / "clip.wav", speech_like())


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_full_disk_leaves_the_old_file(path: Path, suffix: str):
    """The operating system does not let a file grow beyond 20 kB, which stands in for a full disk."""
    path = path.with_suffix(suffix)
    save_audio(path, speech_like(100))
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            save_audio(path, noise(30 * RATE))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == [path.name]


# Pieces


def pieces_of(path: Path, sampling_rate: int = RATE, channels: int = 1) -> list[np.ndarray]:
    with path.open("rb") as file:
        return list(AudioReader(file, str(path), sampling_rate, channels))


@pytest.mark.parametrize("rate", [8000, 16_000, 22_050, 24_000, 44_100, 48_000])
@pytest.mark.parametrize("channels", [1, 2])
def test_resampling_in_pieces_equals_resampling_the_whole_bit_for_bit(path: Path, rate: int, channels: int):
    audio = np.random.default_rng(0).normal(0, 0.1, (channels, 4 * rate + 77)).astype(np.float32)
    write(path, audio, rate, subtype="FLOAT")
    pieces = pieces_of(path, RATE, channels)
    assert len(pieces) > 1
    assert all(piece.flags.c_contiguous for piece in pieces)
    whole = audio
    if rate != RATE:
        padded = np.pad(audio, [(0, 0), (0, 100)])
        whole = soxr.resample(padded.T, rate, RATE, "VHQ")[: ceil_div(audio.shape[1] * RATE, rate)].T
    np.testing.assert_array_equal(np.concatenate(pieces, axis=1), whole)


@pytest.mark.parametrize("rate", [8000, 24_000, 44_100])
def test_a_reader_knows_the_length_before_it_reads(path: Path, rate: int):
    write(path, noise(12_345), rate)
    with path.open("rb") as file:
        reader = AudioReader(file, str(path))
        assert reader.num_samples == ceil_div(12_345 * RATE, rate)
        assert sum(piece.shape[1] for piece in reader) == reader.num_samples


@pytest.mark.parametrize("suffix", FORMATS)
def test_writing_in_pieces_equals_writing_the_whole(path: Path, suffix: str):
    audio = noise(3 * RATE)
    whole, pieces = path.with_name(f"whole{suffix}"), path.with_name(f"pieces{suffix}")
    save_audio(whole, audio)
    with audio_writer(pieces, RATE, 1, audio.shape[1]) as write_piece:
        for piece in np.split(audio, [1, 1920, 50_000], axis=1):
            write_piece(piece)
        assert not pieces.exists()
    if suffix in (".wav", ".flac"):
        assert pieces.read_bytes() == whole.read_bytes()
    # The Vorbis encoder gives slightly different bytes if the first write is short.
    assert correlation(load_audio(pieces), load_audio(whole)) > 0.99


def test_nothing_is_written_if_a_piece_is_bad(path: Path):
    with pytest.raises(ValueError, match="NaN or infinite"), audio_writer(path, RATE, 1) as write_piece:
        write_piece(noise())
        write_piece(np.full((1, 3), np.nan))
    assert list(path.parent.iterdir()) == []


def test_pieces_are_checked_as_whole_clips_are(path: Path):
    for piece in (np.ones((1, 4), np.int16), np.ones((1, 1, 4)), np.zeros((1, 0))):
        with (
            pytest.raises(ValueError, match="audio must be float"),
            audio_writer(path, RATE, 1) as write_piece,
        ):
            write_piece(piece)
    with pytest.raises(ValueError, match="there is no audio to write"), audio_writer(path, RATE, 1):
        pass
    assert list(path.parent.iterdir()) == []
    with audio_writer(path, RATE, 1) as write_piece:
        write_piece(np.ones(3, np.float16))  # float16 cannot represent 32767
    assert (load_audio(path) > 0.99).all()


@pytest.mark.parametrize("announced", [0, 50])
def test_more_than_a_wav_file_can_hold_is_refused(
    path: Path, announced: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("mimi_jax.files.audio.MAX_WAV_BYTES", 90)
    with pytest.raises(ValueError, match="4 GiB"), audio_writer(path, RATE, 1, announced) as write_piece:
        assert not announced
        write_piece(np.zeros((1, 40)))
        write_piece(np.zeros((1, 10)))
    assert list(path.parent.iterdir()) == []
    with audio_writer(path.with_suffix(".flac"), RATE, 1, 50) as write_piece:
        write_piece(np.zeros((1, 50)))
