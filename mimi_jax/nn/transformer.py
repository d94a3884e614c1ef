"""The Transformers on either side of the quantizer (reference: `MimiTransformerModel`)."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from mimi_jax.config import MimiConfig
from mimi_jax.nn.attention import Attention, AttentionState
from mimi_jax.nn.streaming import Chain, Lengths, StreamingLayer
from mimi_jax.nn.transformer_step import step_few_rows
from mimi_jax.ops import policy

ACTIVATIONS = {
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_new": jax.nn.gelu,
    "gelu_pytorch_tanh": jax.nn.gelu,
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
}


def _normalize(norm: nnx.LayerNorm, x: jax.Array) -> jax.Array:
    # For statistics Flax promotes to float32, which `jax_numpy_dtype_promotion="strict"` refuses.
    with jax.numpy_dtype_promotion("standard"):
        return norm(x)


Steps: TypeAlias = Float[Array, "batch time features"]


class TransformerLayer(StreamingLayer):
    """Attention and an MLP, each after a norm. LayerScale (arXiv 2103.17239) scales the channels of both."""

    def __init__(self, config: MimiConfig, *, rngs: nnx.Rngs):
        features, hidden = config.hidden_size, config.intermediate_size
        assert config.head_dim is not None
        norm = functools.partial(nnx.LayerNorm, features, epsilon=config.norm_eps, use_fast_variance=False)
        self.attention_norm = norm(rngs=rngs)
        self.attention = Attention(
            features,
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
            config.sliding_window,
            rope_theta=config.rope_theta,
            use_bias=config.attention_bias,
            rngs=rngs,
        )
        self.attention_scale = nnx.Param(jnp.full(features, config.layer_scale_initial_scale, jnp.float32))
        self.mlp_norm = norm(rngs=rngs)
        linear = functools.partial(nnx.Linear, use_bias=False, dot_general=policy.product, rngs=rngs)
        self.mlp_in, self.mlp_out = linear(features, hidden), linear(hidden, features)
        self.mlp_scale = nnx.Param(jnp.full(features, config.layer_scale_initial_scale, jnp.float32))
        self.hidden_act = config.hidden_act

    def init_state(self, batch_size: int, dtype: DTypeLike = jnp.float32) -> AttentionState:
        return self.attention.init_state(batch_size, dtype)

    def step(self, state: Any, x: Steps, lengths: Lengths = None) -> tuple[Any, Steps]:
        return self.step_by(lambda x: self.attention.step(state, x, lengths), self.mlp_in, x)

    def step_by(self, attend: Callable, mlp_in: Callable, x: Steps) -> tuple[Any, Steps]:
        """`step`, with other ways to compute what follows the norms."""
        state, y = attend(_normalize(self.attention_norm, x))
        x = x + self.attention_scale[None, None] * y
        y = self.mlp_out(ACTIVATIONS[self.hidden_act](mlp_in(_normalize(self.mlp_norm, x))))
        return state, x + self.mlp_scale[None, None] * y


class Transformer(Chain):
    """A stack of layers: [batch, steps, hidden_size] -> the same. No norm follows the last layer."""

    operation = "transformer"

    def __init__(self, config: MimiConfig, *, rngs: nnx.Rngs):
        self.blocks = nnx.List(TransformerLayer(config, rngs=rngs) for _ in range(config.num_hidden_layers))

    def layers(self) -> Sequence[StreamingLayer]:
        return self.blocks

    def init_state(self, batch_size: int, dtype: DTypeLike = jnp.float32) -> tuple:
        """The states of the layers. The first one holds the position of all of them."""
        return _hold_once(super().init_state(batch_size, dtype))

    def step_layers(self, state: tuple | None, x: Steps, lengths: Lengths = None) -> tuple[tuple, Steps]:
        if state is None:
            return super().step_layers(None, x, lengths)
        state = tuple(layer._replace(position=state[0].position) for layer in state)
        state, x = super().step_layers(state, x, lengths)
        return _hold_once(state), x

    def step_few_rows(self, state: tuple, x: Steps, lengths: Lengths = None) -> tuple[tuple, Steps]:
        """`step` in few device kernels of XLA:GPU."""
        if state[0].key.shape[1] < self.blocks[0].attention.num_key_value_heads:
            return self.step_layers(state, x, lengths)  # a ring for TPUs
        state, x = step_few_rows(self.blocks, state, x, lengths)
        return _hold_once(state), x


def _hold_once(state: tuple) -> tuple:
    """Leave the position out of all layers but the first."""
    return (*state[:1], *[layer._replace(position=None) for layer in state[1:]])
