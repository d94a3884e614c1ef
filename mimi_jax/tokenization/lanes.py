"""Many clips at once through one compiled program.

Each row of the batch is a stream, and takes clip after clip.

A step codes the next block of every row. A row whose clip ends inside the block ends there, as `encode_step`
says by its mask, and begins the next clip as a fresh stream with the next step. So there is one static shape
for clips of all lengths, hours are no different from seconds, and what is padded is less than a block a clip.
In float32 the codes are those of `encode` on the clip alone; in bfloat16 too they do not depend on which
clips come together.
"""

import collections
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mimi_jax.model import Mimi, encode_step
from mimi_jax.streaming import select_rows
from mimi_jax.tokenization.decoding import Stream

IN_FLIGHT = 2  # steps that the device has before it, while the next one is put together


class Result(NamedTuple):
    """What became of a clip: codes, or the reason why there are none."""

    stream: Stream
    num_samples: int
    codes: np.ndarray | None  # uint16 [codebooks, frames]
    problem: str = ""


class Lanes:
    """A batch of rows on all devices of this process.

    Args:
        model: a codec that can stream; its decoder is not needed.
        batch_size: rows; a multiple of the number of devices.
        block_frames: frames that a step codes of each row.
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
        self.num_quantizers = model.quantizer.check_count(num_quantizers)
        self.block_size = block_frames * model.config.frame_size
        mesh = Mesh(np.array(devices), ("batch",))
        self._by_row = NamedSharding(mesh, PartitionSpec("batch"))
        self._parameters, self._structure = jax.tree.flatten(
            jax.device_put(model, NamedSharding(mesh, PartitionSpec()))
        )
        init = jax.jit(model.init_encoder_state, static_argnums=0, out_shardings=self._by_row)
        self._state = init(batch_size)
        self._rows: list[_Row | None] = [None] * batch_size
        self._running: collections.deque[tuple[jax.Array, list[_Part]]] = collections.deque()

    def run(self, streams: Iterator[Stream], coded: Callable[[int], object]) -> Iterator[Result]:
        """Code clips, as many at once as there are rows; results come as the clips end.

        Args:
            coded: is told how many samples each step has coded.
            streams: taken as rows become free, and some ahead, so that the workers always have what to
                decode.
        """
        waiting: collections.deque[Stream] = collections.deque()
        self._rows = [None] * self.batch_size
        self._running.clear()
        while True:
            yield from self._fill(streams, waiting)
            if not any(self._rows):
                break
            blocks, fresh, parts, failed = self._next_blocks()
            yield from failed
            if parts:
                self._step(blocks, fresh, parts)
            if len(self._running) > IN_FLIGHT:
                yield from self._collect(coded)
        while self._running:
            yield from self._collect(coded)

    def _fill(self, streams: Iterator[Stream], waiting: collections.deque[Stream]) -> Iterator[Result]:
        """Give every free row the next clip that can be read."""
        for number, row in enumerate(self._rows):
            while row is None:
                while len(waiting) < self.batch_size and (stream := next(streams, None)) is not None:
                    waiting.append(stream)
                if not waiting:
                    return
                stream = waiting.popleft()
                try:
                    row = self._rows[number] = _Row(stream)
                except ValueError as error:
                    yield Result(stream, 0, None, str(error))

    def _next_blocks(self) -> tuple[np.ndarray, np.ndarray, list["_Part"], list[Result]]:
        """Audio [batch, channels, block_size], which rows begin a clip, what they are of, and failures."""
        audio = np.zeros((self.batch_size, self.config.audio_channels, self.block_size), np.float32)
        fresh = np.zeros(self.batch_size, bool)
        parts, failed = [], []
        for number, row in enumerate(self._rows):
            if row is None:
                continue
            fresh[number] = row.num_samples == 0
            try:
                length, is_last = row.take(audio[number])
            except ValueError as error:  # its codes so far are of no use
                failed.append(Result(row.stream, 0, None, str(error)))
                self._rows[number] = None
                continue
            parts.append(_Part(number, row, length, is_last))
            if is_last:
                self._rows[number] = None
        return audio, fresh, parts, failed

    def _step(self, audio: np.ndarray, fresh: np.ndarray, parts: list["_Part"]) -> None:
        lengths = np.zeros(self.batch_size, np.int32)
        for part in parts:
            lengths[part.number] = part.length
        inputs = jax.device_put((audio, lengths, fresh), self._by_row)
        self._state, codes = _step(
            self._structure, self._parameters, self._state, *inputs, num_quantizers=self.num_quantizers
        )
        self._running.append((codes, parts))

    def _collect(self, coded: Callable[[int], object]) -> Iterator[Result]:
        codes, parts = self._running.popleft()
        codes = np.asarray(codes)
        coded(sum(part.length for part in parts))
        for part in parts:
            frames = -(-part.length // self.config.frame_size)
            part.row.codes.append(codes[part.number, :, :frames].copy())  # or it would keep all of `codes`
            if part.is_last:
                yield Result(part.row.stream, part.row.num_samples, np.concatenate(part.row.codes, axis=1))


@functools.partial(jax.jit, static_argnums=0, static_argnames="num_quantizers", donate_argnums=2)
def _step(
    structure: Any,
    parameters: list,
    state: Any,
    audio: jax.Array,
    lengths: jax.Array,
    fresh: jax.Array,
    num_quantizers: int,
) -> tuple[Any, jax.Array]:
    state = select_rows(fresh, jax.tree.map(jnp.zeros_like, state), state)
    mask = jnp.arange(audio.shape[2]) < lengths[:, None]
    model = jax.tree.unflatten(structure, parameters)
    state, codes = encode_step(model, state, audio, mask, num_quantizers)
    return state, codes.astype(jnp.uint16)


class _Row:
    """The clip that a row is at, with the samples that have come and are not coded yet."""

    def __init__(self, stream: Stream):
        self.stream, self.num_samples, self.codes = stream, 0, []
        self._audio, self._is_last = stream.next()

    def take(self, block: np.ndarray) -> tuple[int, bool]:
        """Fill a block [channels, block_size]; returns how many samples are real, and if the clip ends."""
        length, size = 0, block.shape[1]
        while True:
            some = self._audio[:, : size - length]
            block[:, length : length + some.shape[1]] = some
            self._audio = self._audio[:, some.shape[1] :]
            length += some.shape[1]
            if self._audio.shape[1] or self._is_last:
                break
            self._audio, self._is_last = self.stream.next()
        self.num_samples += length
        return length, self._is_last and not self._audio.shape[1]


class _Part(NamedTuple):
    """What a row of one step holds."""

    number: int
    row: _Row
    length: int  # samples
    is_last: bool
