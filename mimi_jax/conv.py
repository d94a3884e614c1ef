"""Streaming convolutions, channels last (reference: `MimiConv1d`, `MimiConvTranspose1d`).

With `causal=False` they look ahead: then only the call on a whole clip means anything, and `Mimi`
refuses to stream.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.typing import DTypeLike

from mimi_jax.streaming import StreamingLayer, ceil_div, fill_beyond


def conv1d(x: jax.Array, kernel: jax.Array, *, stride: int = 1, dilation: int = 1) -> jax.Array:
    """Unpadded convolution of x [batch, time, in] with kernel [taps, in, out]."""
    return lax.conv_general_dilated(
        x, kernel, (stride,), "VALID", rhs_dilation=(dilation,), dimension_numbers=("NWC", "WIO", "NWC")
    )


class ConvState(NamedTuple):
    past: jax.Array | None  # [batch, context, in_channels], the inputs that the next step still needs
    started: jax.Array | None  # bool [batch], whether `past` is real; None where it starts as zeros


class Conv1d(StreamingLayer):
    """Strided, dilated 1-D convolution: [batch, time, in] -> [batch, time / stride, out].

    Each output sees the inputs up to the end of its own stride. What lies before the clip is zero, or
    with `pad_mode="replicate"` its first value; the missing end of the last stride likewise.
    `activation`, if any, is applied to the inputs first.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        stride: int = 1,
        dilation: int = 1,
        activation: Callable[[jax.Array], jax.Array] | None = None,
        pad_mode: str = "constant",
        causal: bool = True,
        use_bias: bool = True,
        rngs: nnx.Rngs,
    ):
        padding = (kernel_size - 1) * dilation + 1 - stride
        if padding < 0:
            raise ValueError(f"kernel_size={kernel_size} must cover stride={stride}, or inputs are lost")
        self.in_channels, self.stride, self.dilation = in_channels, stride, dilation
        self.activation, self.pad_mode = activation, pad_mode
        self.lookahead = 0 if causal else padding // 2
        self.context = padding - self.lookahead
        shape = (kernel_size, in_channels, out_channels)
        self.kernel = nnx.Param(jax.nn.initializers.he_normal()(rngs.params(), shape))
        bound = 1 / math.sqrt(in_channels * kernel_size)
        bias = jax.random.uniform(rngs.params(), (out_channels,), minval=-bound, maxval=bound)
        self.bias = nnx.Param(bias) if use_bias else None

    def init_state(self, batch_size: int, dtype: DTypeLike = jnp.float32) -> ConvState:
        if self.context == 0:
            return ConvState(None, None)
        past = jnp.zeros((batch_size, self.context, self.in_channels), dtype)
        return ConvState(past, jnp.zeros(batch_size, bool) if self.pad_mode == "replicate" else None)

    def step(
        self, state: ConvState | None, x: jax.Array, lengths: jax.Array | None = None
    ) -> tuple[ConvState, jax.Array]:
        if x.shape[1] % self.stride:
            raise ValueError(f"time must be a multiple of stride={self.stride}, got {x.shape[1]}; pad it")
        past, started = state or self.init_state(x.shape[0], x.dtype)
        if self.activation is not None:
            x = self.activation(x)
        # Without stride or lookahead no real output sees anything beyond the end: save the pass.
        if self.stride > 1 or self.lookahead:
            x = fill_beyond(x, lengths, self.pad_mode)
        if past is not None and started is not None:
            past = jnp.where(started[:, None, None], past, x[:, :1])
            started = jnp.ones_like(started)
        if past is not None:
            x = jnp.concatenate([past, x], axis=1)
            past = x[:, -self.context :]
        if self.lookahead:
            mode = "edge" if self.pad_mode == "replicate" else "constant"
            x = jnp.pad(x, ((0, 0), (0, self.lookahead), (0, 0)), mode=mode)
        y = conv1d(x, self.kernel[...], stride=self.stride, dilation=self.dilation)
        return ConvState(past, started), y if self.bias is None else y + self.bias[...]

    def output_lengths(self, lengths: jax.Array | None) -> jax.Array | None:
        return None if lengths is None else ceil_div(lengths, self.stride)


class ConvTransposeState(NamedTuple):
    tail: jax.Array  # [batch, stride, out_channels], what the last input adds to the next outputs


class ConvTranspose1d(StreamingLayer):
    """Transposed convolution with a kernel of two strides: [batch, time, in] -> [batch, time * stride, out].

    An input reaches its own `stride` outputs and the next `stride`: one matrix product gives both, and
    the second half is added one block later. The reference drops the block after the last input; a
    stream keeps it as the tail that the next step starts with. `activation` is applied to the inputs.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int,
        *,
        groups: int = 1,
        activation: Callable[[jax.Array], jax.Array] | None = None,
        causal: bool = True,
        trim_right_ratio: float = 1.0,
        use_bias: bool = True,
        rngs: nnx.Rngs,
    ):
        self.stride, self.groups, self.out_channels = stride, groups, out_channels
        self.activation = activation
        trim_right = math.ceil(stride * trim_right_ratio) if causal else stride // 2
        self.lookahead = stride - trim_right  # outputs trimmed on the left
        # In this order of axes the matrix product reads the kernel as it lies in memory.
        shape = (groups, in_channels // groups, 2 * stride, out_channels // groups)
        fan = 2 * stride * out_channels // groups
        self.kernel = nnx.Param(math.sqrt(2 / fan) * jax.random.normal(rngs.params(), shape))
        bound = 1 / math.sqrt(fan)
        bias = jax.random.uniform(rngs.params(), (out_channels,), minval=-bound, maxval=bound)
        self.bias = nnx.Param(bias) if use_bias else None

    def init_state(self, batch_size: int, dtype: DTypeLike = jnp.float32) -> ConvTransposeState:
        return ConvTransposeState(jnp.zeros((batch_size, self.stride, self.out_channels), dtype))

    def step(
        self, state: ConvTransposeState | None, x: jax.Array, lengths: jax.Array | None = None
    ) -> tuple[ConvTransposeState, jax.Array]:
        if self.activation is not None:
            x = self.activation(x)
        if self.lookahead:  # otherwise what lies beyond a row's end only reaches outputs beyond it
            x = fill_beyond(x, lengths, "constant")
        batch, time, channels = x.shape
        x = x.reshape(batch, time, self.groups, channels // self.groups)
        y = jnp.einsum("btgi,giko->btkgo", x, self.kernel[...])
        y = y.reshape(batch, time, 2, self.stride, self.out_channels)
        own, following = y[:, :, 0], y[:, :, 1]
        (before,) = state or self.init_state(batch, x.dtype)
        following = jnp.concatenate([before[:, None], following], axis=1)
        tail = following[:, -1]
        y = (own + following[:, :-1]).reshape(batch, time * self.stride, self.out_channels)
        if self.lookahead:
            y = jnp.concatenate([y, tail], axis=1)[:, self.lookahead :][:, : y.shape[1]]
        return ConvTransposeState(tail), y if self.bias is None else y + self.bias[...]

    def output_lengths(self, lengths: jax.Array | None) -> jax.Array | None:
        return None if lengths is None else lengths * self.stride
