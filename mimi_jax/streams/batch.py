"""The rows of one half of a model, which sessions take and give back. Nothing here waits for anything.

A step takes the rows that have a frame out of the batch, steps them, and puts them back. They are filled up
to one of a few sizes, so a handful of programs serve all loads, and few frames do not pay for many rows.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mimi_jax.boundary import check_state, transfers_allowed
from mimi_jax.model import DecoderState, EncoderState, Mimi, decode_step, encode_step
from mimi_jax.nn.quantizer import Codebook
from mimi_jax.streams.push import fresh_state, half_of, join_rings, split_rings

SIZES = (1, 8)  # of the smallest steps; then powers of two
# With 128 rows, `mini` needs more memory for a step than the C library keeps, and a row takes 1.5 times as
# long.
LARGEST_ON_CPU = 64

StreamState = EncoderState | DecoderState


class PoolFullError(Exception):
    """All rows are taken."""


class Batch:
    """The states of the sessions of one half, and the programs that step them.

    Args:
        model: a model that can stream.
        half: "encoder" or "decoder".
        rows: the most sessions, a power of two.
        num_quantizers: codebooks of each frame.
    """

    def __init__(self, model: Mimi, half: str, rows: int, num_quantizers: int):
        config = model.config
        self._rows, self._free = rows, list(reversed(range(rows)))
        largest = min(rows, LARGEST_ON_CPU) if jax.default_backend() == "cpu" else rows
        powers = {2**n for n in range(4, largest.bit_length())}
        self.sizes = sorted({min(size, rows) for size in SIZES} | powers)
        self.nothing = config.codebook_size  # as a code: this codebook adds nothing to the audio
        init_state = getattr(model, f"init_{half}_state")
        self._fresh = split_rings(fresh_state(init_state, 1))
        self._state = split_rings(fresh_state(init_state, rows))
        model = half_of(model, half)
        # `_blank` is fed to a row without a frame.
        if half == "encoder":
            self._advance = functools.partial(_encode, num_quantizers)
            self._blank = np.full((config.audio_channels, config.frame_size), np.nan, np.float32)
        else:
            _add_nothing(model)
            self._advance = _decode
            self._blank = np.full((num_quantizers, 1), -1, np.int32)
        self._parameters, self._structure = jax.tree.flatten(model)

    def take(self, state: StreamState | None = None) -> int:
        """Take a row for a fresh stream, or for one whose state `copy` gave.

        Raises:
            PoolFullError: all rows are taken.
            ValueError: the state is of another model or half, or of several streams.
        """
        stream = self._fresh
        if state is not None:
            stream = split_rings(state)
            check_state(stream, self._fresh)
        if not self._free:
            raise PoolFullError(
                f"all {self._rows} rows are taken; try again later, or start a pool of more rows"
            )
        row = self._free.pop()
        with transfers_allowed():
            self._state = _put(*self._state, np.array([row], np.int32), stream)
        return row

    def give_back(self, row: int) -> None:
        """Let others take a row, after the steps that are started. Any thread may call this."""
        self._free.append(row)

    @transfers_allowed()
    def copy(self, row: int) -> StreamState:
        """The state of a row, in the memory of the host."""
        return jax.tree.map(np.asarray, join_rings(*_take(*self._state, np.array([row], np.int32))))

    @transfers_allowed()
    def step(self, frames: Mapping[int, np.ndarray]) -> jax.Array:
        """Step the rows that have a frame: audio [channels, frame_size] with NaN after its end, or codes
        [codebooks, 1]. There are at most as many as `frames_of_a_step` gives.

        Returns:
            Codes [size, codebooks, 1], or audio [size, channels, frame_size], in the order of `frames`, of
            which there may be fewer. They may still be computed.
        """
        size = self._size(len(frames))
        inputs = np.empty((size, *self._blank.shape), self._blank.dtype)
        rows = np.full(size, self._rows, np.int32)  # beyond the last row, where nothing is
        inputs[len(frames) :] = self._blank
        for place, (row, frame) in enumerate(frames.items()):
            rows[place], inputs[place] = row, frame
        self._state, outputs = self._advance(self._structure, self._parameters, *self._state, rows, inputs)
        return outputs

    def frames_of_a_step(self, waiting: int) -> int:
        """How many of the frames that wait the next step should take.

        Empty rows take as long as others. So if they would be more than a quarter of a large step, it fills
        the next smaller one, and some frames are left to the step after it.
        """
        waiting = min(waiting, self.sizes[-1])
        size = self._size(waiting)
        if size <= SIZES[-1] or 4 * waiting >= 3 * size:
            return waiting
        return self.sizes[self.sizes.index(size) - 1]

    def _size(self, frames: int) -> int:
        """The smallest step that takes so many frames."""
        return next(size for size in self.sizes if size >= frames)

    def warmup(self) -> None:
        """Compile all programs. No row may be taken."""
        for size in self.sizes:
            for _ in range(2):  # the first step may change on which devices the arrays of a state are
                jax.block_until_ready(self.step(dict.fromkeys(range(size), self._blank)))
        row = self.take()
        self.copy(row)
        self.give_back(row)


def _add_nothing(model: Mimi) -> None:
    """Give each codebook one code more, which adds nothing: rows may use different numbers of codebooks."""
    for part in (model.quantizer.semantic, model.quantizer.acoustic):
        part.embedding = Codebook(jnp.pad(part.embedding[...], [(0, 0), (0, 1), (0, 0)]))


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
def _encode(
    num_quantizers: int,
    structure: Any,
    parameters: list,
    rings: EncoderState,
    rest: EncoderState,
    rows: jax.Array,
    audio: jax.Array,
) -> tuple[tuple[EncoderState, EncoderState], jax.Array]:
    model, mask = jax.tree.unflatten(structure, parameters), ~jnp.isnan(audio[:, 0])
    state, codes = encode_step(model, join_rings(*_take(rings, rest, rows)), audio, mask, num_quantizers)
    return _put(rings, rest, rows, split_rings(state)), codes


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _decode(
    structure: Any,
    parameters: list,
    rings: DecoderState,
    rest: DecoderState,
    rows: jax.Array,
    codes: jax.Array,
) -> tuple[tuple[DecoderState, DecoderState], jax.Array]:
    model = jax.tree.unflatten(structure, parameters)
    state, audio = decode_step(model, join_rings(*_take(rings, rest, rows)), codes, codes[:, 0, 0] >= 0)
    return _put(rings, rest, rows, split_rings(state)), audio.astype(jnp.float32)


@jax.jit
def _take(rings: Any, rest: Any, rows: jax.Array) -> tuple[Any, Any]:
    return jax.tree.map(lambda leaf: jnp.take(leaf, rows, axis=0, mode="clip"), (rings, rest))


@functools.partial(jax.jit, donate_argnums=0)
def _put(rings: Any, rest: Any, rows: jax.Array, streams: tuple[Any, Any]) -> tuple[Any, Any]:
    """Replace rows. Those beyond the last one are left out."""

    def put(leaf: jax.Array, new: jax.Array) -> jax.Array:
        return leaf.at[rows].set(new, mode="drop", unique_indices=True)

    return jax.tree.map(put, rings, streams[0]), jax.tree.map(put, rest, streams[1])
