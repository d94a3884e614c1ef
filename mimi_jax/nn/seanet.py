"""The convolutional encoder and decoder (SEANet; references: `MimiEncoder`, `MimiDecoder`)."""

import functools
import math
from collections.abc import Sequence
from typing import TypeAlias

from flax import nnx
from jaxtyping import Array, Float

from mimi_jax.config import MimiConfig
from mimi_jax.nn import few_passes, pallas_stages, polyphase
from mimi_jax.nn.conv import Conv1d, ConvTranspose1d
from mimi_jax.nn.streaming import Chain, Lengths, StreamingLayer
from mimi_jax.ops.parts import PieceBytes
from mimi_jax.ops.pieces import step_in_pieces
from mimi_jax.ops.policy import elu

StepResult: TypeAlias = tuple[tuple, Float[Array, "batch time_out out"]]


def _conv(config: MimiConfig, *sizes: int, rngs: nnx.Rngs, **kwargs) -> Conv1d:
    """A convolution with the padding of this configuration."""
    return Conv1d(*sizes, pad_mode=config.pad_mode, causal=config.use_causal_conv, rngs=rngs, **kwargs)


class ResidualBlock(Chain):
    """Two activated convolutions around a bottleneck, added to the input or to a 1x1 convolution of it."""

    operation = "residual_block"

    def __init__(self, config: MimiConfig, channels: int, dilation: int, *, rngs: nnx.Rngs):
        conv = functools.partial(_conv, config, rngs=rngs)
        hidden, kernel_size = channels // config.compress, config.residual_kernel_size
        self.conv1 = conv(channels, hidden, kernel_size, dilation=dilation, activation=elu)
        self.conv2 = conv(hidden, channels, 1, activation=elu)
        self.shortcut = conv(channels, channels, 1) if config.use_conv_shortcut else None

    def layers(self) -> Sequence[StreamingLayer]:
        return self.conv1, self.conv2

    def step_layers(
        self, state: tuple | None, x: Float[Array, "batch time in"], lengths: Lengths = None
    ) -> StepResult:
        state, y = super().step_layers(state, x, lengths)
        # The shortcut needs no state, since a 1x1 convolution has no past.
        return state, y + self.skip(x)

    def skip(self, x: Float[Array, "batch time in"]) -> Float[Array, "batch time in"]:
        return x if self.shortcut is None else self.shortcut(x)


def _residual_blocks(config: MimiConfig, channels: int, rngs: nnx.Rngs) -> nnx.List[ResidualBlock]:
    dilations = [config.dilation_growth_rate**i for i in range(config.num_residual_layers)]
    return nnx.List(ResidualBlock(config, channels, dilation, rngs=rngs) for dilation in dilations)


class Part(Chain):
    """Layers that TPUs compute with several positions a row if their channels are few."""

    step_in_rows, fits_in_rows, channels = polyphase.step, polyphase.fits, polyphase.channels


class EncoderStage(Part):
    """Residual blocks, then a convolution to `ratio` times fewer positions of twice as many channels."""

    operation = "encoder_stage"

    def __init__(self, config: MimiConfig, channels: int, ratio: int, *, rngs: nnx.Rngs):
        self.blocks = _residual_blocks(config, channels, rngs)
        self.downsample = _conv(
            config, channels, 2 * channels, 2 * ratio, stride=ratio, activation=elu, rngs=rngs
        )

    def layers(self) -> Sequence[StreamingLayer]:
        return *self.blocks, self.downsample


class Group(Part):
    """Neighbouring layers of a network, which go over pieces of time together."""

    is_wide = False  # whether it lies next to the waveform, where activations are largest

    def __init__(self, *layers: StreamingLayer, inputs_per_step: int):
        self.parts = nnx.data(layers)
        self.inputs_per_step = inputs_per_step  # positions of the input for each step of 25 Hz

    def layers(self) -> Sequence[StreamingLayer]:
        return self.parts


class Network(Chain):
    """Encoder or decoder: stages, and a convolution before and after them."""

    def __init__(self, config: MimiConfig):
        self.config, self.samples_per_step = config, math.prod(config.upsampling_ratios)
        # A network that looks ahead has no state, so it cannot go over pieces.
        self.operation = "network" if config.is_streamable else ""

    def groups(self) -> Sequence[Group]:
        """The layers in groups. They are made in each call, since stored ones would hold each layer twice."""
        raise NotImplementedError

    def layers(self) -> Sequence[StreamingLayer]:
        return [layer for group in self.groups() for layer in group.layers()]

    def step(
        self, state: tuple | None, x: Float[Array, "batch time in"], lengths: Lengths = None
    ) -> StepResult:
        if state is None and self.config.is_streamable:
            state = self.init_state(x.shape[0], x.dtype)
        return super().step(state, x, lengths)

    def step_in_pieces(
        self, limits: PieceBytes, state: tuple, x: Float[Array, "batch time in"], lengths: Lengths
    ) -> StepResult:
        """`step`, in pieces of time whose widest activations take no more than `limits`."""
        step_bytes = x.shape[0] * self.samples_per_step * self.config.num_filters * x.dtype.itemsize

        def sizes(max_bytes: int, inputs_per_step: int) -> dict[str, int]:
            # A frame stays whole, also in a large batch: to cut it costs more than it saves.
            steps = max(max_bytes // max(step_bytes, 1), self.config.frame_size // self.samples_per_step)
            return {"largest": steps * inputs_per_step, "unit": inputs_per_step}

        def step_groups(state: tuple, x: Float[Array, "batch time in"], lengths: Lengths) -> StepResult:
            new_state = ()
            for group in self.groups():
                max_bytes = limits.wide_layers if group.is_wide else limits.all_layers
                count = len(group.layers())
                old, state = state[:count], state[count:]
                limit = sizes(max_bytes, group.inputs_per_step)
                new, x = step_in_pieces(group.step, old, x, lengths, **limit)
                new_state += new
                lengths = group.output_lengths(lengths)
            return new_state, x

        first = self.groups()[0].inputs_per_step
        return step_in_pieces(step_groups, state, x, lengths, **sizes(limits.all_layers, first))


class End(Group):
    """The layer next to the waveform and the stage next to it. TPUs compute them in one device kernel."""

    is_wide = True
    step_in_pallas, fits_in_pallas = pallas_stages.step, pallas_stages.fits


class EncoderFront(End):
    """The first convolution and the stage after it."""

    operation = "encoder_front"

    def step_in_few_passes(
        self, state: tuple, x: Float[Array, "batch time in"], lengths: Lengths
    ) -> StepResult:
        """`step`, written so that XLA:GPU moves fewer activations through memory."""
        return few_passes.step_encoder_front(self.layers(), state, x, lengths)


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
        front, *stages = self.stages
        samples = self.samples_per_step
        return (
            EncoderFront(self.first, front, inputs_per_step=samples),
            Group(*stages, self.last, inputs_per_step=samples // ratio),
        )


class DecoderStage(Part):
    """A convolution to `ratio` times more positions of half as many channels, then residual blocks."""

    operation = "decoder_stage"

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


class DecoderBack(End):
    """The last stage and the convolution after it."""

    operation = "decoder_back"

    def step_in_few_passes(
        self, state: tuple, x: Float[Array, "batch time in"], lengths: Lengths
    ) -> StepResult:
        """`step`, written so that XLA:GPU moves fewer activations through memory."""
        return few_passes.step_decoder_back(self.layers(), state, x, lengths)


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
        *stages, back = self.stages
        inputs = self.samples_per_step // ratio
        return (
            Group(self.first, *stages, inputs_per_step=1),
            DecoderBack(back, self.last, inputs_per_step=inputs),
        )
