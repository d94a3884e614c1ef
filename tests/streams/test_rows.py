"""Rows of a state are reset, copied and moved, and bad rows and states are refused.

`test_schedules.py` shows that a stream continues exactly, wherever it is moved.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from mimi_jax.model import decode_step, encode_step
from mimi_jax.streams.rows import put_rows, reset_rows, take_rows
from tests.models import load_fixture

MODEL = load_fixture("base").model


def random_state(batch: int, seed: int = 0) -> Any:
    """A state of both halves without zeros."""
    generator = np.random.default_rng(seed)

    def draw(leaf: jax.Array) -> jax.Array:
        return jnp.asarray(generator.integers(1, 100, leaf.shape), leaf.dtype)

    return jax.tree.map(draw, (MODEL.init_encoder_state(batch), MODEL.init_decoder_state(batch)))


def assert_equal(actual: Any, expected: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def at(state: Any, index: Any) -> Any:
    return jax.tree.map(lambda leaf: np.asarray(leaf)[index], state)


def test_reset_rows_are_zero_and_the_others_do_not_change():
    state = random_state(4)
    after = reset_rows(state, [True, False, True, False])
    assert not any(leaf.any() for leaf in jax.tree.leaves(at(after, [0, 2])))
    assert_equal(at(after, [1, 3]), at(state, [1, 3]))


@pytest.mark.parametrize("rows", [[2], [3, 0], [1, 1], [0, 1, 2, 3], 2, np.array(2), jnp.array([1])])
def test_taken_rows_are_a_batch_of_their_own(rows: Any):
    state = random_state(4)
    assert_equal(take_rows(state, rows), at(state, np.atleast_1d(rows)))


@pytest.mark.parametrize("rows", [[2], [3, 0], 1])
def test_put_rows_replace_those_and_no_others(rows: Any):
    state, streams = random_state(4), random_state(np.size(rows), seed=1)
    after = put_rows(state, rows, streams)
    assert_equal(at(after, np.atleast_1d(rows)), streams)
    others = np.setdiff1d(np.arange(4), rows)
    assert_equal(at(after, others), at(state, others))
    assert jax.tree.map(jax.typeof, after) == jax.tree.map(jax.typeof, state)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_rows_of_a_sharded_state(kind: AxisType):
    state, streams = random_state(4), random_state(2, seed=1)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(kind,), devices=jax.devices()[:2])
    sharded = jax.device_put(state, NamedSharding(mesh, PartitionSpec("data")))
    taken = take_rows(sharded, [3, 0])
    assert_equal(taken, take_rows(state, [3, 0]))
    for new in (streams, taken):
        assert_equal(put_rows(sharded, [1, 2], new), put_rows(state, [1, 2], new))
    assert_equal(
        reset_rows(sharded, [True, False, False, True]), reset_rows(state, [True, False, False, True])
    )


def test_moving_a_row_and_back_changes_nothing():
    state = random_state(4)
    assert_equal(put_rows(state, [3, 1], take_rows(state, [3, 1])), state)


def test_rows_move_inside_jit():
    state, streams = random_state(4), random_state(1, seed=1)
    after = jax.jit(lambda *args: put_rows(args[0], args[1], take_rows(args[2], args[3])))(
        state, jnp.array([2]), streams, jnp.array([0])
    )
    assert_equal(after, put_rows(state, 2, streams))


@pytest.mark.parametrize("row", [4, -1])
def test_rows_outside_the_batch_inside_jit(row: int):
    state = random_state(4)
    taken = jax.jit(take_rows)(state, jnp.array([row]))
    assert all(np.isnan(leaf).all() for leaf in jax.tree.leaves(taken) if leaf.dtype == jnp.float32)
    assert_equal(jax.jit(put_rows)(state, jnp.array([row]), random_state(1)), state)


@pytest.mark.parametrize(
    ("rows", "error"),
    [
        ([True, False, True], r"rows must be bool \[batch=4\], got bool \[3\]"),
        ([0, 2], r"rows must be bool \[batch=4\], got int32 \[2\]"),
        ([1, 0, 0, 1], r"rows must be bool \[batch=4\], got int32 \[4\]"),
        (True, r"rows must be bool \[batch=4\], got bool \[\]"),
    ],
)
def test_rows_to_reset_must_be_a_mask(rows: Any, error: str):
    with pytest.raises(ValueError, match=error):
        reset_rows(random_state(4), rows)


@pytest.mark.parametrize(
    ("rows", "error"),
    [
        (np.array([2**32]), r"rows must lie in \[0, 4\), got \[4294967296\]"),
        ([4], r"rows must lie in \[0, 4\), got \[4\]"),
        ([0, -1], r"rows must lie in \[0, 4\), got \[0, -1\]"),
        (
            [True, False, False, True],
            r"int \[count\], got bool \[4\]; np.flatnonzero turns a mask into numbers",
        ),
        ([0.0], r"int \[count\], got float64 \[1\]"),
        ([[0]], r"int \[count\], got int64 \[1, 1\]"),
    ],
)
def test_rows_to_move_must_be_numbers(rows: Any, error: str):
    state = random_state(4)
    with pytest.raises(ValueError, match=error):
        take_rows(state, rows)
    with pytest.raises(ValueError, match=error):
        put_rows(state, rows, state)


def test_no_rows_may_be_moved():
    state = random_state(4)
    none = take_rows(state, [])
    assert {len(leaf) for leaf in jax.tree.leaves(none)} == {0}
    assert_equal(put_rows(state, [], none), state)


def test_two_streams_cannot_take_one_row():
    with pytest.raises(ValueError, match=r"rows must be distinct, .* got \[1, 1\]"):
        put_rows(random_state(4), [1, 1], random_state(2))


def test_there_must_be_a_stream_for_each_row():
    with pytest.raises(ValueError, match="there must be one stream for each row, got 3 streams for 2 rows"):
        put_rows(random_state(4), [0, 1], random_state(3))


@pytest.mark.parametrize(
    "streams",
    [
        MODEL.init_encoder_state(1),
        MODEL.init_decoder_state(1),
        (MODEL.init_decoder_state(1), MODEL.init_encoder_state(1)),
        jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), random_state(1)),
        (load_fixture("kernels").model.init_encoder_state(1), MODEL.init_decoder_state(1)),
    ],
    ids=["encoder", "decoder", "halves exchanged", "bfloat16", "another model"],
)
def test_streams_of_another_form(streams: Any):
    with pytest.raises(ValueError, match="streams must have the same model, half and dtype"):
        put_rows(random_state(4), 0, streams)


@pytest.mark.parametrize(
    "state",
    [
        MODEL.init_encoder_state(2),
        MODEL.init_decoder_state(2),
        random_state(3),
        jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), MODEL.init_encoder_state(3)),
        jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), MODEL.init_decoder_state(3)),
        load_fixture("kernels").model.init_encoder_state(3),
        (),
    ],
    ids=[
        "encoder of 2",
        "decoder of 2",
        "both",
        "bfloat16 encoder",
        "bfloat16 decoder",
        "other model",
        "none",
    ],
)
def test_a_step_refuses_a_state_of_another_form(state: Any):
    audio, codes = np.zeros((3, 1, MODEL.config.frame_size), np.float32), np.zeros((3, 4, 1), np.int32)
    with pytest.raises(
        ValueError, match="the state must be of this model, this half and as many streams as the input"
    ):
        encode_step(MODEL, state, audio)
    with pytest.raises(
        ValueError, match="the state must be of this model, this half and as many streams as the input"
    ):
        decode_step(MODEL, state, codes)


def test_a_step_refuses_an_active_mask_of_another_batch():
    audio, codes = np.zeros((3, 1, MODEL.config.frame_size), np.float32), np.zeros((3, 4, 1), np.int32)
    # Row numbers would count as a mask.
    for active in (np.array([True]), np.array([True, False]), np.array(True), np.array([0, 1, 2])):
        with pytest.raises(ValueError, match=r"active must be bool \[batch=3\], got (bool|int32)"):
            encode_step(MODEL, MODEL.init_encoder_state(3), audio, active=active)
        with pytest.raises(ValueError, match=r"active must be bool \[batch=3\], got (bool|int32)"):
            decode_step(MODEL, MODEL.init_decoder_state(3), codes, active=active)


def test_a_caller_can_donate_a_state_that_it_does_not_need():
    """So can the owner of a fresh state, in which no buffer occurs twice."""
    audio = np.random.default_rng(0).normal(size=(2, 1, MODEL.config.frame_size)).astype(np.float32)
    expected, codes = encode_step(MODEL, MODEL.init_encoder_state(2), audio)
    state = MODEL.init_encoder_state(2)
    after, donated = jax.jit(encode_step, donate_argnames="state")(MODEL, state, audio)
    np.testing.assert_array_equal(donated, codes)
    assert_equal(after, expected)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))
    decoder = MODEL.init_decoder_state(2)
    jax.jit(decode_step, donate_argnames="state")(MODEL, decoder, codes)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(decoder))
