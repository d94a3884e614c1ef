"""How codebooks learn: first by k-means, then as running means of the vectors assigned to each code.

Codebooks get no gradients. The rules are those of Kyutai's `moshi` since it released training code for the
quantizer (pull request 137). Running means decay by 0.99. Every 5 steps, a code with less than a tenth of the
mean usage is dead and is replaced by a random vector of the batch.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from mimi_jax.nn.quantizer import EPSILON, ResidualQuantizer, SplitResidualQuantizer
from mimi_jax.ops.nearest import plain_search

DECAY = 0.99
DEAD = 0.1  # of the mean usage
CHECK_EVERY = 5  # steps
KMEANS_ITERATIONS = 50


class Codebooks(NamedTuple):
    """The codebooks of one residual quantizer. A code's vector is its sum divided by its usage.

    A level is one codebook and its place in the quantizer; it quantizes what the levels before it left.
    """

    usage: jax.Array  # [levels, codebook_size]
    sums: jax.Array  # [levels, codebook_size, codebook_dim]

    @property
    def embedding(self) -> jax.Array:
        return self.sums / jnp.maximum(self.usage, EPSILON)[..., None]


class Assigned(NamedTuple):
    """Which vectors of a batch were assigned to each code."""

    counts: jax.Array  # [levels, codebook_size], how many vectors
    sums: jax.Array  # [levels, codebook_size, codebook_dim], the sum of these vectors
    candidates: jax.Array  # [levels, codebook_size, codebook_dim], random vectors to replace dead codes


class Quantized(NamedTuple):
    """A batch after the quantizer."""

    latents: jax.Array  # [batch, frames, hidden_size]; gradients pass through as if nothing was quantized
    semantic: jax.Array  # [batch, frames, hidden_size], the semantic quantizer's part of the latents
    codes: jax.Array  # int32 [batch, codebooks, frames]
    commitment: jax.Array  # mean squared distance to the codes in use; it draws the encoder towards them
    assigned: dict[str, Assigned]


PARTS = ("semantic", "acoustic")  # of a `SplitResidualQuantizer`


def codebooks_of(quantizer: SplitResidualQuantizer) -> dict[str, Codebooks]:
    """The codebooks of a model, for each of `PARTS`."""
    parts = {name: getattr(quantizer, name) for name in PARTS}
    return {name: Codebooks(q.cluster_usage[...], q.embedding_sum[...]) for name, q in parts.items()}


def quantize(
    quantizer: SplitResidualQuantizer,
    codebooks: dict[str, Codebooks],
    latents: jax.Array,
    num_quantizers: jax.Array | int,
    is_quantized: dict[str, jax.Array],
    key: jax.Array,
) -> Quantized:
    """Quantize latents [batch, frames, hidden_size] as training does.

    Args:
        quantizer: gives the projections. Its own codebooks are not used.
        codebooks: for each of `PARTS`.
        num_quantizers: how many codebooks are in use, counted from the first.
        is_quantized: for each of `PARTS`, bool [batch]. Where it is False, the row keeps its latents.
        key: for the random candidates.
    """
    outputs, codes, commitments, assigned = {}, [], [], {}
    first = 0
    for name, part_key in zip(PARTS, jax.random.split(key), strict=True):
        part, levels = getattr(quantizer, name), len(codebooks[name].usage)
        used = first + jnp.arange(levels) < num_quantizers
        x = latents if part.input_proj is None else part.input_proj(latents)
        quantized, level_codes, distances, assigned[name] = _quantize_levels(
            codebooks[name].embedding, x, used, part_key
        )
        quantized = jnp.where(is_quantized[name][:, None, None], quantized, x)
        x = x + lax.stop_gradient(quantized - x)
        outputs[name] = x if part.output_proj is None else part.output_proj(x)
        codes.append(level_codes)
        commitments.append(jnp.where(used, distances, 0))
        first += levels
    commitment = jnp.sum(jnp.concatenate(commitments)) / jnp.asarray(num_quantizers, jnp.float32)
    total = outputs["semantic"] + outputs["acoustic"]
    return Quantized(total, outputs["semantic"], jnp.concatenate(codes, axis=1), commitment, assigned)


def _quantize_levels(
    embeddings: jax.Array, x: jax.Array, used: jax.Array, key: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, Assigned]:
    """Quantize projected latents [batch, frames, codebook_dim] level by level.

    Args:
        embeddings: [levels, codebook_size, codebook_dim].
        used: bool [levels]; levels that are not in use add nothing and subtract nothing.

    Returns:
        The sum of the chosen vectors, the codes [batch, levels, frames], the mean squared distance of each
        level, and what was assigned.
    """
    _, size, dim = embeddings.shape

    def step(carry: tuple[jax.Array, jax.Array], level: tuple[jax.Array, ...]):
        residual, total = carry
        embedding, is_used, key = level
        vectors = lax.stop_gradient(residual)
        codes = plain_search(vectors, embedding, jnp.sum(embedding**2, axis=-1) / 2)
        quantized = embedding[codes]
        distance = jnp.mean((residual - quantized) ** 2)
        flat, flat_codes = vectors.reshape(-1, dim), codes.ravel()
        assigned = Assigned(
            jnp.zeros(size).at[flat_codes].add(1.0),
            jnp.zeros((size, dim)).at[flat_codes].add(flat),
            flat[jax.random.randint(key, (size,), 0, len(flat))],
        )
        quantized = jnp.where(is_used, quantized, 0)
        return (residual - quantized, total + quantized), (codes, distance, assigned)

    levels = lax.stop_gradient(embeddings), used, jax.random.split(key, len(embeddings))
    (_, total), (codes, distances, assigned) = lax.scan(step, (x, jnp.zeros_like(x)), levels)
    return total, jnp.moveaxis(codes, 0, 1), distances, assigned


def update(
    codebooks: dict[str, Codebooks],
    assigned: dict[str, Assigned],
    num_quantizers: jax.Array | int,
    step: jax.Array,
) -> dict[str, Codebooks]:
    """The codebooks after a batch, with dead codes replaced. Levels that were not in use do not change."""
    new, first = {}, 0
    for name in PARTS:  # the order of levels; `jit` changes the order of a dict's keys
        old, (counts, sums, candidates) = codebooks[name], assigned[name]
        levels = len(old.usage)
        used = (first + jnp.arange(levels) < num_quantizers)[:, None]
        first += levels
        usage = jnp.where(used, DECAY * old.usage + (1 - DECAY) * counts, old.usage)
        sums = jnp.where(used[..., None], DECAY * old.sums + (1 - DECAY) * sums, old.sums)
        mean = jnp.mean(usage, axis=1, keepdims=True)
        dead = used & (usage < DEAD * mean) & (step % CHECK_EVERY == 0)
        usage = jnp.where(dead, mean, usage)
        sums = jnp.where(dead[..., None], candidates * mean[..., None], sums)
        new[name] = Codebooks(usage, sums)
    return new


def perplexity(usage: jax.Array) -> jax.Array:
    """The effective number of codes in use, exp of the entropy: [..., codebook_size] -> [...]."""
    shares = usage / jnp.sum(usage, axis=-1, keepdims=True)
    return jnp.exp(-jnp.sum(shares * jnp.log(jnp.maximum(shares, 1e-12)), axis=-1))


def fit(
    quantizer: SplitResidualQuantizer, latents: jax.Array, key: jax.Array, vectors_per_step: int
) -> dict[str, Codebooks]:
    """Fit codebooks by k-means, each level to what the levels before it left.

    Args:
        quantizer: gives the projections and the sizes.
        latents: float32 [vectors, hidden_size]; at least `codebook_size` vectors, better twenty times more.
        key: for the random start.
        vectors_per_step: how many latents a training step sees. The running means start as if they had seen
            one step.

    Raises:
        ValueError: there are fewer latents than codes.
    """
    size = quantizer.semantic.cluster_usage.shape[1]
    if len(latents) < size:
        raise ValueError(
            f"k-means needs at least codebook_size={size} latents, got {len(latents)}; use more audio"
        )
    scale = vectors_per_step / len(latents)
    fitted = {}
    for name in PARTS:
        part: ResidualQuantizer = getattr(quantizer, name)
        residual = latents if part.input_proj is None else part.input_proj(latents)
        usages, sums = [], []
        for _ in range(len(part.cluster_usage)):
            key, level_key = jax.random.split(key)
            centres, counts, residual = _kmeans(residual, size, level_key)
            usages.append(counts * scale)
            sums.append(centres * usages[-1][:, None])
        fitted[name] = Codebooks(jnp.stack(usages), jnp.stack(sums))
    return fitted


@jax.jit(static_argnames="size")
def _kmeans(vectors: jax.Array, size: int, key: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """k-means on vectors [vectors, dim].

    Returns:
        The centres [size, dim], how many vectors each has (at least 1), and the residual of each vector.
    """

    def assign(centres: jax.Array) -> jax.Array:
        return plain_search(vectors, centres, jnp.sum(centres**2, axis=1) / 2)

    def step(i: jax.Array, centres: jax.Array) -> jax.Array:
        codes = assign(centres)
        counts = jnp.zeros(size).at[codes].add(1.0)
        means = jnp.zeros_like(centres).at[codes].add(vectors) / jnp.maximum(counts, 1)[:, None]
        others = jax.random.choice(jax.random.fold_in(key, i + 1), vectors, (size,))
        return jnp.where(counts[:, None] > 0, means, others)

    first = jax.random.choice(jax.random.fold_in(key, 0), vectors, (size,), replace=False)
    centres = lax.fori_loop(0, KMEANS_ITERATIONS, step, first)
    codes = assign(centres)
    counts = jnp.maximum(jnp.zeros(size).at[codes].add(1.0), 1)
    return centres, counts, vectors - centres[codes]
