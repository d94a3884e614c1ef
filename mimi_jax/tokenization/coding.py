"""Encoding many clips at once.

Short clips wait for others of about the same length. They are padded to one of a few lengths and encoded
together in one masked batch. Long clips are streams: each is a row of another batch, which is encoded one
chunk at a time. When a clip ends inside a chunk, its mask ends there too, and the row takes the next clip
with the next chunk. So clips of all lengths need only a handful of static shapes. In float32 their codes are
those of `encode` on each clip alone.

The device never waits for the host, as long as clips are read as fast as it encodes them: it has two batches
to do while the next one is put together, and its answers are fetched after that.
"""

import collections
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from mimi_jax.config import ceil_div
from mimi_jax.files.batches import bucket_length
from mimi_jax.tokenization.programs import Programs
from mimi_jax.tokenization.workers import ClipError, ClipReader

IN_FLIGHT = 2  # batches that wait for the device while the next one is put together
SHORT_SECONDS = 30  # longer clips are streams
SHORTEST_SECONDS = 1  # shorter clips are padded to this length
# Audio in a batch of short clips, on each device. In float32 this takes 12 GB of a TPU.
BATCH_SECONDS = 256
# A clip that has waited while the clips of this many full batches were read is encoded, even in a batch that
# is not full. A job that is killed loses no more work than that.
FLUSH_BATCHES = 64


class Result(NamedTuple):
    """The codes of a clip, or the reason why it has none."""

    reader: ClipReader
    num_samples: int
    codes: np.ndarray | None  # uint16 [codebooks, frames]
    problem: str = ""
    is_transient: bool = False  # of the problem: a second try may succeed


class Coder:
    """Encodes clips.

    Args:
        programs: the model on its devices.
        batch_size: clips in a batch, or fewer if they are too long for `BATCH_SECONDS`. A multiple of the
            number of devices.
        chunk_frames: frames of each long clip that are encoded at once.

    Raises:
        ValueError: the devices cannot share the rows equally.
    """

    def __init__(self, programs: Programs, batch_size: int, chunk_frames: int):
        if batch_size < 1 or batch_size % programs.num_devices:
            raise ValueError(
                f"batch_size must be a multiple of the {programs.num_devices} devices, got {batch_size}"
            )
        self._programs, self.batch_size, self.config = programs, batch_size, programs.config
        self.chunk_size = chunk_frames * self.config.frame_size
        self._short: dict[int, list[_Clip]] = {}  # waiting clips, by the length to which they will be padded
        self._rows: list[_Clip | None] = []  # long clips
        self._state: Any = None  # of the long clips
        self._running: collections.deque[_Batch] = collections.deque()
        self._free: list[np.ndarray] = []  # memory of batches that are done

    def run(self, readers: Iterator[ClipReader], coded: Callable[[int], object]) -> Iterator[Result]:
        """Encode clips, and yield each result when its clip ends.

        Args:
            readers: the clips. Some are taken ahead of their turn, so that the workers are always busy.
            coded: called after each batch with the number of samples that were encoded.
        """
        self._coded = coded
        self._short.clear()  # an earlier run may have been stopped in the middle
        self._running.clear()
        self._rows, self._state = [None] * self.batch_size, None
        period = FLUSH_BATCHES * self.batch_size // 2
        for number, reader in enumerate(_take_ahead(readers, self.batch_size), 1):
            try:
                clip = _Clip(reader, number)
            except ClipError as error:
                yield Result(reader, 0, None, str(error), error.is_transient)
            else:
                is_short = clip.is_here and clip.num_here <= SHORT_SECONDS * self.config.sampling_rate
                yield from self._add_short(clip) if is_short else self._add_long(clip)
            # The oldest clip that stays has waited for one period, and may do so again.
            if number % period == 0:
                yield from self._flush(number - period)
        yield from self._flush(math.inf)
        while self._running:
            yield from self._collect()

    def _add_short(self, clip: "_Clip") -> Iterator[Result]:
        size = self._padded(clip)
        waiting = self._short.setdefault(size, [])
        waiting.append(clip)
        if len(waiting) == self._num_rows(size):
            yield from self._encode_whole(self._short.pop(size))

    def _add_long(self, clip: "_Clip") -> Iterator[Result]:
        while None not in self._rows:
            yield from self._encode_chunks()
        self._rows[self._rows.index(None)] = clip

    def _flush(self, last: float) -> Iterator[Result]:
        """Encode what waits with a clip of number `last` or before, even in batches that are not full.

        Clips that came later wait on. If they were encoded too, the device would have nothing to do until
        there are enough new ones.
        """
        late = [size for size, clips in self._short.items() if clips[0].number <= last]
        waiting = sorted((clip for size in late for clip in self._short.pop(size)), key=lambda c: -c.num_here)
        while waiting:
            num_rows = self._num_rows(self._padded(waiting[0]))
            yield from self._encode_whole(waiting[:num_rows])
            del waiting[:num_rows]
        if all(clip is None or clip.number > last for clip in self._rows):
            return
        while any(self._rows):
            self._drop_empty_rows()
            yield from self._encode_chunks()
        self._rows, self._state = [None] * self.batch_size, None

    def _padded(self, clip: "_Clip") -> int:
        """The length in samples to which a short clip is padded."""
        shortest = SHORTEST_SECONDS * self.config.sampling_rate
        return bucket_length(max(clip.num_here, shortest), self.config.frame_size)

    def _num_rows(self, size: int) -> int:
        """How many clips of `size` samples make a batch."""
        per_device = BATCH_SECONDS * self.config.sampling_rate // size
        return min(max(per_device, 1) * self._programs.num_devices, self.batch_size)

    def _encode_whole(self, clips: list["_Clip"]) -> Iterator[Result]:
        """Encode short clips together, all padded as the longest needs it."""
        size = max(map(self._padded, clips))
        audio = self._memory(self._num_rows(size), size)
        parts = [_Part(row, clip, *clip.take(audio[row])) for row, clip in enumerate(clips)]
        audio[len(parts) :] = 0
        codes = self._programs.encode(audio, _lengths(parts, len(audio)))
        yield from self._enqueue(_Batch(codes, parts, audio))

    def _encode_chunks(self) -> Iterator[Result]:
        """Encode the next chunk of each long clip."""
        audio = self._memory(len(self._rows), self.chunk_size)
        is_new = np.zeros(len(self._rows), bool)
        parts = []
        for row, clip in enumerate(self._rows):
            if clip is None:
                audio[row] = 0
                continue
            is_new[row] = clip.num_samples == 0
            try:
                part = _Part(row, clip, *clip.take(audio[row]))
            except ClipError as error:  # the codes that the clip has so far are dropped
                self._rows[row], audio[row] = None, 0
                yield Result(clip.reader, 0, None, str(error), error.is_transient)
                continue
            parts.append(part)
            if part.is_last:
                self._rows[row] = None
        if not parts:
            return
        if self._state is None:
            self._state = self._programs.init_state(len(self._rows))
        lengths = _lengths(parts, len(audio))
        self._state, codes = self._programs.encode_step(self._state, audio, lengths, is_new)
        yield from self._enqueue(_Batch(codes, parts, audio))

    def _drop_empty_rows(self) -> None:
        """Shrink the batch to a quarter of its rows, or to a quarter of that, if the last long clips fit."""
        used = [row for row, clip in enumerate(self._rows) if clip is not None]
        size = len(self._rows)
        while size % (4 * self._programs.num_devices) == 0 and len(used) <= size // 4:
            size //= 4
        if size == len(self._rows):
            return
        num_empty = size - len(used)
        self._rows = [self._rows[row] for row in used] + [None] * num_empty
        if self._state is not None:
            self._state = self._programs.select(self._state, used + [0] * num_empty)

    def _memory(self, num_rows: int, size: int) -> np.ndarray:
        """Memory for a batch: float32 [rows, channels, samples], with any values.

        It is that of an earlier batch, since new memory would cost as much time as filling it.
        """
        shape = (num_rows, self.config.audio_channels, size)
        length = math.prod(shape)
        memory = self._free.pop() if self._free else np.empty(0, np.float32)
        if memory.size < length:
            memory = np.empty(length, np.float32)
        return memory[:length].reshape(shape)

    def _enqueue(self, batch: "_Batch") -> Iterator[Result]:
        """Remember a batch that the device was given, and wait for the oldest if there are many."""
        self._running.append(batch)
        if len(self._running) > IN_FLIGHT:
            yield from self._collect()

    def _collect(self) -> Iterator[Result]:
        """Wait for the oldest batch, and yield the clips that end in it."""
        codes, parts, audio = self._running.popleft()
        codes = self._programs.fetch(codes)
        assert isinstance(audio.base, np.ndarray)
        self._free.append(audio.base)  # nothing reads it any more
        self._coded(sum(part.length for part in parts))
        for part in parts:
            clip, frames = part.clip, ceil_div(part.length, self.config.frame_size)
            # A view would keep all of `codes` in memory.
            clip.codes.append(codes[part.row, :, :frames].copy())
            if part.is_last:
                yield Result(clip.reader, clip.num_samples, np.concatenate(clip.codes, axis=1))


def _take_ahead(readers: Iterator[ClipReader], count: int) -> Iterator[ClipReader]:
    """The same clips, of which `count` more are open than were asked for."""
    opened: collections.deque[ClipReader] = collections.deque()
    for reader in readers:
        opened.append(reader)
        if len(opened) > count:
            yield opened.popleft()
    yield from opened


def _lengths(parts: list["_Part"], num_rows: int) -> np.ndarray:
    """int32 [rows]: the real samples of each row."""
    lengths = np.zeros(num_rows, np.int32)
    for part in parts:
        lengths[part.row] = part.length
    return lengths


class _Clip:
    """A clip, with the samples that were read and are not encoded yet."""

    def __init__(self, reader: ClipReader, number: int):
        self.reader, self.number, self.num_samples, self.codes = reader, number, 0, []
        self._audio, self.is_here = reader.next()

    @property
    def num_here(self) -> int:
        """Samples that were read and not taken yet; if `is_here`, they are the rest of the clip."""
        return self._audio.shape[1]

    def take(self, out: np.ndarray) -> tuple[int, bool]:
        """Move the next samples to `out`, [channels, samples], and silence behind the last.

        Returns:
            How many samples were moved, and whether the clip ends with them.
        """
        length, size = 0, out.shape[1]
        while True:
            some = self._audio[:, : size - length]
            out[:, length : length + some.shape[1]] = some
            self._audio = self._audio[:, some.shape[1] :]
            length += some.shape[1]
            if self.num_here:
                break
            # It is empty, but as a view it would keep the whole piece in memory.
            self._audio = self._audio.copy()
            if self.is_here:
                break
            self._audio, self.is_here = self.reader.next()
        out[:, length:] = 0
        self.num_samples += length
        return length, self.is_here and not self.num_here


class _Part(NamedTuple):
    """The stretch of a clip in one row of a batch."""

    row: int
    clip: _Clip
    length: int  # samples
    is_last: bool


class _Batch(NamedTuple):
    """What a device is working on."""

    codes: Any  # for `Programs.fetch`
    parts: list[_Part]
    audio: np.ndarray  # its memory must not change before the codes are there
