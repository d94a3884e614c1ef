"""The codec inside JAX: a user's own jit, vmap, grad, scan and remat, and batches over eight devices."""

import contextlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jax.test_util import check_grads

from mimi_jax.model import Mimi, decode, decode_step, encode, encode_step
from tests.models import load_fixture, relative_error

MODEL, CLIPS = load_fixture("kyutai")
CLIP = CLIPS[0]  # two rows, 16 frames of 16 samples
FRAME = MODEL.config.frame_size


def roundtrip(model: Mimi, audio: jax.Array, mask: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
    codes = encode(model, audio, mask).audio_codes
    return codes, decode(model, codes, mask).audio_values


def step(model: Mimi, state: Any, audio: jax.Array) -> tuple[Any, tuple[jax.Array, jax.Array]]:
    """A frame through both halves, in the form that `lax.scan` wants it."""
    encoder, codes = encode_step(model, state[0], audio)
    decoder, audio = decode_step(model, state[1], codes)
    return (encoder, decoder), (codes, audio)


def init_state(batch_size: int) -> Any:
    return MODEL.init_encoder_state(batch_size), MODEL.init_decoder_state(batch_size)


def test_vmap():
    codes, audio = jax.jit(jax.vmap(roundtrip, in_axes=(None, 0)))(MODEL, CLIP.audio[:, None])
    np.testing.assert_array_equal(codes[:, 0], CLIP.audio_codes)
    assert relative_error(audio[:, 0], CLIP.audio_values) < 1e-5


def test_vmap_of_steps():
    states = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), init_state(1))
    _, (codes, audio) = jax.jit(jax.vmap(step, in_axes=(None, 0, 0)))(MODEL, states, CLIP.audio[:, None])
    np.testing.assert_array_equal(codes[:, 0], CLIP.audio_codes)
    assert relative_error(audio[:, 0], CLIP.audio_values) < 1e-5


def test_scan_over_steps():
    frames = jnp.moveaxis(CLIP.audio.reshape(2, 1, -1, FRAME), 2, 0)
    scan = jax.jit(lambda model, state: jax.lax.scan(lambda *args: step(model, *args), state, frames))
    _, (codes, audio) = scan(MODEL, init_state(2))
    np.testing.assert_array_equal(jnp.moveaxis(codes[..., 0], 0, 2), CLIP.audio_codes)
    assert relative_error(jnp.moveaxis(audio, 0, 2).reshape(CLIP.audio.shape), CLIP.audio_values) < 1e-5


@jax.jit
def loudness(model: Mimi, latents: jax.Array) -> jax.Array:
    return jnp.mean(model.decode_latents(latents) ** 2)


def test_gradients_through_decode_latents_are_the_slopes():
    """Of the latents and of every parameter, against finite differences along random directions."""
    latents = jnp.asarray(CLIP.latents[:, :4])
    check_grads(loudness, (MODEL, latents), order=1, modes=("rev",), eps=3e-4, rtol=1e-3)


gradient_of_loudness = jax.jit(jax.grad(loudness, argnums=1))


def test_gradients_survive_remat():
    latents = CLIP.latents[:, :4]
    actual = jax.jit(jax.grad(jax.checkpoint(loudness), argnums=1))(MODEL, latents)
    assert relative_error(actual, gradient_of_loudness(MODEL, latents)) < 1e-5


def test_gradients_of_audio_ignore_the_padding():
    mask = np.arange(4 * FRAME) < np.array([[4 * FRAME], [2 * FRAME - 5]])
    audio = np.where(mask[:, None], CLIP.audio[:, :, : 4 * FRAME], np.nan)

    def energy(audio: jax.Array) -> jax.Array:
        latents = MODEL.encode_latents(audio, mask)
        return jnp.sum(latents[0] ** 2) + jnp.sum(latents[1, :2] ** 2)

    gradient = np.asarray(jax.jit(jax.grad(energy))(audio))
    assert np.isfinite(gradient).all()
    np.testing.assert_array_equal(gradient[:, 0] != 0, mask)


def test_gradients_through_a_scan_of_steps_are_those_of_the_whole():
    codes = jnp.asarray(CLIP.audio_codes[:, :, :6])

    def whole(model: Mimi) -> jax.Array:
        return jnp.mean(decode(model, codes).audio_values ** 2)

    def stepped(model: Mimi) -> jax.Array:
        frames = jnp.moveaxis(codes[..., None], 2, 0)
        state = model.init_decoder_state(2)
        _, audio = jax.lax.scan(lambda state, codes: decode_step(model, state, codes), state, frames)
        return jnp.mean(audio**2)

    actual, expected = (jax.jit(jax.grad(f))(MODEL) for f in (stepped, whole))
    for layer in ("upsample", "decoder_transformer", "decoder"):
        pairs = zip(*(jax.tree.leaves(getattr(g, layer)) for g in (actual, expected)), strict=True)
        assert all(relative_error(*pair) < 1e-4 for pair in pairs)


# Eight rows of 1 to 16 real frames, NaN after them.
NUM_REAL = np.array([16, 3, 7, 1, 16, 2, 5, 9])
MASK = np.arange(16 * FRAME) < FRAME * NUM_REAL[:, None]
AUDIO = np.where(MASK[:, None], np.tile(CLIP.audio, (4, 1, 1)), np.float32(np.nan))
IS_REAL = np.arange(16) < NUM_REAL[:, None, None]
CODES = np.where(IS_REAL, np.tile(CLIP.audio_codes, (4, 1, 1)), 0)
VALUES = np.where(MASK[:, None], np.tile(CLIP.audio_values, (4, 1, 1)), 0)
BATCH = PartitionSpec("data")


def over_devices(axis_type: AxisType) -> jax.sharding.Mesh:
    return jax.make_mesh((8,), ("data",), axis_types=(axis_type,))


def check_sharded(run: Callable, run_step: Callable, place: Callable) -> None:
    """Compare what `roundtrip` and `step` give over the devices, where `place` puts what has a batch."""
    codes, audio = run(MODEL, place(AUDIO), place(MASK))
    np.testing.assert_array_equal(codes, CODES)
    assert relative_error(audio, VALUES) < 1e-5
    state = place(init_state(8))
    for index in range(2):
        real = AUDIO[0, :, index * FRAME : (index + 1) * FRAME]
        state, (codes, audio) = run_step(MODEL, state, place(np.tile(real, (8, 1, 1))))
        np.testing.assert_array_equal(codes[:, :, 0], np.tile(CODES[0, :, index], (8, 1)))
    for array in (codes, audio, *jax.tree.leaves(state)):
        assert len(array.sharding.device_set) == 8
        assert array.addressable_shards[0].data.shape[0] == 1


@pytest.mark.parametrize(
    ("axis_type", "is_set"),
    [
        (AxisType.Auto, False),
        (AxisType.Explicit, True),
        pytest.param(AxisType.Explicit, False, marks=pytest.mark.slow),
    ],
)
def test_batch_over_devices(axis_type: AxisType, is_set: bool):
    """The mesh is that of the arrays, or also set for the whole program."""
    mesh = over_devices(axis_type)
    sharding = NamedSharding(mesh, BATCH)
    with jax.set_mesh(mesh) if is_set else contextlib.nullcontext():
        check_sharded(jax.jit(roundtrip), jax.jit(step), lambda tree: jax.device_put(tree, sharding))


def test_shard_map():
    mesh = over_devices(AxisType.Auto)
    sharding = NamedSharding(mesh, BATCH)

    def mapped(function: Callable) -> Callable:
        specs = (PartitionSpec(), BATCH, BATCH)
        return jax.jit(jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=BATCH))

    check_sharded(mapped(roundtrip), mapped(step), lambda tree: jax.device_put(tree, sharding))


def test_methods_and_gradients_over_explicit_axes():
    latents = np.tile(CLIP.latents[:, :4], (4, 1, 1))
    with jax.set_mesh(over_devices(AxisType.Explicit)):
        sharded = jax.device_put(latents, BATCH)
        codes = MODEL.quantize(sharded, 2)
        gradient = gradient_of_loudness(MODEL, sharded)
    np.testing.assert_array_equal(codes, np.tile(CLIP.audio_codes[:, :2, :4], (4, 1, 1)))
    expected = np.tile(gradient_of_loudness(MODEL, CLIP.latents[:, :4]), (4, 1, 1)) / 4
    assert relative_error(gradient, expected) < 1e-5
    for array in (codes, gradient):
        assert jax.typeof(array).sharding.spec[0] == "data"
