import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mimi_jax import MimiConfig
from mimi_jax.nn.quantizer import SplitResidualQuantizer
from mimi_jax.train import codebooks as vq

CONFIG = MimiConfig(
    hidden_size=8,
    num_attention_heads=2,
    num_key_value_heads=2,
    upsample_groups=8,
    codebook_size=16,
    codebook_dim=4,
    vector_quantization_hidden_dimension=4,
    num_quantizers=4,
)
ALL = {name: jnp.ones(3, bool) for name in vq.PARTS}
KEY = jax.random.key(0)


@pytest.fixture
def quantizer() -> SplitResidualQuantizer:
    return SplitResidualQuantizer(CONFIG, rngs=nnx.Rngs(1))


LATENTS = jax.random.normal(jax.random.key(3), (3, 5, 8))


def run(quantizer, num_quantizers=4, is_quantized=ALL, latents=LATENTS) -> vq.Quantized:
    return vq.quantize(quantizer, vq.codebooks_of(quantizer), latents, num_quantizers, is_quantized, KEY)


@pytest.mark.parametrize("num_quantizers", [2, 3, 4])
def test_training_quantizes_as_the_codec_does(quantizer, num_quantizers: int):
    out = run(quantizer, num_quantizers)
    codes = quantizer.encode(LATENTS, num_quantizers)
    np.testing.assert_array_equal(out.codes[:, :num_quantizers], codes)
    np.testing.assert_allclose(out.latents, quantizer.decode(codes), atol=1e-5)
    np.testing.assert_allclose(out.semantic, quantizer.semantic.decode(codes[:, :1]), atol=1e-5)


def test_rows_that_are_not_quantized_keep_their_latents(quantizer):
    out = run(
        quantizer, is_quantized={"semantic": jnp.array([1, 0, 0]) > 0, "acoustic": jnp.array([1, 0, 1]) > 0}
    )
    whole = run(quantizer)
    parts = {name: getattr(quantizer, name) for name in vq.PARTS}
    plain = {name: part.output_proj(part.input_proj(LATENTS)) for name, part in parts.items()}
    np.testing.assert_allclose(out.latents[0], whole.latents[0], atol=1e-6)
    np.testing.assert_allclose(out.latents[1], plain["semantic"][1] + plain["acoustic"][1], atol=1e-5)
    acoustic = whole.latents[2] - whole.semantic[2]
    np.testing.assert_allclose(out.latents[2], plain["semantic"][2] + acoustic, atol=1e-5)
    # Codebooks learn from all rows, also from those that are not quantized.
    for name in vq.PARTS:
        np.testing.assert_array_equal(out.assigned[name].counts, whole.assigned[name].counts)


def test_gradients_pass_straight_through(quantizer):
    def passed(latents):
        return jnp.sum(run(quantizer, latents=latents).latents ** 2)

    def expected(latents, target):
        parts = [getattr(quantizer, name) for name in vq.PARTS]
        return jnp.vdot(sum(part.output_proj(part.input_proj(latents)) for part in parts), target)

    target = 2 * run(quantizer).latents
    np.testing.assert_allclose(
        jax.grad(passed)(LATENTS), jax.grad(expected)(LATENTS, target), rtol=1e-4, atol=1e-5
    )


def test_commitment_draws_latents_towards_the_codes(quantizer):
    commitment = jax.value_and_grad(lambda latents: run(quantizer, 2, latents=latents).commitment)
    value, gradient = commitment(LATENTS)
    distances = []
    for name in vq.PARTS:
        part = getattr(quantizer, name)
        x = part.input_proj(LATENTS)
        nearest = part.embedding[0][part.encode(LATENTS, 1)[:, 0]]
        distances.append(jnp.mean((x - nearest) ** 2))
    assert float(value) == pytest.approx(float(sum(distances)) / 2, rel=1e-5)
    closer, _ = commitment(LATENTS - 0.1 * gradient)
    assert closer < value


def test_statistics_are_running_means_of_the_assigned_vectors(quantizer):
    old, out = vq.codebooks_of(quantizer), run(quantizer, 2)
    new = vq.update(old, out.assigned, 2, jnp.array(1))
    vectors = np.asarray(quantizer.acoustic.input_proj(LATENTS)).reshape(-1, 4)
    codes = np.asarray(out.codes[:, 1]).ravel()
    for code in range(16):
        mine = vectors[codes == code]
        usage = 0.99 * old["acoustic"].usage[0, code] + 0.01 * len(mine)
        assert float(new["acoustic"].usage[0, code]) == pytest.approx(float(usage), rel=1e-6)
        np.testing.assert_allclose(
            new["acoustic"].sums[0, code],
            0.99 * old["acoustic"].sums[0, code] + 0.01 * mine.sum(0),
            atol=1e-6,
        )
    # Levels that were not in use do not change.
    np.testing.assert_array_equal(new["acoustic"].usage[1:], old["acoustic"].usage[1:])
    np.testing.assert_array_equal(new["acoustic"].sums[1:], old["acoustic"].sums[1:])


def test_the_order_of_keys_does_not_matter(quantizer):
    old, out = vq.codebooks_of(quantizer), run(quantizer, 2)
    for order in (vq.PARTS, vq.PARTS[::-1]):
        new = jax.jit(vq.update)({name: old[name] for name in order}, out.assigned, 2, jnp.array(1))
        learned = {name: np.any(new[name].usage != old[name].usage, axis=1).tolist() for name in vq.PARTS}
        assert learned == {"semantic": [True], "acoustic": [True, False, False]}


@pytest.mark.parametrize("step", [4, 5])
def test_dead_codes_become_vectors_of_the_batch(quantizer, step: int):
    old, out = vq.codebooks_of(quantizer), run(quantizer)
    old["acoustic"] = old["acoustic"]._replace(usage=old["acoustic"].usage.at[0, 3].set(1e-3))
    out.assigned["acoustic"] = out.assigned["acoustic"]._replace(counts=jnp.zeros((3, 16)))
    new = vq.update(old, out.assigned, 4, jnp.array(step))["acoustic"]
    if step % vq.CHECK_EVERY:
        assert float(new.usage[0, 3]) < 1e-3
        return
    assert float(new.usage[0, 3]) == pytest.approx(float(new.usage[0, :3].mean()), rel=0.1)
    vectors = np.asarray(quantizer.acoustic.input_proj(LATENTS)).reshape(-1, 4)
    assert np.abs(vectors - new.embedding[:1, 3]).max(axis=1).min() < 1e-5
    np.testing.assert_allclose(new.embedding[0, 4], old["acoustic"].embedding[0, 4], atol=0.1)


def test_kmeans_finds_the_clusters():
    centres = 10 * jax.random.normal(jax.random.key(1), (16, 4))
    vectors = jnp.repeat(centres, 50, axis=0) + 0.01 * jax.random.normal(jax.random.key(2), (800, 4))
    found, counts, rest = vq._kmeans(vectors, 16, KEY)
    # If two centres start in one cluster they may stay there, so not every cluster is found.
    nearest = jnp.min(jnp.linalg.norm(centres[:, None] - found[None], axis=-1), axis=1)
    assert float(jnp.mean(nearest < 0.1)) > 0.7
    assert float(jnp.linalg.norm(rest)) < 0.5 * float(jnp.linalg.norm(vectors))
    assert int(counts.sum()) >= 800


def test_fitted_codebooks_leave_less_at_every_level(quantizer):
    latents = jax.random.normal(jax.random.key(5), (400, 8))
    fitted = vq.fit(quantizer, latents, KEY, vectors_per_step=40)
    errors = []
    for count in (2, 3, 4):
        out = vq.quantize(
            quantizer, fitted, latents[None], count, {name: jnp.ones(1, bool) for name in vq.PARTS}, KEY
        )
        parts = [getattr(quantizer, name) for name in vq.PARTS]
        plain = sum(part.output_proj(part.input_proj(latents)) for part in parts)
        errors.append(float(jnp.mean((out.latents[0] - plain) ** 2)))
    assert errors[0] > errors[1] > errors[2]
    # The running means start as if they had seen one step.
    assert float(fitted["acoustic"].usage[0].sum()) == pytest.approx(40, rel=0.1)


def test_too_few_latents(quantizer):
    with pytest.raises(ValueError, match="k-means needs at least codebook_size=16 latents, got 9"):
        vq.fit(quantizer, LATENTS[0].repeat(2, axis=0)[:9], KEY, 9)


def test_perplexity():
    np.testing.assert_allclose(vq.perplexity(jnp.array([[1.0, 1, 1, 1], [5, 0, 0, 0]])), [4, 1], rtol=1e-5)
