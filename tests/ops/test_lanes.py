"""Streams whose rings hold heads side by side, as on TPUs, have the codes and the audio of other streams."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import mimi_jax
from benchmarks.inputs import random_model
from mimi_jax.nn.attention import Attention
from mimi_jax.ops import policy
from mimi_jax.ops.lanes import heads_in_lanes, narrow, scores_of_two_rounds, widen, write_slots
from mimi_jax.ops.nearest import plain_search, search_in_one_pass
from tests.models import load_fixture, noise, random_module, relative_error

ON_TPU = {"ring": "lanes", "search": "one_pass"}


def computed_by(model: mimi_jax.Mimi, compute: dict[str, str] | policy.Compute) -> mimi_jax.Mimi:
    model = nnx.clone(model)
    model.compute = policy.resolve(compute)
    return model


@pytest.mark.parametrize(
    ("num_heads", "head_dim", "expected"),
    [(8, 64, 2), (8, 16, 8), (6, 32, 3), (6, 40, 3), (7, 64, 1), (8, 128, 1), (4, 256, 1), (1, 8, 1)],
)
def test_heads_fill_the_lanes(num_heads: int, head_dim: int, expected: int):
    assert heads_in_lanes(num_heads, head_dim) == expected


@pytest.mark.parametrize("groups", [1, 3])
def test_wide_queries_see_their_own_head_alone(groups: int):
    """Four heads, two side by side: the products of a wide query and a wide key are those of its head."""
    query, key = noise(2, 5, 4 * groups, 8), noise(2, 7, 4, 8, seed=1)
    wide = np.asarray(widen(jnp.asarray(query), 2, groups)).reshape(2, 5, 2, 2 * groups, 16)
    actual = np.einsum("btwgd,bswd->btwgs", wide, key.reshape(2, 7, 2, 16)).reshape(2, 5, 4 * groups, 7)
    expected = np.einsum("bthgd,bshd->bthgs", query.reshape(2, 5, 4, groups, 8), key)
    assert relative_error(actual, expected.reshape(actual.shape)) < 1e-6
    wide = wide.reshape(2, 5, 4 * groups, 16)
    np.testing.assert_array_equal(narrow(jnp.asarray(wide), 2, groups), query)
    elsewhere = jnp.where(wide == 0, jnp.nan, jnp.asarray(wide))
    np.testing.assert_array_equal(narrow(elsewhere, 2, groups), query)


@pytest.mark.parametrize("time", [1, 64])
def test_keys_of_two_rounds_meet_queries_of_their_round(time: int):
    """A short step selects scores, a long one selects keys."""
    keys, queries = noise(2, 3, 5, 4), noise(2, 3, 2, 2, time, 4, seed=1)
    before = np.arange(5) > np.array([[1], [3]])
    products = np.einsum("bhsd,bhgrtd->brhgts", keys, queries)
    expected = np.where(before[:, None, None, None], products[:, 1], products[:, 0])
    actual = scores_of_two_rounds(*map(jnp.asarray, (keys, queries, before)))
    assert relative_error(actual, expected) < 1e-6


def test_slots_are_written_in_their_rows():
    ring, new = noise(2, 3, 4, 10), noise(2, 2, 6, 5, seed=1)
    positions = np.array([[3, 0], [4, 2]])  # the ring has no slot 4
    expected = ring.copy()
    for row, step, slot in ((0, 0, 3), (0, 1, 0), (1, 1, 2)):
        expected[row, :, slot] = new[row, step].reshape(3, 10)
    np.testing.assert_array_equal(write_slots(*map(jnp.asarray, (ring, new, positions))), expected)


@pytest.mark.parametrize(
    ("grouped", "sizes"),
    [
        (False, (2, 6)),
        (True, (6,)),
        pytest.param(False, (1,), marks=pytest.mark.slow),
        pytest.param(False, (24,), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_streams_have_the_same_codes_and_audio(grouped: bool, sizes: tuple[int, ...]):
    """Of rows that end apart, one of which is idle for a while; the ring goes round several times."""
    plain = load_fixture("base").model
    if grouped:
        config = dataclasses.replace(plain.config, num_attention_heads=4, num_key_value_heads=2, head_dim=6)
        plain = random_model(config)
    model = computed_by(plain, ON_TPU)
    frame_size, frames = model.config.frame_size, 48
    audio = jnp.asarray(noise(3, model.config.audio_channels, frames * frame_size))
    ends = np.array([frames * frame_size, 31 * frame_size + 3, 1])
    mask = np.arange(frames * frame_size) < ends[:, None]
    states = [(m.init_encoder_state(3), m.init_decoder_state(3)) for m in (plain, model)]
    assert jax.tree.leaves(states[1][0][1])[0].shape[1] < jax.tree.leaves(states[0][0][1])[0].shape[1]
    rounds = sizes * (frames // sum(sizes))
    for number, (end, size) in enumerate(zip(np.cumsum(rounds), rounds, strict=True)):
        samples = slice((end - size) * frame_size, end * frame_size)
        active = jnp.array([True, True, number % 3 > 0])
        results = []
        for index, m in enumerate((plain, model)):
            encoder, decoder = states[index]
            encoder, codes = mimi_jax.encode_step(
                m, encoder, audio[:, :, samples], mask[:, samples], active=active
            )
            decoder, values = mimi_jax.decode_step(m, decoder, codes, active)
            states[index] = encoder, decoder
            results.append((codes, values))
        np.testing.assert_array_equal(results[1][0], results[0][0])
        assert relative_error(results[1][1], results[0][1]) < 1e-5
    position = [state[0][1][0].position for state in states]
    np.testing.assert_array_equal(position[1], position[0])


def test_a_step_for_tpus_is_exported_for_all_platforms_and_writes_in_place():
    model = computed_by(load_fixture("base").model, ON_TPU)
    audio = jnp.asarray(noise(2, 1, model.config.frame_size))

    def step(state, audio):
        return mimi_jax.encode_step(model, state, audio)

    state = model.init_encoder_state(2)
    expected = jax.jit(step)(state, audio)
    exported = jax.export.export(jax.jit(step), platforms=("cpu", "cuda", "tpu"))(state, audio)
    jax.tree.map(np.testing.assert_array_equal, jax.jit(exported.call)(state, audio), expected)
    donated = jax.jit(step, donate_argnums=0)
    text = donated.lower(state, audio).compile().as_text() or ""
    assert text.count("may-alias") == len(jax.tree.leaves(state))
    jax.tree.map(np.testing.assert_array_equal, donated(state, audio), expected)


def test_a_ring_for_tpus_is_stepped_layer_by_layer_on_gpus():
    plain = load_fixture("base").model
    model = computed_by(plain, ON_TPU | {"transformer": "few_rows"})
    audio = jnp.asarray(noise(2, 1, model.config.frame_size))
    codes = [mimi_jax.encode_step(m, m.init_encoder_state(2), audio)[1] for m in (plain, model)]
    np.testing.assert_array_equal(*codes)


def test_one_pass_finds_the_first_of_the_nearest_codes():
    entries = noise(16, 8)
    entries[9] = entries[4]
    vectors = np.concatenate([noise(2, 50, 8, seed=1), np.tile(entries[4], (2, 1, 1))], axis=1)
    arguments = [jnp.asarray(x) for x in (vectors, entries, (entries**2).sum(axis=1) / 2)]
    codes = search_in_one_pass(*arguments)
    assert codes.dtype == jnp.int32
    np.testing.assert_array_equal(codes, plain_search(*arguments))
    assert (codes[:, -1] == 4).all()


@pytest.mark.parametrize("on_tpu", [False, True])
def test_only_models_on_tpus_compute_so(on_tpu: bool):
    fused = ("tpu",) if on_tpu else ()
    model = computed_by(load_fixture("base").model, dataclasses.replace(policy.PORTABLE, fused=fused))
    assert ("tpu" in policy.resolve("auto").fused) == (jax.devices()[0].platform == "tpu")
    state = jax.eval_shape(lambda: model.init_encoder_state(2))
    heads = 1 if on_tpu else model.config.num_key_value_heads
    assert jax.tree.leaves(state[1])[0].shape[1] == heads
    audio = jax.ShapeDtypeStruct((2, 1, model.config.frame_size), jnp.float32)
    traced = jax.jit(mimi_jax.encode_step).trace(model, state, audio)
    assert ("argmax" in str(traced.jaxpr)) == on_tpu


@pytest.mark.parametrize("size", [3, 40])
def test_long_steps_of_attention_are_those_of_whole_clips(size: int):
    layer = random_module(lambda rngs: Attention(16, 2, 2, 8, 40, rngs=rngs))
    x = jnp.asarray(noise(2, 120, 16))
    with policy.computing(policy.resolve({"ring": "lanes"})):
        state = layer.init_state(2)
    assert state.key.shape == (2, 1, 46, 16)
    step, out = jax.jit(layer.step), []
    for start in range(0, 120, size):
        state, y = step(state, x[:, start : start + size])
        out.append(y)
    assert relative_error(jnp.concatenate(out, axis=1), layer(x)) < 1e-5
