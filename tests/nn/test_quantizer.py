"""The quantizer against a search through all codebook entries."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mimi_jax.nn.quantizer import EPSILON, ResidualQuantizer
from tests.models import load_fixture, random_module, relative_error

NAMES = ["base", "no_projection", "semantic2"]  # 4 codebooks of 16 entries


def nearest_codes(quantizer: ResidualQuantizer, latents: np.ndarray) -> np.ndarray:
    """[frames, hidden_size] -> [levels, frames], in float64: at each level the nearest to what is left."""
    left = latents.astype(np.float64)
    if quantizer.input_proj is not None:
        left = left @ np.asarray(quantizer.input_proj.kernel)
    codes = []
    for entries in np.asarray(quantizer.embedding):
        distances = np.linalg.norm(left[:, None] - entries, axis=-1)
        codes.append(distances.argmin(axis=1))
        left -= entries[codes[-1]]
    return np.stack(codes)


@pytest.mark.parametrize("name", NAMES)
def test_codes_are_the_nearest_entries(name: str):
    model, clips = load_fixture(name)
    codes = model.quantize(clips[0].latents)
    halves = model.quantizer.semantic, model.quantizer.acoustic
    for row, latents in enumerate(clips[0].latents):
        expected = np.concatenate([nearest_codes(half, latents) for half in halves])
        np.testing.assert_array_equal(codes[row], expected)
    assert codes.dtype == jnp.int32


@pytest.mark.parametrize("name", NAMES)
def test_latents_are_the_sum_of_the_entries(name: str):
    model, clips = load_fixture(name)
    quantizer, codes = model.quantizer, clips[0].audio_codes
    expected = np.zeros_like(clips[0].latents)
    levels = quantizer.num_semantic
    for half, part in ((quantizer.semantic, codes[:, :levels]), (quantizer.acoustic, codes[:, levels:])):
        total = sum(np.asarray(half.embedding)[level][part[:, level]] for level in range(part.shape[1]))
        expected += total if half.output_proj is None else total @ np.asarray(half.output_proj.kernel)
    assert relative_error(model.dequantize(codes), expected) < 1e-6


def test_each_level_brings_the_sum_nearer():
    """The acoustic levels alone: every one leaves less of the latents than the one before."""
    model, clips = load_fixture("no_projection")
    quantizer, latents = model.quantizer.acoustic, clips[0].latents
    codes = quantizer.encode(jnp.asarray(latents), 3)
    left = [np.linalg.norm(latents - quantizer.decode(codes[:, :levels])) for levels in (1, 2, 3)]
    assert np.linalg.norm(latents) > left[0] > left[1] > left[2]


@pytest.mark.parametrize("count", [2, 3])
def test_fewer_codebooks_are_the_first_ones(count: int):
    model, clips = load_fixture("semantic2")
    codes = model.quantize(clips[0].latents, count)
    np.testing.assert_array_equal(codes, clips[0].audio_codes[:, :count])
    assert model.dequantize(codes).shape == clips[0].latents.shape


@pytest.mark.parametrize("bad", [-1, 16, 2**31 - 1, -(2**31)])
@pytest.mark.parametrize("level", [0, 3])
def test_a_code_that_is_none_gives_nan(bad: int, level: int):
    model, clips = load_fixture("base")
    codes = clips[0].audio_codes.copy()
    codes[0, level, 5] = bad
    is_nan = np.isnan(model.dequantize(codes)).all(axis=2)
    assert np.argwhere(is_nan).tolist() == [[0, 5]]


def test_a_code_that_is_none_gives_nan_in_narrow_integers_too():
    """int8 holds every code of 128, but not the number 128."""
    config = dataclasses.replace(load_fixture("base").model.config, codebook_size=128)
    quantizer = random_module(lambda rngs: ResidualQuantizer(config, 1, rngs=rngs))
    assert np.isnan(quantizer.decode(jnp.array([[[-1, 127]]], jnp.int8))).all(axis=2).tolist() == [
        [True, False]
    ]


def test_the_quantizer_is_float32_whatever_the_latents_are():
    model, clips = load_fixture("base")
    codes = model.quantize(jnp.asarray(clips[0].latents, jnp.bfloat16))
    assert model.dequantize(codes).dtype == jnp.float32
    rounded = np.asarray(jnp.asarray(clips[0].latents, jnp.bfloat16), np.float32)
    np.testing.assert_array_equal(codes, model.quantize(rounded))


def test_embeddings_are_sums_over_usage():
    """An entry that was hardly used is divided by EPSILON, never by zero."""
    quantizer = jax.tree.map(jnp.copy, load_fixture("base").model.quantizer.acoustic)
    usage, sums = np.array(quantizer.cluster_usage), np.array(quantizer.embedding_sum)
    usage[0, 3] = 0
    quantizer.cluster_usage.set_value(jnp.asarray(usage))
    quantizer.derive()
    expected = sums / np.maximum(usage, EPSILON)[..., None]
    assert relative_error(quantizer.embedding, expected) < 1e-6
    assert relative_error(quantizer.half_square, (expected**2).sum(axis=-1) / 2) < 1e-6


def test_products_are_exact_at_any_precision_of_the_model():
    """Where "default" means TF32 or bfloat16 passes, those of the quantizer stay float32."""
    model, clips = load_fixture("base")
    with jax.default_matmul_precision("default"):
        encode = str(jax.make_jaxpr(model.quantizer.encode)(clips[0].latents))
        decode = str(jax.make_jaxpr(model.quantizer.decode)(clips[0].audio_codes))
    for program in (encode, decode):
        assert (
            program.count("dot_general[")
            == program.count("precision=(Precision.HIGHEST, Precision.HIGHEST)")
            > 0
        )
