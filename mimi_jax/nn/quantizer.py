"""Split residual vector quantization (reference: `MimiSplitResidualVectorQuantizer`).

Two quantizers see the same latents. The first codebook of the semantic one was trained to follow a speech
model (Moshi, arXiv 2410.00037, section 3.3.2). The other quantizer is the acoustic one. Their outputs are
added.

Everything here is float32 with exact products, whatever the dtype and the precision of the model. In
bfloat16, codes would change with the shape of the batch alone.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, Integer

from mimi_jax.config import MimiConfig, as_integer
from mimi_jax.nn.module import Module
from mimi_jax.ops import policy

EPSILON = 1e-5  # sums of embeddings are divided by no smaller usage, as in the references


class CodebookStatistic(nnx.Variable):
    """What the training of a codebook adds up. No gradient reaches it."""


class Codebook(nnx.Variable):
    """What is computed from the statistics once, and read by every call."""


class ResidualQuantizer(Module):
    """Codebooks one after the other. Each quantizes the difference that the ones before it left.

    Checkpoints hold `embedding_sum` and `cluster_usage`. The embedding is their ratio; call `derive` to
    compute it again after they change.
    """

    def __init__(self, config: MimiConfig, num_levels: int, *, rngs: nnx.Rngs):
        size, dim, features = config.codebook_size, config.codebook_dim, config.hidden_size
        projects = dim != features
        linear = functools.partial(nnx.Linear, use_bias=False, dot_general=policy.projection, rngs=rngs)
        self.input_proj = linear(features, dim) if projects else None
        self.output_proj = linear(dim, features) if projects else None
        self.initialized = CodebookStatistic(jnp.ones(num_levels, jnp.float32))
        self.cluster_usage = CodebookStatistic(jnp.ones((num_levels, size), jnp.float32))
        shape = num_levels, size, dim
        self.embedding_sum = CodebookStatistic(jax.random.normal(rngs.params(), shape, jnp.float32))
        self.embedding = Codebook(jnp.zeros(shape, jnp.float32))
        self.half_square = Codebook(jnp.zeros((num_levels, size), jnp.float32))
        self.derive()

    def derive(self) -> None:
        """Compute the embeddings and half their squared norms from the statistics."""
        usage = jnp.maximum(self.cluster_usage[...], EPSILON)
        embedding = self.embedding_sum[...] / usage[..., None]
        self.embedding.set_value(embedding)
        self.half_square.set_value(jnp.sum(embedding**2, axis=-1) / 2)

    def encode(
        self, latents: Float[Array, "batch frames hidden"], num_levels: int
    ) -> Int[Array, "batch levels frames"]:
        """Find the codes of the first levels."""
        x = latents.astype(jnp.float32)
        residual = x if self.input_proj is None else self.input_proj(x)

        # Codebooks are looked up by number. A slice of the first ones would be copied in every call.
        def step(residual, level):
            embedding = self.embedding[level]
            codes = policy.search(residual, embedding, self.half_square[level])
            return residual - embedding[codes], codes

        return jnp.moveaxis(policy.scan(step, residual, np.arange(num_levels, dtype=np.int32))[1], 0, 1)

    def decode(self, codes: Integer[Array, "batch levels frames"]) -> Float[Array, "batch frames hidden"]:
        """Add up the embeddings of the codes."""
        batch, num_levels, frames = codes.shape
        _, size, dim = self.embedding.shape

        def step(total, level):
            number, codes = level
            # A compiled function cannot raise, so an invalid code gives NaN rather than a wrong sound.
            codes = jnp.where(codes < 0, size, codes)
            return total + self.embedding[...].at[number, codes].get(mode="fill", fill_value=jnp.nan), None

        levels = np.arange(num_levels, dtype=np.int32), jnp.moveaxis(codes, 1, 0).astype(jnp.int32)
        # It is made of the codes, so that inside `shard_map` it differs between the devices as they do.
        zero = jnp.zeros_like(codes[:, 0, :, None], jnp.float32)
        total, _ = policy.scan(step, jnp.broadcast_to(zero, (batch, frames, dim)), levels)
        return total if self.output_proj is None else self.output_proj(total)


class SplitResidualQuantizer(Module):
    """The semantic and the acoustic quantizer side by side. Semantic codes come first."""

    def __init__(self, config: MimiConfig, *, rngs: nnx.Rngs):
        self.num_quantizers, self.num_semantic = config.num_quantizers, config.num_semantic_quantizers
        self.semantic = ResidualQuantizer(config, self.num_semantic, rngs=rngs)
        self.acoustic = ResidualQuantizer(config, self.num_quantizers - self.num_semantic, rngs=rngs)

    def derive(self) -> None:
        self.semantic.derive()
        self.acoustic.derive()

    def resolve_count(self, num_quantizers: object) -> int:
        """The number of codebooks to use, the first ones; None means all of them.

        Raises:
            ValueError: these are fewer than the semantic codebooks, or more than there are.
        """
        if num_quantizers is None:
            return self.num_quantizers
        count = as_integer(num_quantizers)
        if count is None or not self.num_semantic <= count <= self.num_quantizers:
            raise ValueError(
                f"num_quantizers must be an integer from {self.num_semantic} to {self.num_quantizers},"
                f" the codebooks of this model (axis 1 of codes), got {num_quantizers!r}"
            )
        return count

    def encode(
        self, latents: Float[Array, "batch frames hidden"], num_quantizers: int | None = None
    ) -> Int[Array, "batch codebooks frames"]:
        """Quantize latents. `num_quantizers` is as for `resolve_count`."""
        num_acoustic = self.resolve_count(num_quantizers) - self.num_semantic
        with jax.default_matmul_precision("highest"):
            codes = self.semantic.encode(latents, self.num_semantic)
            if num_acoustic == 0:
                return codes
            return jnp.concatenate([codes, self.acoustic.encode(latents, num_acoustic)], axis=1)

    def decode(self, codes: Integer[Array, "batch codebooks frames"]) -> Float[Array, "batch frames hidden"]:
        """The latents of codes of all codebooks, or of the first ones."""
        self.resolve_count(codes.shape[1])
        with jax.default_matmul_precision("highest"):
            latents = self.semantic.decode(codes[:, : self.num_semantic])
            if codes.shape[1] == self.num_semantic:
                return latents
            return latents + self.acoustic.decode(codes[:, self.num_semantic :])
