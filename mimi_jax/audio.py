"""Audio files in and out, and clips into batches. NumPy only; a file is whole or it is refused.

libsndfile plays what it finds of a file that was cut short, and only the first of several streams in
one file. Neither may pass for a whole clip here, so both are looked for.
"""

import io
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
import soundfile
import soxr
from numpy.typing import ArrayLike

from mimi_jax.atomic import atomic_path

# What a file name's suffix makes of audio: libsndfile's names of a format and a subtype.
FORMATS = {
    ".flac": ("FLAC", "PCM_16"),
    ".mp3": ("MP3", "MPEG_LAYER_III"),
    ".ogg": ("OGG", "VORBIS"),
    ".opus": ("OGG", "OPUS"),
    ".wav": ("WAV", "PCM_16"),
}
MIN_SAMPLING_RATE = 1000  # Hz; less is a broken header, and would resample to a gigantic clip
BLOCK = 65_536  # samples a read or write; libsndfile crashes on minutes of Vorbis in one write
MAX_TRAILING = 4096  # bytes of tags that may follow the last audio of a file
MAX_OGG_PAGE = 65_307  # bytes
UNKNOWN_LENGTH = 2**63 - 1  # libsndfile's number of samples of a FLAC file that was written to a pipe


def load_audio(path: str | os.PathLike[str], sampling_rate: int = 24_000, channels: int = 1) -> np.ndarray:
    """Read a WAV, FLAC, OGG (Vorbis or Opus) or MP3 file.

    Args:
        path: the file.
        sampling_rate: Hz; a file of another rate is resampled, to ceil(samples * ratio) samples.
        channels: 1 for the mean of the file's channels, 2 for stereo (a mono file is doubled), or the
            number that the file has.

    Returns:
        float32 [channels, samples], at least one sample, all finite. Nothing is clipped: float files,
        lossy ones and resampled audio may go beyond [-1, 1].

    Raises:
        OSError: the file is missing (FileNotFoundError), a folder, or may not be read.
        ValueError: the file is empty, not audio, damaged, cut short, without samples, or has samples
            that are not finite, or channels that cannot be mixed. An MP3 file cut short is a shorter
            MP3 file.
    """
    with open(path, "rb") as file:
        return decode_audio(file, os.fspath(path), sampling_rate, channels)


def decode_audio(file: BinaryIO, name: str, sampling_rate: int = 24_000, channels: int = 1) -> np.ndarray:
    """`load_audio` from an open binary file, or from bytes in an `io.BytesIO`.

    Args:
        file: binary, seekable, at its start.
        name: what error messages call it.
        sampling_rate, channels: as in `load_audio`.
    """
    if sampling_rate < 1:
        raise ValueError(f"sampling_rate must be positive, got {sampling_rate}")
    samples, rate = _decode(file, name)
    if len(samples) == 0:
        raise ValueError(f"{name} has no samples")
    if not np.isfinite(samples).all():
        raise ValueError(f"{name} has samples that are NaN or infinite")
    if rate < MIN_SAMPLING_RATE:
        raise ValueError(f"{name} has a rate of {rate} Hz; it must be at least {MIN_SAMPLING_RATE}")
    samples = _resample(_mix(samples, channels, name), rate, sampling_rate)
    return np.ascontiguousarray(samples.T)


class _ForwardReader(soundfile.SoundFile):
    """A file read once, front to back.

    soundfile seeks after every read, which fails in a FLAC file that was written to a pipe and so does
    not know its length.
    """

    def seekable(self) -> bool:
        return False


def _blocks(sound: soundfile.SoundFile) -> Iterator[np.ndarray]:
    """float32 [samples, channels] pieces up to the announced length or, if that comes first, the end."""
    left = sound.frames
    while len(block := sound.read(min(BLOCK, left), dtype="float32", always_2d=True)):
        left -= len(block)
        yield block


def _decode(file: BinaryIO, name: str) -> tuple[np.ndarray, int]:
    """float32 [samples, channels] and the sampling rate of a whole file."""
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    if size == 0:
        raise ValueError(f"{name} is empty (0 bytes)")
    try:
        with _ForwardReader(file) as sound:
            samples = np.concatenate([np.zeros((0, sound.channels), np.float32), *_blocks(sound)])
            trailing = size - file.tell()
    except soundfile.LibsndfileError as error:
        raise ValueError(
            f"{name} is not a WAV, FLAC, OGG or MP3 file, or it is damaged or cut short"
        ) from error
    except TypeError as error:  # soundfile's answer to a name that ends in .raw
        raise ValueError(f"{name} is raw audio, which does not tell its format") from error
    # libFLAC reports an end inside a frame, but not one between two frames.
    is_short_flac = sound.format == "FLAC" and len(samples) < sound.frames != UNKNOWN_LENGTH
    if is_short_flac or _is_cut_short(file, size):
        raise ValueError(f"{name} is cut short: it ends before its header says, at {size} bytes")
    if sound.format in ("FLAC", "MP3", "OGG") and trailing > MAX_TRAILING:
        raise ValueError(
            f"{name} goes on for {trailing} bytes after the length that its header tells: several "
            "streams in one file, or a wrong header; convert it to WAV or FLAC"
        )
    return samples, sound.samplerate


def _is_cut_short(file: BinaryIO, size: int) -> bool:
    """Whether a file ends too early, in formats whose headers tell and libsndfile does not."""
    file.seek(0)
    match file.read(12)[:4]:
        case b"RIFF" | b"RF64":
            return _chunk_is_cut_short(file, size, "little")
        case b"RIFX" | b"FORM":
            return _chunk_is_cut_short(file, size, "big")
        case b"OggS":
            return _ogg_is_cut_short(file, size)
    return False


def _chunk_is_cut_short(file: BinaryIO, size: int, byteorder: Literal["little", "big"]) -> bool:
    """Whether the audio chunk of a WAV, RF64 or AIFF file goes beyond the end of the file."""
    rf64_length = None
    while len(header := file.read(8)) == 8:
        name, length = header[:4], int.from_bytes(header[4:], byteorder)
        start = file.tell()
        if name == b"ds64":  # sizes that 32 bits cannot hold
            rf64_length = int.from_bytes(file.read(16)[8:], byteorder)
        if name in (b"data", b"SSND"):
            # A program that writes to a pipe cannot know the length; it leaves about 2 or 4 GiB.
            if not rf64_length and min(abs(length - 2**31), abs(length - 2**32)) <= 8192:
                return False
            return start + (rf64_length or length) > size
        file.seek(start + length + length % 2)
    return False


def _ogg_is_cut_short(file: BinaryIO, size: int) -> bool:
    """Whether the last page of an Ogg file is incomplete, or not marked as the last."""
    file.seek(max(0, size - MAX_OGG_PAGE - MAX_TRAILING))
    tail = file.read()
    page = tail[max(0, tail.rfind(b"OggS")) :]
    if len(page) < 27:
        return True
    flags, num_segments = page[5], page[26]
    return not flags & 4 or len(page) < 27 + num_segments + sum(page[27 : 27 + num_segments])


def _mix(samples: np.ndarray, channels: int, name: str) -> np.ndarray:
    """[samples, any] to [samples, channels]."""
    found = samples.shape[1]
    if found == channels:
        return samples
    if channels == 1:
        return samples.mean(axis=1, keepdims=True)
    if (found, channels) == (1, 2):
        return samples.repeat(2, axis=1)
    raise ValueError(f"{name} has {found} channels and cannot be mixed to {channels}; ask for 1 or {found}")


def _resample(samples: np.ndarray, rate: int, sampling_rate: int) -> np.ndarray:
    """[samples, channels] to [ceil(samples * sampling_rate / rate), channels]."""
    if rate == sampling_rate:
        return samples
    length = -(-len(samples) * sampling_rate // rate)
    # Alone, soxr may leave out the last sample, even when it is the only one; zeros bring it out.
    zeros = np.zeros((2 + rate // sampling_rate, samples.shape[1]), np.float32)
    return soxr.resample(np.concatenate([samples, zeros]), rate, sampling_rate, "VHQ")[:length]


def save_audio(path: str | os.PathLike[str], audio: ArrayLike, sampling_rate: int = 24_000) -> None:
    """Write audio to a file, whole or not at all; the suffix of the name says the format.

    WAV and FLAC hold 16-bit PCM: 16-bit audio that `load_audio` read comes back bit for bit.

    Args:
        path: .wav, .flac, .ogg (Vorbis), .opus or .mp3; its folder must exist.
        audio: float [channels, samples] or [samples], clipped to [-1, 1].
        sampling_rate: Hz.

    Raises:
        ValueError: an unknown suffix, a rate or channel count that the format cannot hold, or audio
            that is empty, not float, or not finite.
        OSError: the file cannot be written.
    """
    path = Path(path)
    if path.suffix.lower() not in FORMATS:
        raise ValueError(f"the name of an audio file must end in {', '.join(FORMATS)}, got {path}")
    samples = _as_channels(audio).T
    if not np.isfinite(samples).all():
        raise ValueError(f"cannot write {path}: the audio has samples that are NaN or infinite")
    data = _encode(samples, sampling_rate, path)
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def _encode(samples: np.ndarray, sampling_rate: int, path: Path) -> bytes:
    """The file of finite [samples, channels]; made in memory, where no disk can be full."""
    form, subtype = FORMATS[path.suffix.lower()]
    samples = samples.clip(-1, 1)
    if subtype == "PCM_16":  # libsndfile scales by 32767, but divides by 32768 when it reads
        samples = np.rint(samples * 32768).clip(-32768, 32767).astype(np.int16)
    buffer = io.BytesIO()
    channels = samples.shape[1]
    try:
        with soundfile.SoundFile(buffer, "w", sampling_rate, channels, subtype, format=form) as sound:
            for start in range(0, len(samples), BLOCK):
                sound.write(samples[start : start + BLOCK])
    except soundfile.LibsndfileError as error:
        raise ValueError(
            f"cannot write {path}: {form} {subtype} does not take {channels} channels at "
            f"{sampling_rate} Hz ({error.error_string})"
        ) from error
    return buffer.getvalue()


def pad_batch(clips: Iterable[ArrayLike]) -> tuple[np.ndarray, np.ndarray]:
    """Put clips of different lengths into one array, padded with zeros on the right.

    Args:
        clips: float [samples] or [channels, samples] each, all with the same number of channels.

    Returns:
        audio, float32 [batch, channels, samples], and padding_mask, bool [batch, samples], True where
        audio is real; `samples` is the length of the longest clip.

    Raises:
        ValueError: no clips, an empty clip, clips that are not float, or different channel counts.
    """
    rows = [_as_channels(clip) for clip in clips]
    if not rows:
        raise ValueError("a batch needs at least one clip, got none")
    channels = {len(row) for row in rows}
    if len(channels) > 1:
        raise ValueError(
            f"all clips of a batch must have the same number of channels, got {sorted(channels)}"
        )
    lengths = np.array([row.shape[1] for row in rows])
    padding_mask = np.arange(lengths.max()) < lengths[:, None]
    audio = np.zeros((len(rows), *channels, lengths.max()), np.float32)
    for padded, row in zip(audio, rows, strict=True):
        padded[:, : row.shape[1]] = row
    return audio, padding_mask


def _as_channels(audio: ArrayLike) -> np.ndarray:
    """float [samples] or [channels, samples] to float32 [channels, samples]."""
    array = np.asarray(audio)
    # Integers would be taken for full scale; JAX's bfloat16 is of kind V.
    if array.dtype.kind not in "fV" or array.ndim not in (1, 2) or array.size == 0:
        raise ValueError(
            "audio must be float [channels, samples] or [samples] in [-1, 1], with one sample or "
            f"more, got {array.dtype} {list(array.shape)}"
        )
    return np.atleast_2d(array).astype(np.float32)
