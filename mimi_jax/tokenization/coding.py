"""Many clips at once, on all devices of this process.

Short clips wait for others of about their length, and are coded together: padded to one of a few lengths, in
one masked batch. Long ones are streams, each a row of another batch, which is coded a block at a time; a row
whose clip ends inside the block ends there, by its mask, and takes the next clip with the next block. So
there are a handful of static shapes for clips of all lengths, and in float32 the codes are those of `encode`
on the clip alone.
"""

import collections
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mimi_jax.files.audio import bucket_length
from mimi_jax.model import Mimi, encode, encode_step
from mimi_jax.nn.streaming import is_real, select_rows
from mimi_jax.tokenization.workers import Stream

ROWS = PartitionSpec("rows")
IN_FLIGHT = 2  # batches that the device has before it, while the next one is put together
SHORT_SECONDS = 30  # longer clips are streams
SHORTEST_SECONDS = 1  # what shorter clips are padded to
# Of a batch of short clips, on each device: in float32 so many take 12 GB of a TPU.
BATCH_SECONDS = 256
# After clips for so many batches nothing waits for others of its length any more: a kill loses no more.
PATIENCE = 64


class Result(NamedTuple):
    """What became of a clip: codes, or the reason why there are none."""

    stream: Stream
    num_samples: int
    codes: np.ndarray | None  # uint16 [codebooks, frames]
    problem: str = ""


class Coder:
    """A model on all devices of this process.

    Args:
        model: a codec that can stream; its decoder is not needed.
        batch_size: clips at once, if they are not too long for `BATCH_SECONDS`; a multiple of the number of
            devices.
        block_frames: frames of each long clip that are coded at once.
        num_quantizers: how many codebooks to use, the first ones.
        devices: that share the rows; None for all of this process.

    Raises:
        ValueError: the model cannot stream, has no encoder or not so many codebooks, or the rows cannot be
            shared.
    """

    def __init__(
        self,
        model: Mimi,
        batch_size: int,
        block_frames: int,
        num_quantizers: int,
        devices: list[Any] | None = None,
    ):
        devices = jax.local_devices() if devices is None else devices
        if batch_size < 1 or batch_size % len(devices):
            raise ValueError(f"batch_size must be a multiple of the {len(devices)} devices, got {batch_size}")
        if model.config.codebook_size > 2**16:
            raise ValueError(f"codes are kept in 16 bits, and codebook_size is {model.config.codebook_size}")
        self.batch_size, self.config = batch_size, model.config
        self.num_quantizers = model.quantizer.resolve_count(num_quantizers)
        self.block_size = block_frames * model.config.frame_size
        self._mesh = Mesh(np.array(devices), *ROWS)
        self._by_row = NamedSharding(self._mesh, ROWS)
        self._parameters, self._structure = jax.tree.flatten(
            jax.device_put(model, NamedSharding(self._mesh, PartitionSpec()))
        )
        self._init_state = jax.jit(model.init_encoder_state, static_argnums=0, out_shardings=self._by_row)
        self._take = jax.jit(
            lambda state, rows: jax.tree.map(lambda x: x[rows], state), out_shardings=self._by_row
        )
        self._short: dict[int, list[_Clip]] = {}  # by the length to which they are padded
        self._rows: list[_Clip | None] = []
        self._state: Any = None
        self._running: collections.deque[tuple[jax.Array, list[_Part]]] = collections.deque()

    def run(self, streams: Iterator[Stream], coded: Callable[[int], object]) -> Iterator[Result]:
        """Code clips; results come as they end.

        Args:
            streams: taken in their order, and some ahead, so that the workers always have what to decode.
            coded: is told how many samples each batch has coded.
        """
        self._coded = coded
        self._short.clear()  # of a run that was broken off
        self._running.clear()
        self._rows, self._state = [None] * self.batch_size, None
        for count, stream in enumerate(_ahead(streams, self.batch_size), 1):
            try:
                clip = _Clip(stream)
            except ValueError as error:
                yield Result(stream, 0, None, str(error))
            else:
                is_short = clip.is_here and clip.num_here <= SHORT_SECONDS * self.config.sampling_rate
                yield from self._add_short(clip) if is_short else self._add_long(clip)
            if count % (PATIENCE * self.batch_size) == 0:
                yield from self._finish()
        yield from self._finish()

    def _add_short(self, clip: "_Clip") -> Iterator[Result]:
        size = self._padded(clip)
        waiting = self._short.setdefault(size, [])
        waiting.append(clip)
        if len(waiting) == self._num_rows(size):
            yield from self._code_whole(self._short.pop(size))

    def _add_long(self, clip: "_Clip") -> Iterator[Result]:
        while None not in self._rows:
            yield from self._code_blocks()
        self._rows[self._rows.index(None)] = clip

    def _finish(self) -> Iterator[Result]:
        """Code all that has waited, whether or not it fills a batch."""
        waiting = sorted(
            (clip for clips in self._short.values() for clip in clips), key=lambda clip: -clip.num_here
        )
        self._short.clear()
        while waiting:
            num_rows = self._num_rows(self._padded(waiting[0]))
            yield from self._code_whole(waiting[:num_rows])
            del waiting[:num_rows]
        while any(self._rows):
            self._close_ranks()
            yield from self._code_blocks()
        while self._running:
            yield from self._collect()
        self._rows, self._state = [None] * self.batch_size, None

    def _padded(self, clip: "_Clip") -> int:
        shortest = SHORTEST_SECONDS * self.config.sampling_rate
        return bucket_length(max(clip.num_here, shortest), self.config.frame_size)

    def _num_rows(self, size: int) -> int:
        """Of a batch of clips of `size` samples."""
        of_device = BATCH_SECONDS * self.config.sampling_rate // size
        return min(max(of_device, 1) * self._mesh.size, self.batch_size)

    def _code_whole(self, clips: list["_Clip"]) -> Iterator[Result]:
        """Code short clips, the longest of which says how far they are padded."""
        size = max(map(self._padded, clips))
        audio = np.zeros((self._num_rows(size), self.config.audio_channels, size), np.float32)
        parts = [_Part(number, clip, *clip.take(audio[number])) for number, clip in enumerate(clips)]
        inputs = jax.device_put((audio, _lengths(parts, len(audio))), self._by_row)
        codes = _encode(self.num_quantizers, self._mesh, self._structure, self._parameters, *inputs)
        yield from self._run(codes, parts)

    def _code_blocks(self) -> Iterator[Result]:
        """Code the next block of each long clip."""
        audio = np.zeros((len(self._rows), self.config.audio_channels, self.block_size), np.float32)
        fresh = np.zeros(len(self._rows), bool)
        parts = []
        for number, clip in enumerate(self._rows):
            if clip is None:
                continue
            fresh[number] = clip.num_samples == 0
            try:
                part = _Part(number, clip, *clip.take(audio[number]))
            except ValueError as error:  # the codes so far are of no use
                self._rows[number] = None
                yield Result(clip.stream, 0, None, str(error))
                continue
            parts.append(part)
            if part.is_last:
                self._rows[number] = None
        if not parts:
            return
        if self._state is None:
            self._state = self._init_state(len(self._rows))
        inputs = jax.device_put((audio, _lengths(parts, len(audio)), fresh), self._by_row)
        self._state, codes = _encode_blocks(
            self.num_quantizers, self._mesh, self._structure, self._parameters, self._state, *inputs
        )
        yield from self._run(codes, parts)

    def _close_ranks(self) -> None:
        """A batch of a quarter of the rows, or of a quarter of those, is enough for the last long clips."""
        numbers = [number for number, clip in enumerate(self._rows) if clip is not None]
        size = len(self._rows)
        while size % (4 * self._mesh.size) == 0 and len(numbers) <= size // 4:
            size //= 4
        if size == len(self._rows):
            return
        self._rows = [self._rows[number] for number in numbers] + [None] * (size - len(numbers))
        if self._state is not None:
            self._state = self._take(self._state, np.array(numbers + [0] * (size - len(numbers))))

    def _run(self, codes: jax.Array, parts: list["_Part"]) -> Iterator[Result]:
        self._running.append((codes, parts))
        if len(self._running) > IN_FLIGHT:
            yield from self._collect()

    def _collect(self) -> Iterator[Result]:
        codes, parts = self._running.popleft()
        codes = np.asarray(codes)
        self._coded(sum(part.length for part in parts))
        for part in parts:
            frames = -(-part.length // self.config.frame_size)
            part.clip.codes.append(codes[part.row, :, :frames].copy())  # or it would keep all of `codes`
            if part.is_last:
                yield Result(part.clip.stream, part.clip.num_samples, np.concatenate(part.clip.codes, axis=1))


def _ahead(streams: Iterator[Stream], count: int) -> Iterator[Stream]:
    """The same streams, `count` of them opened before their turn."""
    opened: collections.deque[Stream] = collections.deque()
    for stream in streams:
        opened.append(stream)
        if len(opened) > count:
            yield opened.popleft()
    yield from opened


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _encode(
    num_quantizers: int, mesh: Mesh, structure: Any, parameters: list, audio: jax.Array, lengths: jax.Array
) -> jax.Array:
    def code(parameters: list, audio: jax.Array, lengths: jax.Array) -> jax.Array:
        model = jax.tree.unflatten(structure, parameters)
        codes = encode(model, audio, is_real(lengths, audio.shape[2]), num_quantizers).audio_codes
        return codes.astype(jnp.uint16)

    return _on_each_device(code, mesh)(parameters, audio, lengths)


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=4)
def _encode_blocks(
    num_quantizers: int,
    mesh: Mesh,
    structure: Any,
    parameters: list,
    state: Any,
    audio: jax.Array,
    lengths: jax.Array,
    fresh: jax.Array,
) -> tuple[Any, jax.Array]:
    def code(parameters: list, state: Any, audio: jax.Array, lengths: jax.Array, fresh: jax.Array) -> tuple:
        model = jax.tree.unflatten(structure, parameters)
        state = select_rows(fresh, jax.tree.map(jnp.zeros_like, state), state)
        state, codes = encode_step(model, state, audio, is_real(lengths, audio.shape[2]), num_quantizers)
        return state, codes.astype(jnp.uint16)

    return _on_each_device(code, mesh)(parameters, state, audio, lengths, fresh)


def _on_each_device(code: Callable, mesh: Mesh) -> Callable:
    """Not by the compiler, which cannot divide the fused kernels of TPUs."""

    def call(parameters: list, *by_row: Any) -> Any:
        specs = PartitionSpec(), *[ROWS] * len(by_row)
        # The kernels cannot say how their results differ between devices.
        return jax.shard_map(code, mesh=mesh, in_specs=specs, out_specs=ROWS, check_vma=False)(
            parameters, *by_row
        )

    return call


def _lengths(parts: list["_Part"], num_rows: int) -> np.ndarray:
    lengths = np.zeros(num_rows, np.int32)
    for part in parts:
        lengths[part.row] = part.length
    return lengths


class _Clip:
    """A clip, with the samples that have come and are not coded yet."""

    def __init__(self, stream: Stream):
        self.stream, self.num_samples, self.codes = stream, 0, []
        self._audio, self.is_here = stream.next()

    @property
    def num_here(self) -> int:
        return self._audio.shape[1]

    def take(self, block: np.ndarray) -> tuple[int, bool]:
        """Fill a block [channels, samples]; returns how many samples are real, and if the clip ends."""
        length, size = 0, block.shape[1]
        while True:
            some = self._audio[:, : size - length]
            block[:, length : length + some.shape[1]] = some
            self._audio = self._audio[:, some.shape[1] :]
            length += some.shape[1]
            if self.num_here:
                break
            self._audio = self._audio.copy()  # nothing, and no view that would keep all of it
            if self.is_here:
                break
            self._audio, self.is_here = self.stream.next()
        self.num_samples += length
        return length, self.is_here and not self.num_here


class _Part(NamedTuple):
    """What a row of one batch holds."""

    row: int
    clip: _Clip
    length: int  # samples
    is_last: bool
