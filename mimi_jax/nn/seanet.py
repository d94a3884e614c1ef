"""The convolutional encoder and decoder (SEANet; references: `MimiEncoder`, `MimiDecoder`)."""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from flax import nnx
from jax import lax

from mimi_jax.config import MimiConfig
from mimi_jax.nn.conv import Conv1d, ConvTranspose1d
from mimi_jax.nn.streaming import Chain, StreamingLayer, step_all, step_in_pieces
from mimi_jax.ops.kernels import elu

# A CPU is bound by memory here. So all layers go over pieces of time whose buffers the system need not find
# anew for each, and the layers next to the waveform, the widest, one after the other over what fits in cache.
BUFFER_BYTES = 25_000_000
CACHE_BYTES = 2_500_000
GPU_PIECE_BYTES = 2**31  # cuDNN took no more than 2**31 elements before 9.3, and not always since


def _conv(config: MimiConfig, *sizes: int, rngs: nnx.Rngs, **kwargs) -> Conv1d:
    """A convolution as this configuration pads all of them."""
    return Conv1d(*sizes, pad_mode=config.pad_mode, causal=config.use_causal_conv, rngs=rngs, **kwargs)


class ResidualBlock(Chain):
    """Two activated convolutions around a bottleneck, added to the input or to a 1x1 convolution of it."""

    def __init__(self, config: MimiConfig, channels: int, dilation: int, *, rngs: nnx.Rngs):
        conv = functools.partial(_conv, config, rngs=rngs)
        hidden, kernel_size = channels // config.compress, config.residual_kernel_size
        self.conv1 = conv(channels, hidden, kernel_size, dilation=dilation, activation=elu)
        self.conv2 = conv(hidden, channels, 1, activation=elu)
        self.shortcut = conv(channels, channels, 1) if config.use_conv_shortcut else None

    def layers(self) -> Sequence[StreamingLayer]:
        return self.conv1, self.conv2

    def step(
        self, state: tuple | None, x: jax.Array, lengths: jax.Array | None = None
    ) -> tuple[tuple, jax.Array]:
        state, y = super().step(state, x, lengths)
        # A 1x1 convolution has no past, so the shortcut needs no state.
        return state, y + (x if self.shortcut is None else self.shortcut(x))


def _residual_blocks(config: MimiConfig, channels: int, rngs: nnx.Rngs) -> nnx.List[ResidualBlock]:
    dilations = [config.dilation_growth_rate**i for i in range(config.num_residual_layers)]
    return nnx.List(ResidualBlock(config, channels, dilation, rngs=rngs) for dilation in dilations)


class EncoderStage(Chain):
    """Residual blocks, then `ratio` times fewer steps of twice as many channels."""

    def __init__(self, config: MimiConfig, channels: int, ratio: int, *, rngs: nnx.Rngs):
        self.blocks = _residual_blocks(config, channels, rngs)
        self.downsample = _conv(
            config, channels, 2 * channels, 2 * ratio, stride=ratio, activation=elu, rngs=rngs
        )

    def layers(self) -> Sequence[StreamingLayer]:
        return *self.blocks, self.downsample


class Group(NamedTuple):
    """Neighbouring layers of a network."""

    layers: Sequence[StreamingLayer]
    hop: int  # steps of their input for one of the latents
    max_bytes: int  # of the widest activations on their way, on a CPU


class Network(Chain):
    """Either half: stages, and a convolution before and after them."""

    def __init__(self, config: MimiConfig):
        self.config, self.hop = config, math.prod(config.upsampling_ratios)

    def groups(self) -> Sequence[Group]:
        raise NotImplementedError

    def layers(self) -> Sequence[StreamingLayer]:
        return [layer for group in self.groups() for layer in group.layers]

    def step(
        self, state: tuple | None, x: jax.Array, lengths: jax.Array | None = None
    ) -> tuple[tuple, jax.Array]:
        if not self.config.is_streamable:
            return super().step(state, x, lengths)
        if state is None:
            state = self.init_state(x.shape[0], x.dtype)
        return _step(self, state, x, lengths)

    def step_in_pieces(
        self, min_bytes: int, state: tuple, x: jax.Array, lengths: jax.Array | None
    ) -> tuple[tuple, jax.Array]:
        """`step` as a CPU does it fastest, or in larger pieces, whose activations take `min_bytes`."""
        step_bytes = x.shape[0] * self.hop * self.config.num_filters * x.dtype.itemsize

        def size(max_bytes: int, hop: int) -> int:
            return max(max(max_bytes, min_bytes) // step_bytes, 1) * hop

        def step_groups(state: tuple, x: jax.Array, lengths: jax.Array | None) -> tuple[tuple, jax.Array]:
            new_state = ()
            for layers, hop, max_bytes in self.groups():
                step = functools.partial(step_all, layers)
                old, state = state[: len(layers)], state[len(layers) :]
                new, x = step_in_pieces(step, old, x, lengths, size(max_bytes, hop))
                new_state += new
                for layer in layers:
                    lengths = layer.output_lengths(lengths)
            return new_state, x

        return step_in_pieces(step_groups, state, x, lengths, size(BUFFER_BYTES, self.groups()[0].hop))


@jax.custom_jvp
def _step(network: Network, state: tuple, x: jax.Array, lengths: jax.Array | None) -> tuple[tuple, jax.Array]:
    in_cache, large = (functools.partial(network.step_in_pieces, size) for size in (0, GPU_PIECE_BYTES))
    whole = functools.partial(Chain.step, network)
    return lax.platform_dependent(state, x, lengths, cpu=in_cache, cuda=large, default=whole)


@_step.defjvp
def _step_whole(primals: tuple, tangents: tuple) -> tuple[Any, Any]:
    # A way back needs all activations, and pieces would copy all of them for each piece.
    return jax.jvp(Chain.step, primals, tangents)


class Encoder(Network):
    """Waveform [batch, samples, audio_channels] -> [batch, steps, hidden_size]."""

    def __init__(self, config: MimiConfig, *, rngs: nnx.Rngs):
        super().__init__(config)
        conv = functools.partial(_conv, config, rngs=rngs)
        channels, stages = config.num_filters, nnx.List([])
        self.first = conv(config.audio_channels, channels, config.kernel_size)
        for ratio in reversed(config.upsampling_ratios):
            stages.append(EncoderStage(config, channels, ratio, rngs=rngs))
            channels *= 2
        self.stages = stages
        self.last = conv(channels, config.hidden_size, config.last_kernel_size, activation=elu)

    def groups(self) -> Sequence[Group]:
        ratio = self.config.upsampling_ratios[-1]
        return (
            Group((self.first, *self.stages[:1]), self.hop, CACHE_BYTES),
            Group((*self.stages[1:], self.last), self.hop // ratio, BUFFER_BYTES),
        )


class DecoderStage(Chain):
    """`ratio` times more steps of half as many channels, then residual blocks."""

    def __init__(self, config: MimiConfig, channels: int, ratio: int, *, rngs: nnx.Rngs):
        self.upsample = ConvTranspose1d(
            channels,
            channels // 2,
            ratio,
            activation=elu,
            causal=config.use_causal_conv,
            trim_right_ratio=config.trim_right_ratio,
            rngs=rngs,
        )
        self.blocks = _residual_blocks(config, channels // 2, rngs)

    def layers(self) -> Sequence[StreamingLayer]:
        return self.upsample, *self.blocks


class Decoder(Network):
    """[batch, steps, hidden_size] -> waveform [batch, samples, audio_channels]."""

    def __init__(self, config: MimiConfig, *, rngs: nnx.Rngs):
        super().__init__(config)
        conv = functools.partial(_conv, config, rngs=rngs)
        channels, stages = config.num_filters * 2 ** len(config.upsampling_ratios), nnx.List([])
        self.first = conv(config.hidden_size, channels, config.kernel_size)
        for ratio in config.upsampling_ratios:
            stages.append(DecoderStage(config, channels, ratio, rngs=rngs))
            channels //= 2
        self.stages = stages
        self.last = conv(channels, config.audio_channels, config.last_kernel_size, activation=elu)

    def groups(self) -> Sequence[Group]:
        ratio = self.config.upsampling_ratios[-1]
        return (
            Group((self.first, *self.stages[:-1]), 1, BUFFER_BYTES),
            Group((*self.stages[-1:], self.last), self.hop // ratio, CACHE_BYTES),
        )
