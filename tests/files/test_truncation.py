"""An audio file that was cut short is refused, in every format that shows it."""

import struct
from pathlib import Path
from typing import Any

import pytest

from mimi_jax.files.audio import load_audio
from tests.files.clips import RATE, noise, write


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "clip.wav"


@pytest.mark.parametrize("divisor", [10, 2, 1.01])
@pytest.mark.parametrize(
    ("suffix", "options"),
    [
        (".wav", {}),
        (".wav", {"subtype": "FLOAT", "endian": "BIG"}),
        (".wav", {"format": "WAVEX"}),
        (".wav", {"format": "RF64"}),
        (".aiff", {}),
        (".flac", {}),
        (".ogg", {}),
        (".opus", {"format": "OGG", "subtype": "OPUS"}),
    ],
)
def test_a_file_cut_short_is_refused(tmp_path: Path, suffix: str, options: dict[str, Any], divisor: float):
    path = write(tmp_path / f"clip{suffix}", noise(), **options)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) / divisor)])
    with pytest.raises(ValueError, match=f"{path} .*cut short") as info:
        load_audio(path)
    assert "\n" not in str(info.value)


@pytest.mark.parametrize("suffix", [".wav", ".flac", ".ogg"])
def test_one_missing_byte_is_found(tmp_path: Path, suffix: str):
    path = write(tmp_path / f"clip{suffix}", noise())
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="cut short"):
        load_audio(path)


def flac_frames(data: bytes) -> list[int]:
    """Where FLAC frames may begin, in a file whose FLAC frames all have the same length."""
    return [i for i in range(42, len(data)) if data[i : i + 2] == b"\xff\xf8"]


def test_a_flac_file_cut_between_frames_is_refused(tmp_path: Path):
    path = write(tmp_path / "clip.flac", noise())
    data = path.read_bytes()
    cuts = flac_frames(data)
    assert len(cuts) > 3
    for cut in cuts:
        path.write_bytes(data[:cut])
        with pytest.raises(ValueError, match="cut short"):
            load_audio(path)


def test_an_ogg_file_cut_between_pages_is_refused(tmp_path: Path):
    path = write(tmp_path / "clip.ogg", noise())
    data = path.read_bytes()
    path.write_bytes(data[: data.rindex(b"OggS")])
    with pytest.raises(ValueError, match="cut short"):
        load_audio(path)


def test_an_mp3_file_cut_short_is_a_shorter_mp3_file(tmp_path: Path):
    path = write(tmp_path / "clip.mp3", noise(3 * RATE))
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    assert RATE < load_audio(path).shape[1] < 2 * RATE


@pytest.mark.parametrize("length", [0x7FFFF000, 0x80000000, 0xFFFFFFFF])
def test_a_wav_file_from_a_pipe_is_whole(path: Path, length: int):
    """sox, arecord and ffmpeg write these lengths if they cannot go back to fill in the real one."""
    data = bytearray(write(path, noise()).read_bytes())
    data[40:44] = struct.pack("<I", length)
    path.write_bytes(data)
    assert load_audio(path).shape == (1, RATE)


def test_a_wav_file_may_have_sections_around_its_audio(path: Path):
    data = write(path, noise()).read_bytes()
    odd = b"note" + struct.pack("<I", 3) + b"abc\0"
    data = data[:36] + odd + data[36:] + odd
    path.write_bytes(data[:4] + struct.pack("<I", len(data) - 8) + data[8:])
    assert load_audio(path).shape == (1, RATE)
    path.write_bytes(data[: -len(odd) - 1])
    with pytest.raises(ValueError, match="cut short"):
        load_audio(path)
