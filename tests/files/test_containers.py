"""Every container: a file is read whole, as another reader reads it, or it is refused by name."""

import io
import struct
from pathlib import Path

import numpy as np
import pytest
import soundfile

from mimi_jax.files.audio import load_audio, read_audio
from tests.files.clips import RATE, noise, write
from tests.files.containers import (
    NUM_SAMPLES,
    ape,
    encoded,
    id3,
    valid_files,
    with_wrong_length,
    without_note,
)

FILES = valid_files()
MP3_DELAY = 1105  # samples that a note makes mpg123 leave out: LAME's delay and its own


def read(data: bytes) -> np.ndarray:
    """float32 [samples]: the mean of the channels."""
    return read_audio(io.BytesIO(data), "the file", RATE)[0]


def whole(name: str) -> np.ndarray:
    """The audio of an intact file, as libsndfile reads it."""
    if name == "flac of unknown length":
        name = "flac"
    audio, _ = soundfile.read(io.BytesIO(FILES[name]), dtype="float32", always_2d=True)
    return audio.mean(axis=1)


def refusal(data: bytes) -> str:
    """The error about a file; "" if it is read."""
    try:
        read(data)
    except ValueError as error:
        assert str(error).startswith("the file "), error
        assert "\n" not in str(error)
        return str(error)
    return ""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "clip.wav"


@pytest.mark.parametrize("name", FILES)
def test_an_intact_file_is_read_whole(name: str):
    audio, expected = read(FILES[name]), whole("mp3" if name == "mp3 without note" else name)
    if name == "mp3 without note":  # libsndfile would estimate its length, and leave out the end
        audio = audio[MP3_DELAY:][:NUM_SAMPLES]
    np.testing.assert_allclose(audio, expected, atol=1e-6 if "mp3" in name else 0)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("size", [0, 20, 2000, 250_000])
def test_tags_may_stand_around_the_audio(name: str, size: int):
    """libsndfile forgets a tag in front of a WAV or AIFF file, and takes the wrong bytes for samples."""
    expected = read(FILES[name])
    tagged = id3(size) + FILES[name]
    np.testing.assert_array_equal(read(tagged), expected)
    np.testing.assert_array_equal(read(id3(7) + tagged + ape(size + 100)), expected)
    np.testing.assert_array_equal(read(tagged + ape(6000) + b"TAG".ljust(128, b"\1")), expected)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("part", [0.0, 0.001, 0.01, 0.1])
@pytest.mark.parametrize("sign", [-1, 1])
def test_a_wrong_length_is_refused_or_the_file_is_read_whole(name: str, part: float, sign: int):
    unit = 50 if "mp3" in name else NUM_SAMPLES
    for change in {sign * max(1, round(unit * part)), 2 * sign * max(1, round(unit * part))}:
        data = with_wrong_length(name, FILES[name], change)
        if data is None:
            return
        assert data != FILES[name]
        if error := refusal(data):
            assert any(word in error for word in ("wrong", "cut short", "damaged")), error
        elif name in ("vorbis", "opus"):
            # The last page of an Ogg file says where its audio ends, which may be anywhere in this page.
            assert len(read(data)) == soundfile.info(io.BytesIO(data)).frames
        else:
            np.testing.assert_allclose(read(data), whole(name), atol=1e-6)


def test_a_note_with_too_few_frames_leaves_nothing_out():
    data = with_wrong_length("mp3", FILES["mp3"], -20)
    assert data is not None
    np.testing.assert_allclose(read(data), whole("mp3"), atol=1e-6)


def test_a_note_with_too_many_frames_means_a_file_cut_short():
    data = with_wrong_length("mp3", FILES["mp3"], 1)
    assert data is not None
    assert "cut short" in refusal(data)


@pytest.mark.parametrize("name", FILES)
def test_two_files_joined_are_refused_or_read_both(name: str):
    for first in (FILES[name], FILES[name] + b"TAG".ljust(128, b"\1") + id3(300)):
        joined = first + FILES[name]
        if "mp3" in name:
            assert len(read(joined)) >= 2 * NUM_SAMPLES
        else:
            error = refusal(joined)
            assert "streams in one file" in error or "damaged" in error, error


@pytest.mark.parametrize("form", ["OPUS", "VORBIS"])
def test_chained_streams_of_a_second_are_refused(form: str):
    """They were taken for tags once, as they have less than 4 kB."""
    quiet = np.zeros((1, RATE))
    data = encoded(noise(), "OGG", form) + encoded(quiet, "OGG", form)
    assert "several streams in one file" in refusal(data)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("part", [0.003, 0.05, 0.1, 0.3, 0.5, 0.7, 0.9, 0.95, 0.99, None])
def test_a_file_cut_short_is_refused(name: str, part: float | None):
    data = FILES[name]
    error = refusal(data[:-1] if part is None else data[: int(len(data) * part)])
    assert any(word in error for word in ("cut short", "damaged", "is not a")), error


@pytest.mark.parametrize("name", ["wav", "aiff", "au", "caf", "w64", "nist", "mp3 without note"])
def test_a_few_zeros_may_follow_the_audio(name: str):
    """Some programs fill up blocks of a disk."""
    np.testing.assert_array_equal(read(FILES[name] + bytes(512)), read(FILES[name]))
    assert refusal(FILES[name] + bytes(5000))


@pytest.mark.parametrize("size", [1, 4, 100, 4096, 10_000])
def test_anything_else_after_the_audio_is_refused(size: int):
    junk = np.random.default_rng(0).bytes(size).replace(b"\0", b"\1")
    for name, data in FILES.items():
        assert refusal(data + junk), name


def test_zeros_may_precede_an_mp3_file():
    np.testing.assert_array_equal(read(bytes(1000) + FILES["mp3"]), read(FILES["mp3"]))
    np.testing.assert_array_equal(read(id3(100) + bytes(1000) + FILES["mp3"]), read(FILES["mp3"]))


def test_an_mp3_file_with_a_variable_bit_rate_needs_no_note():
    """Its length was estimated from the bit rate of the first frame: it was refused, or its end left out."""
    loud, quiet = noise(2 * RATE), np.zeros((1, 2 * RATE), np.float32)
    for parts in ([quiet, loud], [loud, quiet]):
        data = encoded(np.concatenate(parts, axis=1), "MP3")
        expected = read(data)
        np.testing.assert_allclose(read(without_note(data))[MP3_DELAY:][: len(expected)], expected, atol=1e-6)


def test_an_mp3_file_cut_between_frames_is_refused_if_it_has_a_note():
    first = without_note(FILES["mp3"])
    one_frame = len(first) - len(without_note(first))
    assert "cut short" in refusal(FILES["mp3"][: len(FILES["mp3"]) - len(first) + one_frame])


def test_an_mp3_file_cut_inside_its_first_frame_is_refused():
    for size in range(10, 100):
        assert "cut short" in refusal(FILES["mp3"][:size])


def test_a_note_stands_at_the_same_place_in_a_frame_with_a_checksum():
    """LAME writes it so, over the side information."""
    data = FILES["mp3"]
    protected = data[:1] + bytes([data[1] & 0xFE]) + data[2:4] + b"\x12\x34" + data[6:]
    np.testing.assert_allclose(read(protected), whole("mp3"), atol=1e-6)
    too_many = with_wrong_length("mp3", protected, 1)
    assert too_many is not None and "cut short" in refusal(too_many)


def test_a_flac_file_cut_between_frames_is_refused():
    data = FILES["flac"]
    cuts = [i for i in range(42, len(data)) if data[i : i + 2] == b"\xff\xf8"]  # where FLAC frames may begin
    assert len(cuts) > 3
    for cut in cuts:
        assert "cut short" in refusal(data[:cut])


def test_an_ogg_file_cut_between_pages_is_refused():
    for name in ("vorbis", "opus"):
        assert "cut short" in refusal(FILES[name][: FILES[name].rindex(b"OggS")])


def test_a_missing_or_damaged_page_is_found():
    """libsndfile leaves such a page out, and plays on."""
    for name in ("vorbis", "opus"):
        data = FILES[name]
        pages = [i for i in range(len(data)) if data[i : i + 4] == b"OggS"]
        assert len(pages) > 3
        assert "a page is missing" in refusal(data[: pages[-2]] + data[pages[-1] :])
        damaged = bytearray(data)
        damaged[pages[-2] + 100] ^= 1
        assert "checksum" in refusal(bytes(damaged))


@pytest.mark.parametrize("length", [0x7FFFF000, 0x80000000, 0xFFFFFFFF])
def test_a_wav_file_from_a_pipe_is_whole(length: int):
    """sox, arecord and ffmpeg write these lengths if they cannot go back to fill in the real one."""
    data = FILES["wav"]
    data = data[:40] + struct.pack("<I", length) + data[44:]
    np.testing.assert_array_equal(read(data), whole("wav"))


def test_a_wav_file_over_4_gib_is_not_its_remainder(path: Path):
    """Its length has 32 bits, and some programs let it wrap around."""
    num_bytes = 2**32 + 2_000_000
    header = FILES["wav"][:40] + struct.pack("<I", num_bytes % 2**32)
    header = header[:4] + struct.pack("<I", (num_bytes + 36) % 2**32) + header[8:]
    with path.open("wb") as file:
        file.write(header)
        file.truncate(44 + num_bytes)  # a file with a hole, which takes no room on the disk
    with pytest.raises(ValueError, match=f"{path} goes on for 4294967296 bytes .* more than 4 GiB"):
        load_audio(path)


def test_a_wav_file_may_have_sections_around_its_audio(path: Path):
    data = write(path, noise()).read_bytes()
    odd = b"note" + struct.pack("<I", 3) + b"abc\0"
    data = data[:36] + odd + data[36:] + odd
    path.write_bytes(data[:4] + struct.pack("<I", len(data) - 8) + data[8:])
    assert load_audio(path).shape == (1, RATE)
    path.write_bytes(data[: -len(odd) - 1])
    with pytest.raises(ValueError, match="cut short"):
        load_audio(path)


def test_an_mp3_file_in_a_wav_file_is_read():
    mp3 = without_note(FILES["mp3"])
    form = struct.pack("<HHIIHH", 0x55, 1, RATE, 8000, 1, 0)
    sections = b"fmt " + struct.pack("<I", len(form)) + form + b"data" + struct.pack("<I", len(mp3)) + mp3
    data = b"RIFF" + struct.pack("<I", 4 + len(sections)) + b"WAVE" + sections
    np.testing.assert_array_equal(read(data), read(mp3))
    np.testing.assert_array_equal(read(data + b"LIST\4\0\0\0INFO"), read(mp3))
    assert "cut short" in refusal(data[:-1])
    starts = [at for at in range(0, len(mp3), 4) if mp3[at : at + 4] == mp3[:4]]
    assert "cut short" in refusal(data[: len(data) - len(mp3) + starts[-1]])  # between two MPEG frames
    assert "several streams in one file" in refusal(data + data)
    short = data.replace(b"data" + struct.pack("<I", len(mp3)), b"data" + struct.pack("<I", starts[-1]))
    assert "the header is wrong" in refusal(short)


def test_a_caf_file_from_a_pipe_is_whole():
    data = FILES["caf"]
    at = data.index(b"data") + 4
    for tag in (b"", id3(7)):
        np.testing.assert_array_equal(read(tag + data[:at] + b"\xff" * 8 + data[at + 8 :]), whole("caf"))


def test_shorten_in_nist_files_is_named():
    data = FILES["nist"].replace(b"sample_coding -s3 pcm", b"sample_coding -s26 pcm,embedded-shorten-v2.00")
    assert "is compressed with shorten" in refusal(data[:20_000])


def test_an_encoding_that_libsndfile_does_not_know_is_not_called_damage_alone():
    data = FILES["wav"]
    aac = data[:20] + struct.pack("<H", 0xFF) + data[22:]
    assert "in an encoding that cannot be read" in refusal(aac)
