"""Ways to compute a part of the network. A part is a sequence of layers."""

from typing import Any, NamedTuple, Protocol

import jax

StepResult = tuple[Any, jax.Array]


class PieceBytes(NamedTuple):
    """How many bytes the widest activations of one piece of time may take."""

    all_layers: int
    wide_layers: int  # those next to the waveform, which go over smaller pieces inside


# A CPU is bound by memory. All layers go over pieces small enough that the system need not find new buffers
# for each, and the widest layers go over pieces that fit in cache.
CPU_PIECES = PieceBytes(25_000_000, 2_500_000)
# cuDNN took no more than 2**31 elements before version 9.3, and some of its convolutions still do not. On a
# TPU, such pieces are small beside its memory.
LARGE_PIECES = PieceBytes(2**31, 2**31)


class Part(Protocol):
    """A part of the network."""

    operation: str  # its table in `policy.PARTS`; a part without a table is computed layer by layer

    def step_layers(self, state: Any, x: jax.Array, lengths: jax.Array | None) -> StepResult: ...


def layer_by_layer(part: Part, state: Any, x: jax.Array, lengths: jax.Array | None) -> StepResult:
    return part.step_layers(state, x, lengths)


def in_small_pieces(network: Any, state: Any, x: jax.Array, lengths: jax.Array | None) -> StepResult:
    return network.step_in_pieces(CPU_PIECES, state, x, lengths)


def in_large_pieces(network: Any, state: Any, x: jax.Array, lengths: jax.Array | None) -> StepResult:
    return network.step_in_pieces(LARGE_PIECES, state, x, lengths)


def in_few_passes(ends: Any, state: Any, x: jax.Array, lengths: jax.Array | None) -> StepResult:
    return ends.step_in_few_passes(state, x, lengths)


def in_few_rows(transformer: Any, state: Any, x: jax.Array, lengths: jax.Array | None) -> StepResult:
    return transformer.step_few_rows(state, x, lengths)


def in_rows(part: Any, state: Any, x: jax.Array, lengths: jax.Array | None) -> StepResult:
    return part.step_in_rows(state, x, lengths)


def in_pallas(end: Any, state: Any, x: jax.Array, lengths: jax.Array | None) -> StepResult:
    return end.step_in_pallas(state, x, lengths)


# How the way back of a gradient is computed, if not layer by layer. It needs all activations, and pieces
# would copy all of them for each piece.
WAYS_BACK = {in_rows: in_rows, in_pallas: in_rows}
