"""What is not raw PCM is refused by its first bytes, and PCM of any kind passes."""

import bz2
import gzip
import io
import lzma
import re
import struct
import zipfile
from collections.abc import Callable

import numpy as np
import pytest
import soundfile

from mimi_jax.streams.sniff import MAGIC_NUMBERS, check_is_pcm, file_type

FRAME = 1920  # samples
TIME = np.arange(FRAME) / 24_000
COMPRESSED, FLOATS = "looks like compressed data", "looks like f32le; say which with --format"


def noise(seed: int, num_samples: int = FRAME) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 1, num_samples)


def speech(seed: int) -> np.ndarray:
    """Noise with the spectrum and the changing loudness of speech, at most 1."""
    rng, size = np.random.default_rng(seed), 24_000
    voiced = np.convolve(
        np.sin(np.cumsum(rng.normal(0.04, 0.01, size)) + rng.normal(0, 0.3, size)), np.ones(3)
    )
    loudness = np.abs(np.sin(np.arange(size) / 2000 + rng.uniform(0, 6)))
    signal = voiced[:size] * loudness + 0.05 * rng.normal(0, 1, size)
    return signal / np.abs(signal).max()


def to_s16(signal: np.ndarray) -> bytes:
    return np.rint(np.clip(signal, -1, 32767 / 32768) * 32768).astype("<i2").tobytes()


SIGNALS: dict[str, Callable[[int], np.ndarray]] = {
    "silence": lambda seed: np.zeros(FRAME),
    "constant": lambda seed: np.full(FRAME, 0.1 * seed - 0.5),
    "dither": lambda seed: (1 + seed) * np.diff(np.random.default_rng(seed).uniform(0, 1, FRAME + 1)) / 32768,
    "noise": noise,
    "limited noise": lambda seed: 0.8 * np.random.default_rng(seed).uniform(-1, 1, FRAME),
    "low noise": lambda seed: np.convolve(noise(seed), np.hanning(20), "same"),
    "speech": lambda seed: speech(seed)[1000 * seed :][:FRAME],
    "sine": lambda seed: np.sin(2 * np.pi * 50 * 2**seed * TIME),
    "square wave": lambda seed: np.sign(np.sin(2 * np.pi * 100 * (1 + seed) * TIME + 0.1)),
    "sawtooth": lambda seed: 2 * (100 * (1 + seed) * TIME % 1) - 1,
    "sweep": lambda seed: np.sin(2 * np.pi * np.cumsum(np.linspace(0, 0.5, FRAME))),
    "impulses": lambda seed: noise(seed) * (np.arange(FRAME) % 200 == seed),
    "8 bits": lambda seed: np.rint(speech(seed)[:FRAME] * 127) / 128,
    "stereo": lambda seed: np.repeat(noise(seed, FRAME // 2), 2),
}


@pytest.mark.parametrize("name", SIGNALS)
@pytest.mark.parametrize("gain", [1e-4, 0.01, 0.1, 0.3, 0.5, 0.9, 4.0, 100.0])
def test_pcm_passes(name: str, gain: float):
    if name == "limited noise":
        gain = min(gain, 1)  # see the next test
    for seed in range(8):
        signal = gain * SIGNALS[name](seed)
        check_is_pcm(to_s16(signal), None)
        check_is_pcm(signal.astype("<f4").tobytes(), "f32le")


def test_only_uniform_noise_at_full_scale_must_be_insisted_on():
    data = np.random.default_rng(0).bytes(2 * FRAME)
    with pytest.raises(ValueError, match=COMPRESSED + ".* say --format s16le if it is PCM"):
        check_is_pcm(data, None)
    check_is_pcm(data, "s16le")
    check_is_pcm(data[:3000], None)  # too short to tell


@pytest.mark.parametrize("size", [2 * FRAME, 4 * FRAME, 100_000])
def test_no_size_gives_a_false_alarm(size: int):
    for seed in range(200):
        check_is_pcm(to_s16(0.5 * noise(seed, size // 2)), None)


# files


def encoded(kind: str, subtype: str, rate: int = 24_000) -> bytes:
    file = io.BytesIO()
    soundfile.write(
        file, 0.5 * np.concatenate([speech(i) for i in range(4)]), rate, format=kind, subtype=subtype
    )
    return file.getvalue()


def zipped(data: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("clip.raw", data)
    return file.getvalue()


@pytest.mark.parametrize(
    ("kind", "subtype", "name"),
    [
        ("WAV", "PCM_16", "a WAV file"),
        ("RF64", "PCM_16", "a WAV file"),
        ("AIFF", "PCM_16", "an AIFF file"),
        ("FLAC", "PCM_16", "a FLAC file"),
        ("OGG", "VORBIS", "an Ogg file"),
        ("OGG", "OPUS", "an Ogg file"),
        ("MP3", "MPEG_LAYER_III", "an MP3 or AAC file"),
        ("W64", "PCM_16", "a Wave64 file"),
        ("NIST", "PCM_16", "a NIST SPHERE file"),
        ("AU", "PCM_16", "an AU file"),
        ("CAF", "PCM_16", "a CAF file"),
        ("VOC", "PCM_16", "a VOC file"),
        ("IRCAM", "PCM_16", "an IRCAM file"),
        ("PAF", "PCM_16", "a PAF file"),
        ("PVF", "PCM_16", "a PVF file"),
        ("AVR", "PCM_16", "an AVR file"),
        ("MAT5", "PCM_16", "a MATLAB file"),
    ],
)
def test_audio_files_are_named(kind: str, subtype: str, name: str):
    data = encoded(kind, subtype)
    assert file_type(data[: 2 * FRAME]) == name


FIRST_BYTES = {
    "an MP3 file": "49 44 33 04 00",
    "an MP4, M4A, MOV or 3GP file": "00 00 00 20 66 74 79 70 4d 34 41 20",
    "a Matroska or WebM file": "1a 45 df a3 9f 42 86 81",
    "a WMA or another ASF file": "30 26 b2 75 8e 66 cf 11 a6 d9",
    "an AMR file": "23 21 41 4d 52 0a",
    "a WavPack file": "77 76 70 6b",
    "a Monkey's Audio file": "4d 41 43 20",
    "a TTA file": "54 54 41 31",
    "an MPEG stream": "47 40 11 10" + "00" * 184 + "47 40 00 10" + "ff" * 184 + "47",
    "S/PDIF": "72 f8 1f 4e 01 00",
    "a Zstandard file": "28 b5 2f fd",
    "a 7z file": "37 7a bc af 27 1c",
    "a tar archive": "61" + "00" * 256 + "75 73 74 61 72",
    "a NumPy file": "93 4e 55 4d 50 59",
    "a Parquet file": "50 41 52 31",
    "a safetensors file or a code stream": "40 01 00 00 00 00 00 00 7b 22",
}


@pytest.mark.parametrize("name", FIRST_BYTES)
def test_other_files_are_named(name: str):
    data = bytes.fromhex(FIRST_BYTES[name])
    assert name in MAGIC_NUMBERS
    for pcm_format in (None, "s16le", "f32le"):
        with pytest.raises(ValueError, match=f"no header, got {re.escape(name)}; give its path"):
            check_is_pcm(data + bytes(100), pcm_format)


@pytest.mark.parametrize(
    ("pack", "name"),
    [
        (gzip.compress, "a gzip file"),
        (lzma.compress, "an xz file"),
        (bz2.compress, "a bzip2 file"),
        (zipped, "a zip file"),
    ],
)
def test_compressed_files_are_named_and_their_middle_is_refused(pack: Callable[[bytes], bytes], name: str):
    data = pack(to_s16(0.02 * speech(0)))
    assert file_type(data[: 2 * FRAME]) == name
    assert_middle_is_refused(data)


@pytest.mark.parametrize("rate", [8000, 16_000, 24_000, 48_000])
@pytest.mark.parametrize(
    ("kind", "subtype"), [("FLAC", "PCM_16"), ("OGG", "VORBIS"), ("OGG", "OPUS"), ("MP3", "MPEG_LAYER_III")]
)
def test_the_middle_of_a_compressed_file_is_refused(kind: str, subtype: str, rate: int):
    assert_middle_is_refused(encoded(kind, subtype, rate))


def assert_middle_is_refused(data: bytes) -> None:
    for start in np.linspace(len(data) // 4, len(data) - 2 * FRAME, 9).astype(int).tolist():
        with pytest.raises(ValueError, match=f"{COMPRESSED}|an MP3 or AAC file"):
            check_is_pcm(data[start : start + 2 * FRAME], None)


@pytest.mark.parametrize("text", ["Hello there, ", '{"a": 12}\n', "中文语音", "\ufeffÄöü\r\n\t"])
@pytest.mark.parametrize("length", [16, 600, 2 * FRAME])
def test_text_is_refused(text: str, length: int):
    data = (text * FRAME).encode()[:length]
    for pcm_format in (None, "s16le", "f32le"):
        with pytest.raises(ValueError, match="got text"):
            check_is_pcm(data, pcm_format)


# MPEG audio, whose silence is not distributed like compressed data


@pytest.mark.parametrize(
    ("header", "size"),
    [
        ("ff fb 90 64", 417),  # MPEG-1 layer III, 128 kbit/s, 44.1 kHz
        ("ff fb 92 64", 418),  # with padding
        ("ff fa e4 00", 960),  # 320 kbit/s, 48 kHz
        ("ff f3 84 c4", 192),  # MPEG-2 layer III, 64 kbit/s, 24 kHz
        ("ff e3 18 c4", 72),  # MPEG-2.5 layer III, 8 kbit/s, 8 kHz
        ("ff fd 94 04", 480),  # MPEG-1 layer II, 160 kbit/s, 48 kHz
        ("ff f5 84 04", 384),  # MPEG-2 layer II, 64 kbit/s, 24 kHz
        ("ff f1 50 80 2e 9f fc", 372),  # AAC in ADTS
    ],
)
def test_frames_of_mpeg_audio(header: str, size: int):
    frame = bytes.fromhex(header).ljust(size, b"\0")
    assert file_type(3 * frame) == "an MP3 or AAC file"
    assert file_type(frame + frame[:-1] + b"\0\0" + frame) is None
    assert file_type(2 * frame) is None


def test_frames_of_different_rates_of_bits():
    frames = [bytes.fromhex(f"fffb{rate}64").ljust(size, b"\0") for rate, size in (("90", 417), ("10", 104))]
    assert file_type(frames[0] + frames[1] + frames[0]) == "an MP3 or AAC file"
    other = bytes.fromhex("fff384c4").ljust(192, b"\0")
    assert file_type(frames[0] + other + frames[0]) is None


# floats


@pytest.mark.parametrize("gain", [1e-3, 0.1, 0.5])
def test_floats_are_told_from_16_bits(gain: float):
    for seed in range(8):
        signal = gain * speech(seed)[:FRAME]
        with_zeros, one_sided = (
            signal * (np.arange(FRAME) % 3 > 0),
            np.rint(300 * signal / gain + 500) / 32768,
        )
        for audio in (with_zeros, one_sided):
            with pytest.raises(ValueError, match=FLOATS):
                check_is_pcm(audio.astype("<f4").tobytes()[: 2 * FRAME], None)
        floats = signal.astype("<f4").tobytes()
        with pytest.raises(ValueError, match=FLOATS):
            check_is_pcm(floats[: 2 * FRAME], None)
        check_is_pcm(floats[: 2 * FRAME], "s16le")


def test_a_code_stream_is_refused():
    header = b'{"format": "mimi_jax.code_stream"'
    assert file_type(struct.pack("<Q", len(header)) + header) == "a safetensors file or a code stream"
