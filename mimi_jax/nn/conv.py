"""Streaming convolutions, channels last (reference: `MimiConv1d`, `MimiConvTranspose1d`).

With `causal=False` they look ahead. Then only the call on a whole clip is meaningful, and `Mimi` refuses to
stream.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from mimi_jax.config import ceil_div
from mimi_jax.nn.streaming import Lengths, StreamingLayer, fill_beyond, keep_idle_rows
from mimi_jax.ops import policy

Activation = Callable[[jax.Array], jax.Array]


def _follow(
    past: Float[Array, "batch past in"] | None,
    x: Float[Array, "batch time in"],
    activation: Activation | None,
) -> tuple[Float[Array, "batch past_and_time in"], Any]:
    """Put the past before the inputs of a step.

    The past is stored before its activation. If it were cut out of the activated inputs, XLA would compute
    the activation in a pass of its own.

    Returns:
        The activated inputs, the past first, and the past of the next step.
    """
    activate = activation or (lambda x: x)
    if past is None:
        return activate(x), None
    next_past = jnp.concatenate([past, x], axis=1)[:, -past.shape[1] :]
    return policy.join(activate(past), activate(x)), next_past


class ConvState(NamedTuple):
    past: Float[Array, "batch context in"] | None  # the inputs that the next step still needs
    # 1 once `past` holds real inputs, else 0. None if a fresh past stands for zeros.
    started: Int[Array, " batch"] | None


class Conv1d(StreamingLayer):
    """Strided, dilated 1-D convolution: [batch, time, in] -> [batch, time / stride, out].

    Each output sees the inputs up to the end of its own stride. Before the clip, inputs are zero, or its
    first value with `pad_mode="replicate"`. If the clip ends inside a stride, zeros or its last value fill
    the rest of the stride. An `activation` is applied to the inputs first.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        stride: int = 1,
        dilation: int = 1,
        activation: Activation | None = None,
        pad_mode: str = "constant",
        causal: bool = True,
        use_bias: bool = True,
        rngs: nnx.Rngs,
    ):
        padding = (kernel_size - 1) * dilation + 1 - stride
        if padding < 0:
            raise ValueError(f"{kernel_size=} must be at least {stride=}, or the convolution skips inputs")
        self.in_channels, self.stride, self.dilation = in_channels, stride, dilation
        self.activation, self.pad_mode = activation, pad_mode
        self.lookahead = 0 if causal else padding // 2
        self.context = padding - self.lookahead
        shape = (kernel_size, in_channels, out_channels)
        self.kernel = nnx.Param(jax.nn.initializers.he_normal()(rngs.params(), shape, jnp.float32))
        bound = 1 / math.sqrt(in_channels * kernel_size)
        bias = jax.random.uniform(rngs.params(), (out_channels,), jnp.float32, -bound, bound)
        self.bias = nnx.Param(bias) if use_bias else None

    def init_state(self, batch_size: int, dtype: DTypeLike = jnp.float32) -> ConvState:
        if self.context == 0:
            return ConvState(None, None)
        past = jnp.zeros((batch_size, self.context, self.in_channels), dtype)
        return ConvState(past, jnp.zeros(batch_size, jnp.int32) if self.pad_mode == "replicate" else None)

    def step(
        self, state: ConvState | None, x: Float[Array, "batch time in"], lengths: Lengths = None
    ) -> tuple[ConvState, Float[Array, "batch strides out"]]:
        if x.shape[1] % self.stride:
            raise ValueError(f"time must be a multiple of stride={self.stride}, got {x.shape[1]}; pad it")
        state = state or self.init_state(x.shape[0], x.dtype)
        past, started = state
        # Without stride or lookahead no real output sees anything beyond the end. Filling costs a pass.
        if self.stride > 1 or self.lookahead:
            x = fill_beyond(x, lengths, self.pad_mode)
        if past is not None and started is not None:
            past = jnp.where(started[:, None, None] > 0, past, x[:, :1])
            started = jnp.maximum(started, 1)  # not ones: a constant would lose the sharding of the state
        x, past = _follow(past, x, self.activation)
        if self.lookahead:
            mode = "edge" if self.pad_mode == "replicate" else "constant"
            x = jnp.pad(x, ((0, 0), (0, self.lookahead), (0, 0)), mode=mode)
        return keep_idle_rows(lengths, ConvState(past, started), state), self.convolve(x)

    def convolve(self, x: Float[Array, "batch past_and_time in"]) -> Float[Array, "batch strides out"]:
        """The convolution alone, of activated inputs with their past before them."""
        y = policy.convolution(x, self.kernel[...], stride=self.stride, dilation=self.dilation)
        return y if self.bias is None else y + self.bias[None, None]

    def output_lengths(self, lengths: Lengths) -> Lengths:
        return None if lengths is None else ceil_div(lengths, self.stride)


class ConvTransposeState(NamedTuple):
    past: Float[Array, "batch 1 in"]  # the last input, which still reaches the next outputs


class ConvTranspose1d(StreamingLayer):
    """Transposed convolution with a kernel of two strides: [batch, time, in] -> [batch, time * stride, out].

    An input reaches its own `stride` outputs and the next `stride` outputs. So each `stride` outputs are a
    product of two inputs: their own one and the one before it. That is a plain convolution with two taps.
    The reference drops the outputs after those of the last input. In a stream they come with the next input.
    An `activation` is applied to the inputs first.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int,
        *,
        groups: int = 1,
        activation: Activation | None = None,
        causal: bool = True,
        trim_right_ratio: float = 1.0,
        use_bias: bool = True,
        rngs: nnx.Rngs,
    ):
        self.in_channels, self.out_channels = in_channels, out_channels
        self.stride, self.groups, self.activation = stride, groups, activation
        trim_right = math.ceil(stride * trim_right_ratio) if causal else stride // 2
        self.lookahead = stride - trim_right  # outputs trimmed on the left
        shape = (2, groups, in_channels // groups, stride, out_channels // groups)
        fan = 2 * stride * out_channels // groups
        self.kernel = nnx.Param(math.sqrt(2 / fan) * jax.random.normal(rngs.params(), shape, jnp.float32))
        bound = 1 / math.sqrt(fan)
        bias = jax.random.uniform(rngs.params(), (out_channels,), jnp.float32, -bound, bound)
        self.bias = nnx.Param(bias) if use_bias else None

    def init_state(self, batch_size: int, dtype: DTypeLike = jnp.float32) -> ConvTransposeState:
        return ConvTransposeState(jnp.zeros((batch_size, 1, self.in_channels), dtype))

    def step(
        self, state: ConvTransposeState | None, x: Float[Array, "batch time in"], lengths: Lengths = None
    ) -> tuple[ConvTransposeState, Float[Array, "batch time_out out"]]:
        batch, time, _ = x.shape
        state, y = self.step_strides(state, x, lengths)
        y = y.reshape(batch, y.shape[1] * self.stride, self.out_channels)
        return state, y[:, self.lookahead : self.lookahead + time * self.stride]

    def step_strides(
        self, state: ConvTransposeState | None, x: Float[Array, "batch time in"], lengths: Lengths = None
    ) -> tuple[ConvTransposeState, Float[Array, "batch strides stride_and_out"]]:
        """`step`, but the outputs of each stride lie side by side. With lookahead there is a stride more."""
        state = state or self.init_state(x.shape[0], x.dtype)
        if self.lookahead:  # otherwise no real output sees anything beyond the end
            x = fill_beyond(x, lengths, "constant")
        x, past = _follow(state.past, x, self.activation)
        state = keep_idle_rows(lengths, ConvTransposeState(past), state)
        if self.lookahead:
            x = jnp.pad(x, ((0, 0), (0, 1), (0, 0)))
        # The bias is added before strides become time: after that XLA:GPU would write it out as large as y.
        y = self._strides(x)
        y = y.reshape(*y.shape[:2], self.stride * self.out_channels)
        return state, y if self.bias is None else y + jnp.tile(self.bias[None, None], self.stride)

    def _strides(self, x: jax.Array) -> jax.Array:
        """The outputs of each two neighbouring inputs: [batch, 1 + time, in] -> [batch, time, ...]."""
        kernel, groups = self.kernel[...], self.groups
        if groups == 1:
            return policy.convolution(x, kernel.reshape(2, self.in_channels, self.stride * self.out_channels))
        # A depthwise kernel is a few multiply-adds. XLA's grouped convolutions are slow at them.
        x = x.reshape(*x.shape[:2], groups, self.in_channels // groups)
        before = jnp.einsum("btgi,giso->btsgo", x[:, :-1], kernel[0])
        return before + jnp.einsum("btgi,giso->btsgo", x[:, 1:], kernel[1])

    def output_lengths(self, lengths: Lengths) -> Lengths:
        return None if lengths is None else lengths * self.stride
