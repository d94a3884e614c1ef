"""Audio files in and out, and clips into batches. NumPy only; a file is whole or it is refused.

libsndfile plays what it finds of a file that was cut short, and only the first of several streams in
one file. Neither may pass for a whole clip here, so both are looked for.
"""

import io
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
import soundfile
import soxr
from numpy.typing import ArrayLike

from mimi_jax.files.atomic import atomic_path

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
SEEKABLE = ("AIFF", "FLAC", "RF64", "WAV", "WAVEX")  # formats in which every sample has its place
ROUNDING = 0.1  # seconds that the end of a stretch may lie beyond the end of its file
MAX_TRAILING = 4096  # bytes of tags that may follow the last audio of a file
MAX_OGG_PAGE = 65_307  # bytes
MAX_WAV_BYTES = 2**32 - 4096  # of samples; the header counts in 32 bits
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
    return np.concatenate(list(AudioReader(file, name, sampling_rate, channels)), axis=1)


class AudioReader:
    """`decode_audio` in pieces, in memory that does not grow with the length of the file.

        with open(path, "rb") as file:
            for piece in AudioReader(file, path):  # float32 [channels, samples]
                ...

    The pieces are those of one array, whatever the file's rate: resampling goes on from one to the next.
    Some damage shows only at the end: a file is whole once the loop is over without an error.

    Args:
        file, name, sampling_rate, channels: as in `decode_audio`.
        start, end: seconds; only this stretch is read, and what lies behind it not looked at. None for the
            end of the file.

    Attributes:
        num_samples: how many samples the file announces, after resampling; None where it does not.

    Raises:
        ValueError: at once where the file's beginning tells, else during the loop.
    """

    def __init__(
        self,
        file: BinaryIO,
        name: str,
        sampling_rate: int = 24_000,
        channels: int = 1,
        start: float = 0.0,
        end: float | None = None,
    ):
        if sampling_rate < 1:
            raise ValueError(f"sampling_rate must be positive, got {sampling_rate}")
        self._file, self._name = file, name
        self._size = file.seek(0, os.SEEK_END)
        file.seek(0)
        if self._size == 0:
            raise ValueError(f"{name} is empty (0 bytes)")
        with self._reading():
            self._sound = _ForwardReader(file)
        self._rate, self._sampling_rate, self._channels = self._sound.samplerate, sampling_rate, channels
        if self._rate < MIN_SAMPLING_RATE:
            raise ValueError(f"{name} has a rate of {self._rate} Hz; it must be at least {MIN_SAMPLING_RATE}")
        self._start, self._end = self._stretch(start, end)
        self.num_samples = None
        if (last := self._end or self._sound.frames) != UNKNOWN_LENGTH:
            self.num_samples = self._resampled_length(last - self._start)

    def __iter__(self) -> Iterator[np.ndarray]:
        with self._sound:
            for piece in self._mixed() if self._rate == self._sampling_rate else self._resampled():
                yield np.ascontiguousarray(piece.T)

    def _stretch(self, start: float, end: float | None) -> tuple[int, int | None]:
        """The first sample at the file's own rate, and the one behind the last; None for all there are."""
        if not start and end is None:
            return 0, None
        frames = self._sound.frames
        first, last = round(start * self._rate), None if end is None else round(end * self._rate)
        if not 0 <= first < min(frames, frames if last is None else last):
            until = "its end" if end is None else f"{end:g} s"
            raise ValueError(
                f"{self._name} has no audio from {start:g} s to {until}: it is {frames / self._rate:g} s long"
            )
        if last is not None and last > frames:
            if last - frames > ROUNDING * self._rate:
                raise ValueError(f"{self._name} is {frames / self._rate:g} s long, and ends before {end:g} s")
            last = frames
        return first, last

    def _resampled_length(self, num_samples: int) -> int:
        return -(-num_samples * self._sampling_rate // self._rate)

    def _resampled(self) -> Iterator[np.ndarray]:
        """[samples, channels] pieces at the rate that was asked for."""
        stream = soxr.ResampleStream(self._rate, self._sampling_rate, self._channels, "float32", "VHQ")
        taken = given = 0
        for piece in self._mixed():
            taken += len(piece)
            resampled = stream.resample_chunk(piece)
            given += len(resampled)
            if len(resampled):
                yield resampled
        # Alone, soxr may leave out the last sample, even when it is the only one; zeros bring it out.
        zeros = np.zeros((2 + self._rate // self._sampling_rate, self._channels), np.float32)
        yield stream.resample_chunk(zeros, last=True)[: self._resampled_length(taken) - given]

    def _mixed(self) -> Iterator[np.ndarray]:
        """[samples, channels] pieces at the file's own rate."""
        num_samples = 0
        for piece in self._decoded():
            if not np.isfinite(piece).all():
                raise ValueError(f"{self._name} has samples that are NaN or infinite")
            num_samples += len(piece)
            yield _mix(piece, self._channels, self._name)
        if num_samples == 0:
            raise ValueError(f"{self._name} has no samples")

    def _decoded(self) -> Iterator[np.ndarray]:
        """float32 [samples, any] pieces up to the announced length or, if that comes first, the end."""
        announced = self._sound.frames
        left = (self._end or announced) - self._skip()
        while True:
            with self._reading():
                piece = self._sound.read(min(BLOCK, left), dtype="float32", always_2d=True)
            if len(piece) == 0:
                break
            left -= len(piece)
            yield piece
        is_short = left > 0 and announced != UNKNOWN_LENGTH
        if self._end is None or is_short:
            self._check_end(is_short)

    def _skip(self) -> int:
        """Go to the first sample. Only where every sample has its place in the file can it be looked up."""
        with self._reading():
            if self._start and self._sound.format in SEEKABLE:
                self._sound.seek(self._start)
            else:
                left = self._start
                while left and (count := len(self._sound.read(min(BLOCK, left)))):
                    left -= count
        return self._start

    def _check_end(self, is_short: bool) -> None:
        """Refuse a file that ends before its header says, or goes on after that."""
        sound, size, trailing = self._sound, self._size, self._size - self._file.tell()
        # libFLAC reports an end inside a frame, but not one between two frames.
        if (sound.format == "FLAC" and is_short) or _is_cut_short(self._file, size):
            raise ValueError(f"{self._name} is cut short: it ends before its header says, at {size} bytes")
        if sound.format in ("FLAC", "MP3", "OGG") and trailing > MAX_TRAILING:
            raise ValueError(
                f"{self._name} goes on for {trailing} bytes after the length that its header tells: several "
                "streams in one file, or a wrong header; convert it to WAV or FLAC"
            )

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """libsndfile's errors, in our words."""
        try:
            yield
        except soundfile.LibsndfileError as error:
            raise ValueError(
                f"{self._name} is not a WAV, FLAC, OGG or MP3 file, or it is damaged or cut short"
            ) from error
        except TypeError as error:  # soundfile's answer to a name that ends in .raw
            raise ValueError(f"{self._name} is raw audio, which does not tell its format") from error


class _ForwardReader(soundfile.SoundFile):
    """A file read once, front to back.

    soundfile seeks after every read, which fails in a FLAC file that was written to a pipe and so does
    not know its length.
    """

    def seekable(self) -> bool:
        return False


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
    channels = _as_channels(audio)
    with audio_writer(path, sampling_rate, len(channels), channels.shape[1]) as write:
        write(channels)


@contextmanager
def audio_writer(
    path: str | os.PathLike[str], sampling_rate: int, channels: int, num_samples: int = 0
) -> Iterator[Callable[[ArrayLike], None]]:
    """`save_audio` in pieces: yields the function that writes the next float [channels, samples].

    The file appears when the block ends, and not at all if it raises.

    Args:
        path, sampling_rate: as in `save_audio`.
        num_samples: how many will be written, where that is known: too many are then refused at once.
    """
    path = Path(path)
    form, subtype = _format_of(path)
    count = 0

    def check_size(num_samples: int) -> None:
        if form == "WAV" and num_samples * channels * 2 > MAX_WAV_BYTES:
            raise ValueError(
                f"cannot write {path}: a WAV file holds 4 GiB, and this is more; name a .flac file"
            )

    def write(audio: ArrayLike) -> None:
        nonlocal count
        audio = _as_channels(audio)
        count += audio.shape[1]
        check_size(count)
        if not np.isfinite(audio).all():
            raise ValueError(f"cannot write {path}: the audio has samples that are NaN or infinite")
        samples = to_int16(audio.T) if subtype == "PCM_16" else audio.T.clip(-1, 1)
        for start in range(0, len(samples), BLOCK):
            sound.write(samples[start : start + BLOCK])

    check_size(num_samples)
    with atomic_path(path) as temporary, _Target(temporary, "w") as target:
        try:
            with soundfile.SoundFile(target, "w", sampling_rate, channels, subtype, format=form) as sound:
                yield write
                if count == 0:
                    raise ValueError(f"cannot write {path}: there is no audio to write")
        except (soundfile.LibsndfileError, AssertionError) as error:  # the latter for a short write
            if target.error is not None:
                raise target.error from None
            if not isinstance(error, soundfile.LibsndfileError):
                raise
            raise ValueError(
                f"cannot write {path}: {form} {subtype} does not take {channels} channels at "
                f"{sampling_rate} Hz ({error.error_string})"
            ) from error
        if target.error is not None:
            raise target.error


def _format_of(path: Path) -> tuple[str, str]:
    if path.suffix.lower() not in FORMATS:
        raise ValueError(f"the name of an audio file must end in {', '.join(FORMATS)}, got {path}")
    return FORMATS[path.suffix.lower()]


class _Target(io.FileIO):
    """A file for libsndfile to write to, through which an exception cannot pass: the first is kept."""

    error: OSError | None = None

    def write(self, data) -> int:
        rest = memoryview(data)
        try:
            while rest:
                rest = rest[super().write(rest) :]
        except OSError as error:
            self.error = self.error or error
        return len(data) - len(rest)


def to_int16(samples: np.ndarray) -> np.ndarray:
    """16-bit PCM of finite samples, clipped to [-1, 1]; exact for what was read from 16-bit PCM.

    libsndfile itself scales by 32767, but divides by 32768 when it reads.
    """
    return np.rint(samples * 32768).clip(-32768, 32767).astype(np.int16)


def bucket_length(length: int, unit: int) -> int:
    """The length to pad to, so that clips of all lengths share a few shapes, each of which compiles once.

    There are four lengths to an octave, all whole units: padding is at most a quarter of a clip (or less
    than a unit), and clips from 1 to 60 seconds have 24 shapes.

    Args:
        length: in samples, or whatever `unit` counts; at least 1.
        unit: `config.frame_size` for audio, 1 for frames of codes.
    """
    units = -(-length // unit)
    step = max(1 << ((units - 1).bit_length() - 3), 1) if units > 4 else 1
    return -(-units // step) * step * unit


def pad_batch(clips: Iterable[ArrayLike], frame_size: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Put clips of different lengths into one array, padded with zeros on the right.

    Args:
        clips: float [samples] or [channels, samples] each, all with the same number of channels.
        frame_size: `config.frame_size` pads on to one of the few lengths of `bucket_length`, so that
            batches of all lengths share a few compiled programs; None to the longest clip.

    Returns:
        audio, float32 [batch, channels, samples], and padding_mask, bool [batch, samples], True where
        audio is real.

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
    longest = int(lengths.max())
    num_samples = longest if frame_size is None else bucket_length(longest, frame_size)
    padding_mask = np.arange(num_samples) < lengths[:, None]
    audio = np.zeros((len(rows), *channels, num_samples), np.float32)
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
