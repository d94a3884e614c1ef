"""Read and write audio files, whole or in pieces. NumPy only.

A file is read completely or refused. `mimi_jax.files.containers` checks what a file states about itself, and
`AudioReader` compares it with what libsndfile reads.
"""

import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
import soundfile
import soxr
from numpy.typing import ArrayLike

from mimi_jax.config import ceil_div
from mimi_jax.files.atomic import atomic_path
from mimi_jax.files.batches import as_channels
from mimi_jax.files.containers import open_container
from mimi_jax.files.sound import ForwardReader

# The formats that can be written, by suffix: libsndfile's names of the format and the subtype.
FORMATS = {
    ".flac": ("FLAC", "PCM_16"),
    ".mp3": ("MP3", "MPEG_LAYER_III"),
    ".ogg": ("OGG", "VORBIS"),
    ".opus": ("OGG", "OPUS"),
    ".wav": ("WAV", "PCM_16"),
}
MIN_SAMPLING_RATE = 1000  # Hz; a lower rate means a broken header, and would resample to a gigantic clip
CHUNK_SAMPLES = 65_536  # per read or write; libsndfile crashes when it writes minutes of Vorbis at once
# Seconds to read and drop before a stretch: these decoders need some audio until they forget how they began.
# The samples then equal those of the whole file.
LEAD = {"MP3": 1, "OGG": 2}
# The bytes of a sample in formats that are not compressed.
WIDTHS = {
    **{"PCM_S8": 1, "PCM_U8": 1, "PCM_16": 2, "PCM_24": 3, "PCM_32": 4},
    **{"FLOAT": 4, "DOUBLE": 8, "ALAW": 1, "ULAW": 1},
}
ROUNDING = 0.1  # seconds by which the end of a stretch may lie beyond the end of its file
MAX_WAV_BYTES = 2**32 - 4096  # of samples; the header has 32 bits for the size of the file
UNKNOWN_LENGTH = 2**63 - 1  # libsndfile's number of samples for a FLAC file that was written to a pipe


def load_audio(path: str | os.PathLike[str], sampling_rate: int = 24_000, channels: int = 1) -> np.ndarray:
    """Read an audio file: WAV, FLAC, Ogg (Vorbis, Opus), MP3 (and MP2), AIFF, AU, CAF, W64 or NIST SPHERE.

    The content decides what a file is, and not its name. ID3 and APE tags may stand around the audio.

    Args:
        path: the file.
        sampling_rate: Hz. A file with another rate is resampled to ceil(samples * ratio) samples.
        channels: 1 for the mean of the file's channels, 2 for stereo (a mono file is doubled), or the number
            of channels that the file has.

    Returns:
        float32 [channels, samples], at least one sample, all finite. Nothing is clipped: a float file, a
        lossy file or resampled audio may go beyond [-1, 1].

    Raises:
        OSError: the file is missing (FileNotFoundError), is a folder, or cannot be read.
        ValueError: the file is empty, is not audio, is damaged, was cut short, holds several streams, has no
            samples, has samples that are not finite, or has channels that cannot be mixed. A cut cannot be
            recognized in a file that does not state its length: an MP3 file without a note (Xing or Info),
            or a FLAC file from a pipe, that was cut exactly between two frames, and any WAV, AU or CAF file
            from a pipe.
    """
    with open(os.path.expanduser(path), "rb") as file:
        return read_audio(file, os.fspath(path), sampling_rate, channels)


def read_audio(file: BinaryIO, name: str, sampling_rate: int = 24_000, channels: int = 1) -> np.ndarray:
    """`load_audio` from an open binary file, or from bytes in an `io.BytesIO`.

    Args:
        file: binary and seekable, at its start.
        name: the name to use in error messages.
        sampling_rate, channels: as in `load_audio`.
    """
    return np.concatenate(list(AudioReader(file, name, sampling_rate, channels)), axis=1)


class AudioReader:
    """`read_audio` in pieces, in memory that does not grow with the length of the file.

        with open(path, "rb") as file:
            for piece in AudioReader(file, path):  # float32 [channels, samples]
                ...

    The pieces, joined, are exactly the array that `read_audio` returns, also when the file is resampled. Some
    damage is found only at the end, so the file is known to be whole when the loop ends without an error.

    Args:
        file, name, channels: as in `read_audio`.
        sampling_rate: Hz; None for the file's own rate.
        start, end: seconds. Only this stretch is read, and damage after it is not looked for. None for the
            end of the file.

    Attributes:
        sampling_rate: Hz, of the pieces.
        num_samples: how many samples the file announces, after resampling; None if it does not.

    Raises:
        ValueError: as in `load_audio`; at once if the beginning of the file shows the problem, otherwise
            during the loop.
    """

    def __init__(
        self,
        file: BinaryIO,
        name: str,
        sampling_rate: int | None = 24_000,
        channels: int = 1,
        start: float = 0.0,
        end: float | None = None,
    ):
        if sampling_rate is not None and sampling_rate < 1:
            raise ValueError(f"sampling_rate must be positive, got {sampling_rate}")
        self._name = name
        if not file.seekable():
            raise ValueError(f"{name} is a pipe, and audio is read from files; write it to a file first")
        if file.seek(0, os.SEEK_END) == 0:
            raise ValueError(f"{name} is empty (0 bytes)")
        try:
            self._container = open_container(file)
        except ValueError as error:
            raise ValueError(f"{name} {error}") from None
        source = self._container.file
        if start and end is not None:
            source = self._container.file_to_seek or source
        self._open(source)
        self._rate, self._channels = self._sound.samplerate, channels
        self.sampling_rate = sampling_rate or self._rate
        if self._rate < MIN_SAMPLING_RATE:
            raise ValueError(f"{name} has a rate of {self._rate} Hz; it must be at least {MIN_SAMPLING_RATE}")
        self._total = self._stated_length()
        self._start, self._end = self._stretch(start, end)
        last = self._total if self._end is None else self._end
        self.num_samples = None if last is None else self._resampled_length(last - self._start)

    def __iter__(self) -> Iterator[np.ndarray]:
        try:
            for piece in self._mixed() if self._rate == self.sampling_rate else self._resampled():
                yield np.ascontiguousarray(piece.T)
        finally:
            self._sound.close()

    def _open(self, file: BinaryIO) -> None:
        """Give a file to libsndfile."""
        with self._reading():
            file.seek(0)
            self._sound = ForwardReader(file)

    def _stated_length(self) -> int | None:
        """How many samples the file states that it has; None if it does not."""
        sound, num_samples = self._sound, self._container.num_samples
        num_bytes = self._container.num_bytes
        if sound.format == "FLAC":
            return num_samples
        frame_bytes = WIDTHS.get(sound.subtype, 0) * sound.channels  # of one sample in all channels
        if num_bytes is not None and frame_bytes and num_bytes != sound.frames * frame_bytes:
            raise ValueError(
                f"{self._name} has a wrong header: it states {num_bytes} bytes of samples, and"
                f" {sound.frames} samples of {frame_bytes} bytes"
            )
        if num_samples is not None and sound.frames < num_samples:
            raise ValueError(
                f"{self._name} has {num_samples} samples, but only {sound.frames} can be read, since its bit"
                " rate varies; convert it to WAV or FLAC"
            )
        return num_samples or sound.frames  # libsndfile's word for samples per channel

    def _stretch(self, start: float, end: float | None) -> tuple[int, int | None]:
        """The first sample at the file's own rate, and the one after the last; None for the file's end."""
        if not start and end is None:
            return 0, None
        first, last = round(start * self._rate), None if end is None else round(end * self._rate)
        total = UNKNOWN_LENGTH if self._total is None else self._total
        if not 0 <= first < min(total, total if last is None else last):
            until = "its end" if end is None else f"{end:g} s"
            raise ValueError(
                f"{self._name} has no audio from {start:g} s to {until}: it is {total / self._rate:g} s long"
            )
        if last is not None and last > total:
            if last - total > ROUNDING * self._rate:
                raise ValueError(
                    f"{self._name} is {total / self._rate:g} s long, so it ends before {end:g} s"
                )
            last = total
        return first, last

    def _resampled_length(self, num_samples: int) -> int:
        return ceil_div(num_samples * self.sampling_rate, self._rate)

    def _resampled(self) -> Iterator[np.ndarray]:
        """[samples, channels] pieces at the rate that was asked for."""
        stream = soxr.ResampleStream(self._rate, self.sampling_rate, self._channels, "float32", "VHQ")
        num_read = num_given = 0
        for piece in self._mixed():
            num_read += len(piece)
            resampled = stream.resample_chunk(piece)
            num_given += len(resampled)
            if len(resampled):
                yield resampled
        # On its own, soxr may keep back the last sample, even if it is the only one. Zeros push it out.
        zeros = np.zeros((2 + self._rate // self.sampling_rate, self._channels), np.float32)
        yield stream.resample_chunk(zeros, last=True)[: self._resampled_length(num_read) - num_given]

    def _mixed(self) -> Iterator[np.ndarray]:
        """[samples, channels] pieces at the file's own rate, with the channels that were asked for."""
        num_samples = 0
        for piece in self._pieces():
            if not np.isfinite(piece).all():
                raise ValueError(f"{self._name} has samples that are NaN or infinite")
            num_samples += len(piece)
            yield mix_channels(piece, self._channels, self._name)
        if num_samples == 0:
            raise ValueError(f"{self._name} has no samples")

    def _pieces(self) -> Iterator[np.ndarray]:
        """float32 [samples, any] pieces up to the end of the stretch, or of the file."""
        position = self._skip()
        last = UNKNOWN_LENGTH if self._end is None else self._end
        if self._container.begin_at is not None and self._total is not None:
            last = min(last, self._total)  # a file that begins later has what is left out at the end
        while True:
            with self._reading():
                piece = self._sound.read(min(CHUNK_SAMPLES, last - position), dtype="float32", always_2d=True)
            if len(piece) == 0:
                break
            position += len(piece)
            yield piece
        stated = self._total if self._end is None else self._end
        if stated is not None and position != stated:
            problem = "is damaged or cut short" if position < stated else "has a wrong header"
            wanted = "its header states" if self._end is None else "the stretch ends at"
            raise ValueError(f"{self._name} {problem}: {position} samples were read, but {wanted} {stated}")

    def _skip(self) -> int:
        """Go to the first sample of the stretch."""
        with self._reading():
            left = min(LEAD.get(self._sound.format, 0) * self._rate, self._start)
            if (position := self._start - left) and self._container.begin_at is not None:
                file, first = self._container.begin_at(position)
                self._open(file)
                left = self._start - first
            elif position:
                self._sound.seek(position)
            while left and (count := len(self._sound.read(min(CHUNK_SAMPLES, left)))):
                left -= count
        return self._start

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """Turn errors into ours, which name the file."""
        try:
            yield
        except soundfile.LibsndfileError as error:
            raise ValueError(
                f"{self._name} is damaged or cut short, has several streams in one file, or is in an encoding"
                " that cannot be read"
            ) from error


def mix_channels(samples: np.ndarray, channels: int, name: str) -> np.ndarray:
    """Mix samples [samples, any] to [samples, channels], as `load_audio` describes."""
    found = samples.shape[1]
    if found == channels:
        return samples
    if channels == 1:
        return samples.mean(axis=1, keepdims=True)
    if (found, channels) == (1, 2):
        return samples.repeat(2, axis=1)
    raise ValueError(f"{name} has {found} channels and cannot be mixed to {channels}; ask for 1 or {found}")


def save_audio(path: str | os.PathLike[str], audio: ArrayLike, sampling_rate: int = 24_000) -> None:
    """Write audio to a file, whole or not at all. The suffix of the name chooses the format.

    WAV and FLAC hold 16-bit PCM: 16-bit audio that `load_audio` read comes back bit for bit.

    Args:
        path: .wav, .flac, .ogg (Vorbis), .opus or .mp3; its folder must exist.
        audio: float [channels, samples] or [samples], clipped to [-1, 1].
        sampling_rate: Hz.

    Raises:
        ValueError: the suffix is unknown, the format does not support the rate or the number of channels, or
            the audio is empty, not float, or not finite.
        OSError: the file cannot be written.
    """
    array = as_channels(audio)
    with audio_writer(path, sampling_rate, len(array), array.shape[1]) as write:
        write(array)


@contextmanager
def audio_writer(
    path: str | os.PathLike[str], sampling_rate: int, channels: int, num_samples: int = 0
) -> Iterator[Callable[[ArrayLike], None]]:
    """`save_audio` in pieces: yields the function that writes the next float [channels, samples].

    The file appears when the `with` block ends, and not at all if the block raises.

    Args:
        path, sampling_rate: as in `save_audio`.
        channels: of the audio that will be written.
        num_samples: how many samples will be written, if that is known. Too many are then refused at once.
    """
    path = Path(path)
    if path.suffix.lower() not in FORMATS:
        raise ValueError(f"the name of an audio file must end in {', '.join(FORMATS)}, got {path}")
    form, subtype = FORMATS[path.suffix.lower()]
    count = 0

    def check_size(num_samples: int) -> None:
        if form == "WAV" and num_samples * channels * 2 > MAX_WAV_BYTES:
            raise ValueError(
                f"cannot write {path}: a WAV file holds at most 4 GiB; write a .flac file instead"
            )

    def write(audio: ArrayLike) -> None:
        nonlocal count
        audio = as_channels(audio)
        count += audio.shape[1]
        check_size(count)
        if not np.isfinite(audio).all():
            raise ValueError(f"cannot write {path}: the audio has samples that are NaN or infinite")
        samples = to_int16(audio.T) if subtype == "PCM_16" else audio.T.clip(-1, 1)
        for start in range(0, len(samples), CHUNK_SAMPLES):
            sound.write(samples[start : start + CHUNK_SAMPLES])

    check_size(num_samples)
    with atomic_path(path) as temporary, _Target(temporary, "w") as target:
        try:
            with soundfile.SoundFile(target, "w", sampling_rate, channels, subtype, format=form) as sound:
                yield write
                if count == 0:
                    raise ValueError(f"cannot write {path}: there is no audio to write")
        except (soundfile.LibsndfileError, AssertionError) as error:  # AssertionError for a short write
            if target.error is not None:
                raise target.error from None
            if not isinstance(error, soundfile.LibsndfileError):
                raise
            raise ValueError(
                f"cannot write {path}: {form} {subtype} does not support {channels} channels at "
                f"{sampling_rate} Hz ({error.error_string})"
            ) from error
        if target.error is not None:
            raise target.error


class _Target(io.FileIO):
    """A file that libsndfile writes to. No exception can pass through libsndfile, so the first is kept."""

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
    """Finite samples as 16-bit PCM, clipped to [-1, 1]; exact for samples that came from 16-bit PCM.

    libsndfile does not do this: it multiplies by 32767 when it writes, but divides by 32768 when it reads.
    """
    return np.rint(samples * 32768).clip(-32768, 32767).astype(np.int16)
