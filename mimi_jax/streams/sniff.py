"""Tell raw PCM from everything else that people send through a pipe, by its first bytes.

Raw PCM has no header, so any bytes can be read as samples: an MP3 file would be heard as loud noise. Three
signs give other data away.

1. Files begin with a magic number. MPEG audio has a header in each frame instead.
2. Compressed data and text are sequences of bytes, so bytes at odd and at even places are distributed alike.
   In 16-bit PCM they are not: the high bytes of the samples follow the loudness, and the low bytes are nearly
   uniform. Only white noise with a uniform distribution up to full scale cannot be told from compressed data.
3. 32-bit floats of audio lie near [-1, 1]. Nearly all other data, read as floats, has huge values or NaN.
"""

import codecs
import re

import numpy as np

from mimi_jax.files.containers import mpeg

SAFETENSORS = "a safetensors file or a code stream"
# What a file begins with, as a regular expression.
MAGIC_NUMBERS = {
    "a WAV file": rb"RIFF....WAVE|RIFX|RF64|BW64",
    "an AVI or another RIFF file": rb"RIFF",
    "an AIFF file": rb"FORM",
    "a FLAC file": rb"fLaC",
    "an Ogg file": rb"OggS",
    "an MP3 file": rb"ID3[\x02\x03\x04]\0|TAG[ -~]{3}",
    "an MP4, M4A, MOV or 3GP file": rb"....(ftyp|moov|mdat|wide|free)",
    "a Matroska or WebM file": rb"\x1aE\xdf\xa3",
    "a WMA or another ASF file": rb"\x30\x26\xb2\x75\x8e\x66\xcf\x11",
    "a Wave64 file": rb"riff\x2e\x91\xcf\x11",
    "a NIST SPHERE file": rb"NIST_1A\n",
    "an AU file": rb"\.snd|dns\.",
    "a CAF file": rb"caff\0",
    "an AMR file": rb"#!AMR",
    "an AAC file": rb"ADIF",
    "an MPEG stream": rb"\0\0\x01\xba|G(?!.G).{187}G.{187}G",
    "a WavPack file": rb"wvpk",
    "a Monkey's Audio file": rb"MAC |APETAGEX",
    "a TTA file": rb"TTA[12]",
    "a Musepack file": rb"MPCK|MP\+",
    "a TAK file": rb"tBaK",
    "an OptimFROG file": rb"OFR ",
    "a DSD file": rb"DSD \x1c|FRM8",
    "a RealMedia file": rb"\.RMF|\.ra\xfd",
    "a Flash video": rb"FLV\x01",
    "a VOC file": rb"Creative Voice File",
    "a SoX file": rb"\.SoX|XoS\.",
    "an IRCAM file": rb"\x64\xa3[\x01-\x04]\0|\0[\x01-\x04]\xa3\x64",
    "a PAF file": rb" paf|fap ",
    "a PVF file": rb"PVF1",
    "an AVR file": rb"2BIT",
    "a Psion file": rb"ALawSoundFile",
    "a MIDI file": rb"MThd\0\0\0\x06",
    "S/PDIF": rb"\x72\xf8\x1f\x4e",
    "a gzip file": rb"\x1f\x8b\x08",
    "a zip file": rb"PK(\x03\x04|\x05\x06)",
    "an xz file": rb"\xfd7zXZ\0",
    "a bzip2 file": rb"BZh[1-9]1AY&SY",
    "a Zstandard file": rb"\x28\xb5\x2f\xfd",
    "a 7z file": rb"7z\xbc\xaf\x27\x1c",
    "a RAR file": rb"Rar!\x1a\x07",
    "a tar archive": rb".{257}ustar",
    "a NumPy file": rb"\x93NUMPY",
    "a MATLAB file": rb"MATLAB 5\.0 MAT-file",
    "an HDF5 file": rb"\x89HDF\r\n\x1a\n",
    "a Parquet file": rb"PAR1",
    "a PNG picture": rb"\x89PNG\r\n",
    "a JPEG picture": rb"\xff\xd8\xff[\xdb\xe0\xe1]",
    "a PDF file": rb"%PDF-",
    "a WTV recording": rb"\xb7\xd8\x00\x20\x37\x49\xda\x11",
    SAFETENSORS: rb".{4}\0{4}\{ *[\"}]",
}
_FILES = {name: re.compile(pattern, re.DOTALL) for name, pattern in MAGIC_NUMBERS.items()}

_NUM_FRAMES = 3  # in a row are MPEG audio; PCM may begin with the same bytes as one

_MIN_TEXT, _MAX_VALUES = 16, 8  # bytes of text; different bytes of a square wave, which may be letters
_CONTROL = re.compile(r"[^\s\x20-\x7e\xa0-\U0010ffff]")
_MIN_SAMPLES = 1920  # a frame of Mimi; fewer do not show a distribution well enough
_MAX_DISTANCE = 0.04  # of the histograms of high and low bytes; Gaussian noise of any level has 0.08
_MAX_REPEATS = 33  # pairs of equal bytes, relative to uniform data; silence has over 60, also with dither
_MAX_CORRELATION = 0.5  # of neighbours; it is higher in a sawtooth, whose bytes are uniform too
_MIN_FLOATS, _MIN_DIFFERENT = 256, 9  # without zeros; silence and square waves have fewer
_FLOAT_RANGE = (2.0**-24, 1.5)  # of audio in floats; a symmetric signal of 16 bits is mostly outside
MAX_FLOAT = 100.0  # 40 dB over full scale


def check_is_pcm(data: bytes, pcm_format: str | None) -> None:
    """Check the first bytes of a pipe.

    Args:
        data: a frame, or less if the input is shorter.
        pcm_format: "f32le" or "s16le"; None for "s16le", unless the bytes are not distributed like PCM.

    Raises:
        ValueError: they are a file or text, or pcm_format is None and they are compressed data or floats.
    """
    if kind := file_type(data):
        raise ValueError(
            f"raw audio must have no header, got {kind}; give its path, or convert it to raw audio first"
        )
    if pcm_format is None and _is_compressed(data):
        raise ValueError(
            "raw audio must be PCM, but the input looks like compressed data; give the path of the file, or"
            " say --format s16le if it is PCM"
        )
    if pcm_format is None and _is_floats(data):
        raise ValueError(
            "raw audio must be s16le by default, but the input looks like f32le; say which with --format"
        )


def check_floats(samples: np.ndarray) -> None:
    """Raise ValueError if a sample is NaN, infinite or huge."""
    bad = samples[~(np.abs(samples) <= MAX_FLOAT)]
    if bad.size:
        raise ValueError(
            f"raw audio in f32le must be finite and near [-1, 1], got {bad[0]:g}; check the program"
            " before this one"
        )


def file_type(data: bytes) -> str | None:
    """Return what begins with these bytes, such as "a FLAC file"; None if it is not known."""
    for name, pattern in _FILES.items():
        if pattern.match(data):
            return name
    if _is_mpeg_audio(data):
        return "an MP3 or AAC file"
    return "text" if _is_text(data) else None


def _is_text(data: bytes) -> bool:
    """Whether these bytes are UTF-8 without control characters. PCM of a few values may be so too."""
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(data)  # the last character may be cut
    except UnicodeDecodeError:
        return False
    return len(data) >= _MIN_TEXT and len(set(data)) > _MAX_VALUES and not _CONTROL.search(text)


def _is_compressed(data: bytes) -> bool:
    """Whether the bytes at even and odd places are distributed alike, though they are not silence."""
    count = len(data) // 2
    if count < _MIN_SAMPLES:
        return False
    samples = np.frombuffer(data[: 2 * count], "<i2")
    low, high = (np.bincount(part, minlength=256) for part in samples.view(np.uint8).reshape(-1, 2).T)
    repeats = 256 * np.sum(high * (high - 1)) / (count * (count - 1))
    chance = np.count_nonzero(low + high)  # what the sum below is on average if the distributions are equal
    distance = (np.sum((high - low) ** 2 / np.maximum(high + low, 1)) - chance) / (2 * count)
    if repeats > _MAX_REPEATS or distance > _MAX_DISTANCE:
        return False
    # Lags up to 4 are those of neighbours in stereo audio too.
    return all(abs(_correlation(samples, lag)) < _MAX_CORRELATION for lag in range(1, 5))


def _correlation(samples: np.ndarray, lag: int) -> float:
    centered = samples - samples.mean()
    return centered[lag:] @ centered[:-lag] / max(centered @ centered, 1.0)


def _is_floats(data: bytes) -> bool:
    """Whether the values are audio in floats, whose two halves differ, unlike neighbours in 16-bit PCM."""
    values = np.frombuffer(data[: len(data) // 4 * 4], "<f4")
    sizes, (low, high) = np.abs(values[values != 0]), _FLOAT_RANGE
    if len(sizes) < _MIN_FLOATS or len(np.unique(sizes)) < _MIN_DIFFERENT:
        return False
    is_audio = np.mean((sizes > low) & (sizes < high)) > 0.9
    return bool(is_audio) and _correlation(values.view("<i2"), 1) < _MAX_CORRELATION


def _is_mpeg_audio(data: bytes) -> bool:
    """Whether complete frames stand one after the other from the beginning, all of one kind."""
    kinds = set()
    for _ in range(_NUM_FRAMES):
        if header := mpeg.parse(data):
            kind, size = header.kind, header.size
        else:
            kind, size = data[1:2], _adts_size(data)
        if not size:
            return False
        kinds.add(kind)
        data = data[size:]
    return len(kinds) == 1


def _adts_size(data: bytes) -> int:
    """The bytes of the ADTS frame, which holds AAC, that begins with these bytes; 0 if none does."""
    if len(data) < 6 or data[0] != 0xFF or data[1] & 0xF6 != 0xF0:
        return 0
    return (data[3] & 3) << 11 | data[4] << 3 | data[5] >> 5
