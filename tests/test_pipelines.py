"""The codec inside other people's training: jitted steps, meshes, Grain, optax, NNX and Linen."""

from collections.abc import Iterator
from typing import Any

import flax.linen as linen
import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

import mimi_jax
from mimi_jax import Mimi
from tests.models import load_fixture, noise

WIDTH = 8
STEPS = 30


@pytest.fixture(scope="module")
def model() -> Mimi:
    return load_fixture("base").model


def next_code_loss(parameters: dict[str, jax.Array], codes: jax.Array) -> jax.Array:
    """How well the codes of a frame tell the semantic code of the next one. [batch, codebooks, frames]"""
    embedded = parameters["embedding"][codes].sum(axis=1)  # [batch, frames, width]
    logits = embedded[:, :-1] @ parameters["output"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, codes[:, 0, 1:]).mean()


@pytest.fixture(autouse=True)
def promote_for_optax() -> Iterator[None]:
    """optax raises floats to integer powers, which the strict promotion of the tests refuses."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def new_parameters(codebook_size: int) -> dict[str, jax.Array]:
    table = noise(codebook_size, WIDTH)
    return {"embedding": jnp.asarray(table), "output": jnp.asarray(table.T)}


def test_encode_in_a_jitted_train_step_on_a_sharded_batch(model: Mimi):
    """The model is an argument like any other; each device encodes its own rows."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows, everywhere = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("data",), ()))
    clips = [noise(1, length, seed=length) for length in range(320, 480, 10)]
    audio, mask = mimi_jax.pad_batch(clips)
    optimizer = optax.adam(0.05)
    parameters = new_parameters(model.config.codebook_size)

    @jax.jit
    def train_step(model: Mimi, parameters: Any, state: Any, audio: jax.Array, mask: jax.Array):
        codes = mimi_jax.encode(model, audio, mask).audio_codes
        loss, gradients = jax.value_and_grad(next_code_loss)(parameters, codes)
        updates, state = optimizer.update(gradients, state)
        return optax.apply_updates(parameters, updates), state, loss, codes

    put_model, put_parameters = jax.device_put((model, parameters), everywhere)
    state = optimizer.init(put_parameters)
    put_audio, put_mask = jax.device_put((audio, mask), rows)
    losses = []
    for _ in range(STEPS):
        put_parameters, state, loss, codes = train_step(put_model, put_parameters, state, put_audio, put_mask)
        losses.append(float(loss))
    assert losses[-1] < 0.5 * losses[0]
    np.testing.assert_array_equal(codes, mimi_jax.encode(model, audio, mask).audio_codes)
    assert losses[0] == pytest.approx(float(next_code_loss(parameters, jax.device_get(codes))), rel=1e-5)


def test_encode_of_host_side_batches_from_grain(model: Mimi):
    """Grain's threads read and pad; the codes are those of each clip alone."""
    clips = [noise(1, 100 + 16 * (number % 5), seed=number) for number in range(20)]

    def pad(clip: np.ndarray) -> dict[str, np.ndarray]:
        audio, mask = mimi_jax.pad_batch([clip, np.zeros((1, 200), np.float32)])
        return {"audio": audio[0], "mask": mask[0]}

    dataset = grain.MapDataset.source(clips).shuffle(seed=0).map(pad).batch(4).to_iter_dataset()
    seen = 0
    for batch in dataset:
        out = mimi_jax.encode(model, batch["audio"], batch["mask"])
        for audio, mask, codes, real in zip(*batch.values(), *out, strict=True):
            alone = mimi_jax.encode(model, audio[None, :, : mask.sum()]).audio_codes[0]
            np.testing.assert_array_equal(codes[:, : real.sum()], alone)
            seen += 1
    assert seen == len(clips)


def vocoder_loss(decoder: Mimi, latents: jax.Array, audio: jax.Array) -> jax.Array:
    decoded = decoder.decode_latents(latents)[:, :, : audio.shape[2]]
    return jnp.mean(jnp.abs(decoded - audio)) + jnp.mean((decoded - audio) ** 2)


def test_a_vocoder_learns_latents_through_the_frozen_decoder(model: Mimi):
    """Gradients go through `decode_latents`, the same ones with `jax.checkpoint`."""
    audio = jnp.asarray(0.1 * noise(2, 1, 160), jnp.float32)
    latents = model.encode_latents(audio)
    loss = jax.jit(jax.value_and_grad(lambda x: vocoder_loss(model, x, audio)))
    remat = jax.jit(jax.value_and_grad(lambda x: jax.checkpoint(vocoder_loss)(model, x, audio)))
    first, gradient = loss(latents)
    np.testing.assert_allclose(remat(latents)[1], gradient, rtol=1e-4, atol=1e-7)
    optimizer = optax.adam(0.05)
    state, last = optimizer.init(latents), first
    for _ in range(STEPS):
        last, gradient = loss(latents)
        updates, state = optimizer.update(gradient, state)
        latents = optax.apply_updates(latents, updates)
    assert last < 0.9 * first


def test_fine_tuning_with_plain_optax(model: Mimi):
    """The model is split once into parameters and the rest; the parameters are a pytree for optax."""
    audio = jnp.asarray(0.1 * noise(2, 1, 160), jnp.float32)
    latents = model.encode_latents(audio)
    graph, parameters, rest = nnx.split(model, nnx.PathContains("decoder"), ...)
    optimizer = optax.adam(1e-3)

    @jax.jit
    def train_step(parameters: Any, state: Any):
        def loss(parameters: Any) -> jax.Array:
            return vocoder_loss(nnx.merge(graph, parameters, rest), latents, audio)

        value, gradients = jax.value_and_grad(loss)(parameters)
        updates, state = optimizer.update(gradients, state)
        return optax.apply_updates(parameters, updates), state, value

    state, losses = optimizer.init(parameters), []
    for _ in range(STEPS):
        parameters, state, value = train_step(parameters, state)
        losses.append(float(value))
    assert losses[-1] < 0.9 * losses[0]
    tuned = nnx.merge(graph, parameters, rest)
    np.testing.assert_array_equal(
        mimi_jax.encode(tuned, audio).audio_codes, mimi_jax.encode(model, audio).audio_codes
    )


def test_fine_tuning_with_an_nnx_optimizer(model: Mimi):
    audio = jnp.asarray(0.1 * noise(2, 1, 160), jnp.float32)
    tuned = nnx.clone(model)
    latents = tuned.encode_latents(audio)
    decoder = nnx.All(nnx.Param, nnx.PathContains("decoder"))
    optimizer = nnx.Optimizer(tuned, optax.adam(1e-3), wrt=decoder)

    @nnx.jit
    def train_step(model: Mimi, optimizer: nnx.Optimizer) -> jax.Array:
        argument = nnx.DiffState(0, decoder)
        value, gradients = nnx.value_and_grad(vocoder_loss, argnums=argument)(model, latents, audio)
        optimizer.update(model, gradients)
        return value

    losses = [float(train_step(tuned, optimizer)) for _ in range(STEPS)]
    assert losses[-1] < 0.9 * losses[0]


class CodeClassifier(linen.Module):
    """Linen code takes the codec as an argument of its call."""

    classes: int

    @linen.compact
    def __call__(self, codec: Mimi, audio: jax.Array) -> jax.Array:
        codes = mimi_jax.encode(codec, audio).audio_codes  # [batch, codebooks, frames]
        x = linen.Embed(codec.config.codebook_size, WIDTH)(codes).mean(axis=(1, 2))
        return linen.Dense(self.classes)(x)


def test_the_codec_in_linen_code(model: Mimi):
    audio = noise(4, 1, 160)
    module = CodeClassifier(classes=3)
    variables = module.init(jax.random.key(0), model, audio)
    assert set(variables["params"]) == {"Embed_0", "Dense_0"}
    logits = jax.jit(module.apply)(variables, model, audio)
    bias, kernel, table = jax.tree.leaves(variables["params"])
    codes = mimi_jax.encode(model, audio).audio_codes
    expected = table[codes].mean(axis=(1, 2)) @ kernel + bias[None]
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-6)
