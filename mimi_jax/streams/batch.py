"""The rows of one half of a model, which sessions take and give back. Nothing here waits for anything.

The number of rows is a power of two, and follows the number of sessions: so a handful of programs serve all
loads, and few sessions do not pay for many rows. A row without a frame keeps its state.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mimi_jax.boundary import transfers_allowed
from mimi_jax.model import DecoderState, EncoderState, Mimi, decode_step
from mimi_jax.nn.quantizer import Codebook
from mimi_jax.nn.streaming import State
from mimi_jax.streams.push import encode_frames, fresh_state, half_of, join_rings, split_rings

FEWEST = 8  # rows; a step of 8 takes two to three times as long as a step of one


class PoolFullError(Exception):
    """All rows are taken."""


class Row:
    """A row that a session has taken. Its number changes when rows move together."""

    def __init__(self, number: int):
        self.number = number


class Batch:
    """The states of the sessions of one half, and the programs that step them.

    Args:
        model: a model that can stream.
        half: "encoder" or "decoder".
        most: rows, a power of two.
        num_quantizers: codebooks of each frame.
    """

    def __init__(self, model: Mimi, half: str, most: int, num_quantizers: int):
        config = model.config
        self.most, self._count, self._is_encoder = most, num_quantizers, half == "encoder"
        self._init_state = getattr(model, f"init_{half}_state")
        self.nothing = config.codebook_size  # as a code: this codebook adds nothing to the audio
        model = half_of(model, half)
        if not self._is_encoder:
            _add_nothing(model)
        self._parameters, self._structure = jax.tree.flatten(model)
        # What is fed to a row without a frame: samples that do not exist, or no code.
        shape = (config.audio_channels, config.frame_size) if self._is_encoder else (num_quantizers, 1)
        self._blank = np.full(
            shape, np.nan if self._is_encoder else -1, np.float32 if self._is_encoder else np.int32
        )
        self._taken: set[Row] = set()
        self._set_size(min(FEWEST, most))

    @property
    def size(self) -> int:
        """Rows, taken or free."""
        return self._size

    def take(self, state: EncoderState | DecoderState | None = None) -> Row:
        """Take a row for a fresh stream, or for one whose state `copy` gave.

        Raises:
            PoolFullError: all rows are taken.
        """
        if len(self._taken) == self._size:
            self._grow()
        numbers = {row.number for row in self._taken}
        row = Row(next(number for number in range(self._size) if number not in numbers))
        with transfers_allowed():
            stream = split_rings(self._fresh(1) if state is None else state)
            self._state = _put(*self._state, np.int32(row.number), stream)
        self._taken.add(row)
        return row

    def give_back(self, row: Row) -> None:
        """Free a row. The others may move together."""
        self._taken.remove(row)
        while self._size > FEWEST and len(self._taken) <= self._size // 4:
            self._shrink()

    @transfers_allowed()
    def copy(self, row: Row) -> EncoderState | DecoderState:
        """The state of a row, in the memory of the host."""
        return jax.tree.map(np.asarray, join_rings(*_take(*self._state, np.int32(row.number))))

    @transfers_allowed()
    def step(self, frames: Mapping[Row, np.ndarray]) -> jax.Array:
        """Step the rows that have a frame: audio [channels, frame_size] with NaN after its end, or codes
        [codebooks, 1].

        Returns:
            Codes [rows, codebooks, 1], or audio [rows, channels, frame_size], while it is computed.
        """
        inputs = np.broadcast_to(self._blank, (self._size, *self._blank.shape)).copy()
        for row, frame in frames.items():
            inputs[row.number] = frame
        if self._is_encoder:
            self._state, outputs = encode_frames(
                self._structure, self._parameters, *self._state, inputs, self._count
            )
        else:
            self._state, outputs = _decode_rows(self._structure, self._parameters, *self._state, inputs)
        return outputs

    def warmup(self) -> None:
        """Compile all programs. No row may be taken."""
        assert not self._taken
        while True:
            for _ in range(2):  # the first step may change on which devices the arrays of a state are
                jax.block_until_ready(self.step({}))
            self._taken.remove(self.take())
            if self._size == self.most:
                break
            self._grow()
        while self._size > FEWEST:
            self._shrink()

    def _fresh(self, rows: int) -> Any:
        return fresh_state(self._init_state, rows)

    def _set_size(self, rows: int) -> None:
        self._size, self._state = rows, split_rings(self._fresh(rows))

    @transfers_allowed()
    def _grow(self) -> None:
        if self._size == self.most:
            raise PoolFullError(
                f"all {self.most} rows are taken; try again later, or start a pool of more rows"
            )
        old = self._state
        self._set_size(2 * self._size)
        self._state = _put(*self._state, np.int32(0), old)

    @transfers_allowed()
    def _shrink(self) -> None:
        self._size //= 2
        rows = sorted(self._taken, key=lambda row: row.number)
        places = np.zeros(self._size, np.int32)  # free rows may hold anything
        places[: len(rows)] = [row.number for row in rows]
        self._state = _pick(*self._state, places)
        for number, row in enumerate(rows):
            row.number = number


def _add_nothing(model: Mimi) -> None:
    """Give each codebook one code more, which adds nothing: rows may use different numbers of codebooks."""
    for part in (model.quantizer.semantic, model.quantizer.acoustic):
        part.embedding = Codebook(jnp.pad(part.embedding[...], [(0, 0), (0, 1), (0, 0)]))


@functools.partial(jax.jit, donate_argnums=(0, 1))
def _put(rings: State, rest: State, row: jax.Array, streams: tuple[State, State]) -> tuple[State, State]:
    """Replace the rows that begin at `row`."""

    def put(leaf: jax.Array, new: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(leaf, new, row, 0)

    return jax.tree.map(put, rings, streams[0]), jax.tree.map(put, rest, streams[1])


@jax.jit
def _take(rings: State, rest: State, row: jax.Array) -> tuple[State, State]:
    return jax.tree.map(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, row, 1, 0), (rings, rest))


@jax.jit
def _pick(rings: State, rest: State, places: jax.Array) -> tuple[State, State]:
    return jax.tree.map(lambda leaf: jnp.take(leaf, places, axis=0, mode="clip"), (rings, rest))


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _decode_rows(
    structure: Any, parameters: list, rings: State, rest: State, codes: jax.Array
) -> tuple[tuple[State, State], jax.Array]:
    model = jax.tree.unflatten(structure, parameters)
    state, audio = decode_step(model, join_rings(rings, rest), codes, codes[:, 0, 0] >= 0)
    return split_rings(state), audio.astype(jnp.float32)
