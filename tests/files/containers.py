"""Valid files in every container that is read, and ways to damage them."""

import io
import struct
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import soundfile

from mimi_jax.files.containers.mpeg import parse
from mimi_jax.files.containers.ogg import checksum
from tests.files.clips import RATE, noise

NUM_SAMPLES = 30_000


def encoded(audio: np.ndarray, form: str, subtype: str | None = None, **options: Any) -> bytes:
    """Audio [channels, samples] as the bytes of a file."""
    file = io.BytesIO()
    soundfile.write(file, audio.T, RATE, format=form, subtype=subtype, **options)
    return file.getvalue()


def without_note(mp3: bytes) -> bytes:
    """An MP3 file without its first frame, which says how many frames there are."""
    header = parse(mp3)
    assert header is not None
    return mp3[header.size :]


def without_length(flac: bytes) -> bytes:
    """A FLAC file as a program writes it to a pipe: the 36 bits of the number of samples are 0."""
    return flac[:21] + bytes([flac[21] & 0xF0, 0, 0, 0, 0]) + flac[26:]


def valid_files() -> dict[str, bytes]:
    mono, stereo = noise(NUM_SAMPLES), np.concatenate([noise(NUM_SAMPLES), noise(NUM_SAMPLES)[:, ::-1]])
    files = {
        "wav": encoded(mono, "WAV"),
        "wav stereo 24": encoded(stereo, "WAV", "PCM_24"),
        "wav float": encoded(mono, "WAV", "FLOAT"),
        "wav ulaw": encoded(mono, "WAV", "ULAW"),
        "wav adpcm": encoded(mono, "WAV", "IMA_ADPCM"),
        "rifx": encoded(mono, "WAV", endian="BIG"),
        "wavex": encoded(stereo, "WAVEX"),
        "rf64": encoded(mono, "RF64"),
        "aiff": encoded(stereo, "AIFF"),
        "aifc": encoded(mono, "AIFF", "ULAW"),
        "au": encoded(mono, "AU"),
        "au little": encoded(mono, "AU", endian="LITTLE"),
        "caf": encoded(stereo, "CAF"),
        "w64": encoded(mono, "W64"),
        "nist": encoded(mono, "NIST"),
        "flac": encoded(mono, "FLAC"),
        "flac stereo 24": encoded(stereo, "FLAC", "PCM_24"),
        "vorbis": encoded(mono, "OGG", "VORBIS"),
        "opus": encoded(stereo, "OGG", "OPUS"),
        "mp3": encoded(mono, "MP3"),
        "mp3 stereo constant": encoded(stereo, "MP3", bitrate_mode="CONSTANT"),
    }
    files["flac of unknown length"] = without_length(files["flac"])
    files["mp3 without note"] = without_note(files["mp3"])
    return files


class Field(NamedTuple):
    """Where a file states its length."""

    at: int
    size: int
    byteorder: Any
    unit: int  # what one sample in all channels counts

    def read(self, data: bytes) -> int:
        return int.from_bytes(data[self.at : self.at + self.size], self.byteorder)

    def write(self, data: bytes, value: int) -> bytes:
        field = value.to_bytes(self.size, self.byteorder)
        return data[: self.at] + field + data[self.at + self.size :]


def length_field(name: str, data: bytes) -> Field | None:
    """The field that states how long the audio is, of the files that `valid_files` makes."""
    if name.startswith(("wav", "rifx")):
        return Field(data.index(b"data") + 4, 4, "big" if name == "rifx" else "little", 2)
    places: dict[str, Callable[[], Field]] = {
        "rf64": lambda: Field(data.index(b"ds64") + 16, 8, "little", 2),
        "aiff": lambda: Field(data.index(b"SSND") + 4, 4, "big", 4),
        "aifc": lambda: Field(data.index(b"SSND") + 4, 4, "big", 1),
        "au": lambda: Field(8, 4, "big", 2),
        "au little": lambda: Field(8, 4, "little", 2),
        "caf": lambda: Field(data.index(b"data") + 4, 8, "big", 4),
        "w64": lambda: Field(data.index(b"data") + 16, 8, "little", 2),
        "flac": lambda: Field(22, 4, "big", 1),
        "flac stereo 24": lambda: Field(22, 4, "big", 1),
        "mp3": lambda: Field(data.index(b"Xing") + 8, 4, "big", 1),
        "mp3 stereo constant": lambda: Field(data.index(b"Xing") + 8, 4, "big", 1),
    }
    return places[name]() if name in places else None


def with_wrong_length(name: str, data: bytes, change: int) -> bytes | None:
    """The file with another stated length; None if it states none."""
    if name == "nist":
        return data.replace(
            b"sample_count -i %d" % NUM_SAMPLES, b"sample_count -i %d" % (NUM_SAMPLES + change)
        )
    if name in ("vorbis", "opus"):
        last = data.rindex(b"OggS")
        page = data[last:]
        granule = struct.unpack("<q", page[6:14])[0] + change
        page = page[:6] + struct.pack("<q", granule) + page[14:]
        return data[:last] + page[:22] + checksum(page) + page[26:]
    if (field := length_field(name, data)) is None:
        return None
    return field.write(data, field.read(data) + change)


def id3(size: int) -> bytes:
    """An ID3v2 tag with so many bytes of content."""
    sizes = bytes([size >> 21 & 127, size >> 14 & 127, size >> 7 & 127, size & 127])
    return b"ID3\x04\0\0" + sizes + (b"TIT2\0\0\0\5\0\0" + b"\0name").ljust(size, b"\0")[:size]


def ape(size: int) -> bytes:
    """An APEv2 tag with so many bytes of content, and a header and a footer."""

    def end(flags: int) -> bytes:
        return b"APETAGEX" + struct.pack("<IIII", 2000, size + 32, 1, flags) + bytes(8)

    return end(0xA0000000) + b"\xff\xfb\x90" + bytes(size - 3) + end(0x80000000)
