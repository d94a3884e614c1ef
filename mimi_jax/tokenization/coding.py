"""Encoding many clips at once, on all devices of this process.

Short clips wait for others of about the same length. They are padded to one of a few lengths and encoded
together in one masked batch. Long clips are streams: each is a row of another batch, which is encoded one
chunk at a time. When a clip ends inside a chunk, its mask ends there too, and the row takes the next clip
with the next chunk. So clips of all lengths need only a handful of static shapes. In float32 their codes are
those of `encode` on each clip alone.
"""

import collections
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mimi_jax.config import ceil_div
from mimi_jax.files.batches import bucket_length
from mimi_jax.model import Mimi, encode, encode_step
from mimi_jax.nn.streaming import is_real, select_rows
from mimi_jax.tokenization.workers import ClipReader

ROWS = PartitionSpec("rows")
IN_FLIGHT = 2  # batches that wait for the device while the next one is put together
SHORT_SECONDS = 30  # longer clips are streams
SHORTEST_SECONDS = 1  # shorter clips are padded to this length
# Audio in a batch of short clips, on each device. In float32 this takes 12 GB of a TPU.
BATCH_SECONDS = 256
# After this many full batches of clips were read, all clips that still wait are encoded, even in batches that
# are not full. A job that is killed loses no more work than that.
FLUSH_BATCHES = 64


class Result(NamedTuple):
    """The codes of a clip, or the reason why it has none."""

    reader: ClipReader
    num_samples: int
    codes: np.ndarray | None  # uint16 [codebooks, frames]
    problem: str = ""


class Coder:
    """A model on all devices of this process, which encodes clips.

    Args:
        model: a codec that can stream. Its decoder is not needed.
        batch_size: clips in a batch, or fewer if they are too long for `BATCH_SECONDS`. A multiple of the
            number of devices.
        chunk_frames: frames of each long clip that are encoded at once.
        num_quantizers: how many codebooks to use, counted from the first.
        devices: the devices that share the rows. None for all of this process.

    Raises:
        ValueError: the model cannot stream, has no encoder or too few codebooks, or the devices cannot share
            the rows equally.
    """

    def __init__(
        self,
        model: Mimi,
        batch_size: int,
        chunk_frames: int,
        num_quantizers: int,
        devices: list[Any] | None = None,
    ):
        devices = jax.local_devices() if devices is None else devices
        if batch_size < 1 or batch_size % len(devices):
            raise ValueError(f"batch_size must be a multiple of the {len(devices)} devices, got {batch_size}")
        if model.config.codebook_size > 2**16:
            raise ValueError(
                f"codebook_size must be at most 65536, since codes are stored in 16 bits, got"
                f" {model.config.codebook_size}"
            )
        self.batch_size, self.config = batch_size, model.config
        self.num_quantizers = model.quantizer.resolve_count(num_quantizers)
        self.chunk_size = chunk_frames * model.config.frame_size
        self._mesh = Mesh(np.array(devices), *ROWS)
        self._by_row = NamedSharding(self._mesh, ROWS)
        self._everywhere = NamedSharding(self._mesh, PartitionSpec())
        self._parameters, self._structure = jax.tree.flatten(jax.device_put(model, self._everywhere))
        self._init_state = jax.jit(model.init_encoder_state, static_argnums=0, out_shardings=self._by_row)
        self._select = jax.jit(
            lambda state, rows: jax.tree.map(lambda x: x[rows], state), out_shardings=self._by_row
        )
        self._short: dict[int, list[_Clip]] = {}  # waiting clips, by the length to which they will be padded
        self._rows: list[_Clip | None] = []  # long clips
        self._state: Any = None  # of the long clips
        self._running: collections.deque[tuple[jax.Array, list[_Part]]] = collections.deque()

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
        for count, reader in enumerate(_take_ahead(readers, self.batch_size), 1):
            try:
                clip = _Clip(reader)
            except ValueError as error:
                yield Result(reader, 0, None, str(error))
            else:
                is_short = clip.is_here and clip.num_here <= SHORT_SECONDS * self.config.sampling_rate
                yield from self._add_short(clip) if is_short else self._add_long(clip)
            if count % (FLUSH_BATCHES * self.batch_size) == 0:
                yield from self._flush()
        yield from self._flush()

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

    def _flush(self) -> Iterator[Result]:
        """Encode all clips that wait, even in batches that are not full."""
        waiting = sorted(
            (clip for clips in self._short.values() for clip in clips), key=lambda clip: -clip.num_here
        )
        self._short.clear()
        while waiting:
            num_rows = self._num_rows(self._padded(waiting[0]))
            yield from self._encode_whole(waiting[:num_rows])
            del waiting[:num_rows]
        while any(self._rows):
            self._drop_empty_rows()
            yield from self._encode_chunks()
        while self._running:
            yield from self._collect()
        self._rows, self._state = [None] * self.batch_size, None

    def _padded(self, clip: "_Clip") -> int:
        """The length in samples to which a short clip is padded."""
        shortest = SHORTEST_SECONDS * self.config.sampling_rate
        return bucket_length(max(clip.num_here, shortest), self.config.frame_size)

    def _num_rows(self, size: int) -> int:
        """How many clips of `size` samples make a batch."""
        per_device = BATCH_SECONDS * self.config.sampling_rate // size
        return min(max(per_device, 1) * self._mesh.size, self.batch_size)

    def _encode_whole(self, clips: list["_Clip"]) -> Iterator[Result]:
        """Encode short clips together, all padded as the longest needs it."""
        size = max(map(self._padded, clips))
        audio = np.zeros((self._num_rows(size), self.config.audio_channels, size), np.float32)
        parts = [_Part(row, clip, *clip.take(audio[row])) for row, clip in enumerate(clips)]
        inputs = jax.device_put((audio, _lengths(parts, len(audio))), self._by_row)
        codes = _encode(self.num_quantizers, self._mesh, self._structure, self._parameters, *inputs)
        yield from self._enqueue(codes, parts)

    def _encode_chunks(self) -> Iterator[Result]:
        """Encode the next chunk of each long clip."""
        audio = np.zeros((len(self._rows), self.config.audio_channels, self.chunk_size), np.float32)
        is_new = np.zeros(len(self._rows), bool)
        parts = []
        for row, clip in enumerate(self._rows):
            if clip is None:
                continue
            is_new[row] = clip.num_samples == 0
            try:
                part = _Part(row, clip, *clip.take(audio[row]))
            except ValueError as error:  # the codes that the clip has so far are dropped
                self._rows[row] = None
                yield Result(clip.reader, 0, None, str(error))
                continue
            parts.append(part)
            if part.is_last:
                self._rows[row] = None
        if not parts:
            return
        if self._state is None:
            self._state = self._init_state(len(self._rows))
        inputs = jax.device_put((audio, _lengths(parts, len(audio)), is_new), self._by_row)
        self._state, codes = _encode_step(
            self.num_quantizers, self._mesh, self._structure, self._parameters, self._state, *inputs
        )
        yield from self._enqueue(codes, parts)

    def _drop_empty_rows(self) -> None:
        """Shrink the batch to a quarter of its rows, or to a quarter of that, if the last long clips fit."""
        used = [row for row, clip in enumerate(self._rows) if clip is not None]
        size = len(self._rows)
        while size % (4 * self._mesh.size) == 0 and len(used) <= size // 4:
            size //= 4
        if size == len(self._rows):
            return
        num_empty = size - len(used)
        self._rows = [self._rows[row] for row in used] + [None] * num_empty
        if self._state is not None:
            rows = jax.device_put(np.array(used + [0] * num_empty), self._everywhere)
            self._state = self._select(self._state, rows)

    def _enqueue(self, codes: jax.Array, parts: list["_Part"]) -> Iterator[Result]:
        """Remember a batch that the device was given, and wait for the oldest if there are many."""
        self._running.append((codes, parts))
        if len(self._running) > IN_FLIGHT:
            yield from self._collect()

    def _collect(self) -> Iterator[Result]:
        """Wait for the oldest batch, and yield the clips that end in it."""
        codes, parts = self._running.popleft()
        codes = jax.device_get(codes)
        self._coded(sum(part.length for part in parts))
        for part in parts:
            clip, frames = part.clip, ceil_div(part.length, self.config.frame_size)
            clip.codes.append(
                codes[part.row, :, :frames].copy()
            )  # a view would keep all of `codes` in memory
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


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _encode(
    num_quantizers: int, mesh: Mesh, structure: Any, parameters: list, audio: jax.Array, lengths: jax.Array
) -> jax.Array:
    """Encode whole clips: audio [rows, channels, samples] -> uint16 codes [rows, codebooks, frames]."""

    def code(parameters: list, audio: jax.Array, lengths: jax.Array) -> jax.Array:
        model = jax.tree.unflatten(structure, parameters)
        codes = encode(model, audio, is_real(lengths, audio.shape[2]), num_quantizers).audio_codes
        return codes.astype(jnp.uint16)

    return _on_each_device(code, mesh)(parameters, audio, lengths)


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=4)
def _encode_step(
    num_quantizers: int,
    mesh: Mesh,
    structure: Any,
    parameters: list,
    state: Any,
    audio: jax.Array,
    lengths: jax.Array,
    is_new: jax.Array,
) -> tuple[Any, jax.Array]:
    """Encode the next chunk of each row. Rows in which a new clip begins forget their state first."""

    def code(parameters: list, state: Any, audio: jax.Array, lengths: jax.Array, is_new: jax.Array) -> tuple:
        model = jax.tree.unflatten(structure, parameters)
        state = select_rows(is_new, jax.tree.map(jnp.zeros_like, state), state)
        state, codes = encode_step(model, state, audio, is_real(lengths, audio.shape[2]), num_quantizers)
        return state, codes.astype(jnp.uint16)

    return _on_each_device(code, mesh)(parameters, state, audio, lengths, is_new)


def _on_each_device(code: Callable, mesh: Mesh) -> Callable:
    """Run a function on each device with its own rows.

    The compiler cannot divide the device kernels for TPUs among devices, so this is done by hand.
    """

    def call(parameters: list, *by_row: Any) -> Any:
        specs = PartitionSpec(), *[ROWS] * len(by_row)
        # `check_vma` needs to know how results vary between devices, which the device kernels do not tell.
        return jax.shard_map(code, mesh=mesh, in_specs=specs, out_specs=ROWS, check_vma=False)(
            parameters, *by_row
        )

    return call


def _lengths(parts: list["_Part"], num_rows: int) -> np.ndarray:
    """int32 [rows]: the real samples of each row."""
    lengths = np.zeros(num_rows, np.int32)
    for part in parts:
        lengths[part.row] = part.length
    return lengths


class _Clip:
    """A clip, with the samples that were read and are not encoded yet."""

    def __init__(self, reader: ClipReader):
        self.reader, self.num_samples, self.codes = reader, 0, []
        self._audio, self.is_here = reader.next()

    @property
    def num_here(self) -> int:
        """Samples that were read and not taken yet; if `is_here`, they are the rest of the clip."""
        return self._audio.shape[1]

    def take(self, out: np.ndarray) -> tuple[int, bool]:
        """Move the next samples to `out`, [channels, samples].

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
            self._audio = (
                self._audio.copy()
            )  # it is empty, but as a view it would keep the whole piece in memory
            if self.is_here:
                break
            self._audio, self.is_here = self.reader.next()
        self.num_samples += length
        return length, self.is_here and not self.num_here


class _Part(NamedTuple):
    """The stretch of a clip in one row of a batch."""

    row: int
    clip: _Clip
    length: int  # samples
    is_last: bool
