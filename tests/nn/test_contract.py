"""The contract of `mimi_jax.nn.streaming`: one table of all layers, and each test for each of them."""

import collections
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mimi_jax.config import MimiConfig
from mimi_jax.nn.attention import Attention
from mimi_jax.nn.conv import Conv1d, ConvTranspose1d
from mimi_jax.nn.seanet import Decoder, DecoderStage, Encoder, EncoderStage, ResidualBlock
from mimi_jax.nn.streaming import StreamingLayer
from mimi_jax.nn.transformer import Transformer, TransformerLayer
from mimi_jax.ops import parts, policy
from mimi_jax.streams.rows import reset_rows
from tests.models import random_like, random_module, relative_error

BATCH = 3
STRIDES = 28  # of its layer in every clip: seven attention windows, and almost three rounds of their ring
# Each size is compiled for each layer, so there are few: with and without room in the ring, and beyond it.
CUTS = [[1] * 28, [2] * 14, [3, 3, 3, 3, 2] * 2, [28], [7, 8, 1, 3, 8, 1], [13, 2, 13]]
TOLERANCE = 1e-5

CONFIG = MimiConfig(
    hidden_size=8,
    num_filters=2,
    upsampling_ratios=(3, 2),
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    intermediate_size=12,
    sliding_window=4,
    upsample_groups=8,
)
UNUSUAL = dataclasses.replace(
    CONFIG, use_conv_shortcut=True, num_residual_layers=2, compress=1, pad_mode="replicate"
)
WINDOW = CONFIG.sliding_window


class Row(NamedTuple):
    build: Callable[[nnx.Rngs], StreamingLayer]
    channels: int
    stride: int = 1
    compute: str | dict[str, str] = "auto"


LAYERS = {
    "conv": Row(lambda rngs: Conv1d(3, 4, 5, rngs=rngs), 3),
    "conv of one tap": Row(lambda rngs: Conv1d(3, 4, 1, rngs=rngs), 3),
    "conv, strided": Row(lambda rngs: Conv1d(3, 4, 6, stride=3, rngs=rngs), 3, 3),
    "conv, strided without overlap": Row(lambda rngs: Conv1d(3, 4, 2, stride=2, rngs=rngs), 3, 2),
    "conv, dilated": Row(lambda rngs: Conv1d(3, 4, 3, dilation=4, use_bias=False, rngs=rngs), 3),
    "conv, activated": Row(lambda rngs: Conv1d(3, 4, 3, activation=jax.nn.elu, rngs=rngs), 3),
    "conv, replicate": Row(lambda rngs: Conv1d(3, 4, 4, stride=2, pad_mode="replicate", rngs=rngs), 3, 2),
    "transposed": Row(lambda rngs: ConvTranspose1d(4, 3, 2, activation=jax.nn.elu, rngs=rngs), 4),
    "transposed, grouped": Row(lambda rngs: ConvTranspose1d(4, 6, 3, groups=2, rngs=rngs), 4),
    "transposed, depthwise": Row(
        lambda rngs: ConvTranspose1d(4, 4, 2, groups=4, use_bias=False, rngs=rngs), 4
    ),
    "attention, reference": Row(
        lambda rngs: Attention(6, 2, 2, 4, WINDOW, rngs=rngs), 6, compute={"attention": "reference"}
    ),
    "attention, banded": Row(
        lambda rngs: Attention(6, 2, 2, 4, WINDOW, rngs=rngs), 6, compute={"attention": "banded"}
    ),
    "attention, grouped queries": Row(
        lambda rngs: Attention(6, 4, 2, 4, WINDOW, use_bias=True, rngs=rngs), 6
    ),
    "attention, window of one": Row(lambda rngs: Attention(6, 2, 1, 4, 1, rngs=rngs), 6),
    "transformer layer": Row(lambda rngs: TransformerLayer(CONFIG, rngs=rngs), 8),
    "transformer": Row(lambda rngs: Transformer(CONFIG, rngs=rngs), 8),
    "residual block": Row(lambda rngs: ResidualBlock(CONFIG, 4, 2, rngs=rngs), 4),
    "residual block, unusual": Row(lambda rngs: ResidualBlock(UNUSUAL, 4, 2, rngs=rngs), 4),
    "encoder stage": Row(lambda rngs: EncoderStage(CONFIG, 4, 3, rngs=rngs), 4, 3),
    "encoder stage, unusual": Row(lambda rngs: EncoderStage(UNUSUAL, 4, 2, rngs=rngs), 4, 2),
    "encoder": Row(lambda rngs: Encoder(CONFIG, rngs=rngs), 1, 6),
    "decoder stage": Row(lambda rngs: DecoderStage(CONFIG, 4, 3, rngs=rngs), 4),
    "decoder": Row(lambda rngs: Decoder(CONFIG, rngs=rngs), 8),
}
UNUSUAL_NETWORKS = {
    "encoder, unusual": Row(lambda rngs: Encoder(UNUSUAL, rngs=rngs), 1, 6),
    "decoder, unusual": Row(lambda rngs: Decoder(UNUSUAL, rngs=rngs), 8),
}


class Case:
    """A layer with random parameters, a batch of clips, and its compiled functions."""

    def __init__(self, row: Row):
        self.layer, self.stride = random_module(row.build), row.stride
        self.compute = policy.resolve(row.compute)
        self.time = STRIDES * self.stride
        generator = np.random.default_rng(1)
        self.x = generator.normal(size=(BATCH, self.time, row.channels)).astype(np.float32)
        # Softmax gives what it hides the weight 0, but 0 times NaN is NaN: attention sees 1e4 instead.
        has_attention = any(isinstance(part, Attention) for _, part in nnx.iter_modules(self.layer))
        self.garbage = 1e4 if has_attention else np.nan
        self.traces = collections.Counter()
        self._compiled_step, self._compiled_whole = jax.jit(self._step), jax.jit(self._whole)
        self.y = self.whole(self.x)

    # The outputs are NumPy's: JAX would compile each of their slices.

    def step(self, state: Any, x: Any, lengths: Any = None) -> tuple[Any, np.ndarray]:
        state, y = self._compiled_step(self.layer, state, x, lengths)
        return state, np.asarray(y)

    def whole(self, x: Any, lengths: Any = None) -> np.ndarray:
        return np.asarray(self._compiled_whole(self.layer, x, lengths))

    def _step(self, layer: StreamingLayer, state: Any, x: jax.Array, lengths: jax.Array | None = None):
        self.traces[x.shape, lengths is None] += 1
        with policy.computing(self.compute):
            return layer.step(state, x, lengths)

    def _whole(self, layer: StreamingLayer, x: jax.Array, lengths: jax.Array | None = None):
        with policy.computing(self.compute):
            return layer(x, lengths)

    def init_state(self) -> Any:
        return self.layer.init_state(BATCH)

    def pieces(self, cut: list[int]) -> Iterator[slice]:
        """The times of consecutive pieces of so many strides."""
        start = 0
        for strides in cut:
            yield slice(start, start + strides * self.stride)
            start += strides * self.stride

    def output_length(self, length: int) -> int:
        lengths = self.layer.output_lengths(jnp.array([length]))
        assert lengths is not None
        return int(lengths[0])


@pytest.fixture(scope="module", params=LAYERS)
def case(request: pytest.FixtureRequest) -> Case:
    return Case((LAYERS | UNUSUAL_NETWORKS)[request.param])


def test_a_fresh_state_is_zero_and_has_the_batch_first(case: Case):
    for dtype in (jnp.float32, jnp.bfloat16):
        for leaf in jax.tree.leaves(case.layer.init_state(BATCH, dtype)):
            assert leaf.shape[0] == BATCH
            assert leaf.dtype in (dtype, jnp.int32, jnp.bool)
            assert not np.asarray(leaf).any()


@pytest.mark.parametrize("cut", CUTS, ids=lambda cut: "-".join(map(str, cut[:5])))
def test_pieces_equal_the_whole(case: Case, cut: list[int]):
    state, outputs = case.init_state(), []
    before = jax.tree.map(jax.typeof, state)
    for piece in case.pieces(cut):
        state, y = case.step(state, case.x[:, piece])
        outputs.append(y)
        assert jax.tree.map(jax.typeof, state) == before
    assert relative_error(np.concatenate(outputs, axis=1), case.y) < TOLERANCE
    assert set(case.traces.values()) == {1}  # each size is traced once, however many steps


@pytest.mark.parametrize("strides", [1, 6, 13])
def test_the_future_does_not_reach_the_past(case: Case, strides: int):
    end = strides * case.stride
    x = case.x.copy()
    x[:, end:] = case.garbage
    past = case.output_length(end)
    np.testing.assert_array_equal(case.whole(x)[:, :past], case.y[:, :past])


def test_rows_are_independent(case: Case):
    x = case.x.copy()
    x[1] = np.nan
    np.testing.assert_array_equal(case.whole(x)[::2], case.y[::2])


def ragged(case: Case) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Lengths of rows, the shortest and the longest among them, and clips with garbage beyond them."""
    generator = np.random.default_rng(2)
    for length in (1, case.stride, case.stride + 1, *generator.integers(1, case.time, 4)):
        lengths = np.array([length, case.time, generator.integers(1, case.time)])
        beyond = np.arange(case.time) >= lengths[:, None]
        yield lengths, np.where(beyond[..., None], np.float32(case.garbage), case.x)


FEW_PASSES = {"encoder_front": "few_passes", "decoder_back": "few_passes"}


@pytest.mark.parametrize(
    ("case", "limits", "compute"),
    [
        *[
            (network, limits, "portable")
            for network in ("encoder", "decoder")
            for limits in ((1000, 300), (1000, 700), (2000, 2000))
        ],
        *[(network, (144, 144), FEW_PASSES) for network in ("encoder", "decoder", *UNUSUAL_NETWORKS)],
    ],
    indirect=["case"],
    ids=str,
)
def test_networks_in_pieces_equal_layer_by_layer(
    case: Case, limits: tuple[int, int], compute: str | dict[str, str]
):
    """In pieces of pieces, as on a CPU, and in large ones, as on a GPU. A step of 25 Hz has 144 bytes."""
    network: Any = case.layer
    computing = policy.computing(policy.resolve(compute))
    in_pieces = jax.jit(computing(functools.partial(network.step_in_pieces, parts.PieceBytes(*limits))))
    in_order = jax.jit(network.step_layers)
    assert "while" in in_pieces.lower(case.init_state(), case.x, None).as_text()
    for lengths, _ in ragged(case):
        arguments = case.init_state(), case.x, jnp.asarray(lengths)
        (state, y), (expected_state, expected) = jax.device_get((in_pieces(*arguments), in_order(*arguments)))
        for row, length in enumerate(lengths):
            real = case.output_length(int(length))
            assert relative_error(y[row, :real], expected[row, :real]) < TOLERANCE
        # Row 1 is real to its end; what a row that has ended leaves behind means nothing.
        for leaf, expected_leaf in zip(*map(jax.tree.leaves, (state, expected_state)), strict=True):
            np.testing.assert_allclose(leaf[1], expected_leaf[1], rtol=1e-5, atol=1e-5)


def test_a_ragged_row_equals_the_row_alone(case: Case):
    for lengths, x in ragged(case):
        y = case.whole(x, lengths)
        for row, end in enumerate(lengths):
            clip = np.zeros_like(x)
            clip[:, :end] = x[row, :end]
            real = case.output_length(end)
            alone = case.whole(clip, np.full(BATCH, end))[0, :real]
            assert relative_error(y[row, :real], alone) < TOLERANCE
            if end % case.stride == 0:
                assert relative_error(y[row, :real], case.y[row, :real]) < TOLERANCE


def test_a_row_can_end_inside_a_step(case: Case):
    for lengths, x in ragged(case):
        state, outputs = case.init_state(), []
        for piece in case.pieces([7, 7, 14]):
            inside = np.clip(lengths - piece.start, 0, piece.stop - piece.start)
            state, y = case.step(state, x[:, piece], inside)
            outputs.append(y)
        stepped, whole = np.concatenate(outputs, axis=1), case.whole(x, lengths)
        for row, end in enumerate(lengths):
            real = case.output_length(end)
            assert relative_error(stepped[row, :real], whole[row, :real]) < TOLERANCE


def test_a_reset_row_is_a_fresh_stream(case: Case):
    rows = np.array([False, True, False])
    state, x, outputs = case.init_state(), case.x, []
    for index, piece in enumerate(case.pieces([3, 2, 2, 3])):
        if index == 2:  # after five strides row 1 starts again
            state = reset_rows(state, rows) if jax.tree.leaves(state) else state
            x = np.where(rows[:, None, None], np.roll(x, 5 * case.stride, axis=1), x)
        state, y = case.step(state, x[:, piece])
        outputs.append(y)
    y, reset = np.concatenate(outputs, axis=1), case.output_length(5 * case.stride)
    assert relative_error(y[::2], case.y[::2, : 2 * reset]) < TOLERANCE
    assert relative_error(y[1, reset:], case.y[1, :reset]) < TOLERANCE


def test_a_row_of_length_zero_keeps_its_state(case: Case):
    """Every other step row 1 waits, and is fed NaN meanwhile."""
    state, outputs = case.init_state(), []
    for piece in case.pieces([2] * 14):
        state, y = case.step(state, case.x[:, piece])
        outputs.append(y[1])
        waiting = case.x[:, piece].copy()
        waiting[1] = np.nan
        paused, _ = case.step(state, waiting, waiting.shape[1] * np.array([1, 0, 1]))
        for before, after in zip(jax.tree.leaves(state), jax.tree.leaves(paused), strict=True):
            np.testing.assert_array_equal(before[1], after[1])
        state = paused
    assert relative_error(np.concatenate(outputs), case.y[1]) < TOLERANCE


def test_derivatives_of_steps_equal_those_of_the_whole(case: Case):
    """Of all outputs, along a random direction of the parameters and inputs together."""

    def stepped(layer: StreamingLayer, x: jax.Array) -> jax.Array:
        state, outputs = layer.init_state(BATCH), []
        for piece in case.pieces([7, 7, 14]):
            state, y = layer.step(state, x[:, piece])
            outputs.append(y)
        return jnp.concatenate(outputs, axis=1)

    @jax.jit
    def derivative(layer: StreamingLayer, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        direction = random_like((layer, x), seed=3)
        return tuple(jax.jvp(f, (layer, x), direction)[1] for f in (stepped, type(layer).__call__))

    actual, expected = derivative(case.layer, case.x)
    assert relative_error(actual, expected) < TOLERANCE
