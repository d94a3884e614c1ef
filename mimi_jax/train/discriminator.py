"""The multi-scale STFT discriminator (EnCodec, arXiv 2210.13438, section 3.4).

Sizes, strides and slopes are those of audiocraft's `MultiScaleSTFTDiscriminator` in the configuration of
its default solver.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from mimi_jax.quality.spectrum import stft
from mimi_jax.train.phases import conv_general_dilated

SLOPE = 0.3  # of the leaky ReLU
DILATIONS = (1, 2, 4)
LEVEL = 0.1  # root mean square of a spectrogram of speech


class Judgement(NamedTuple):
    """What each sub-discriminator gives for a batch."""

    logits: list[jax.Array]  # [batch, columns, bins], positive where the audio seems real
    features: list[list[jax.Array]]  # of every layer but the last, [batch, columns, bins, filters]


class ScaleDiscriminator(nnx.Module):
    """A sub-discriminator: convolutions over the time and frequency of a complex spectrogram.

    Args:
        channels: of the audio.
        filters: of each layer but the last.
        window: samples of the Fourier transform.
    """

    def __init__(self, channels: int, filters: int, window: int, *, rngs: nnx.Rngs):
        def conv(
            size_in: int,
            size_out: int,
            kernel: tuple[int, int],
            stride: int = 1,
            dilation: int = 1,
            level: float = 1.0,
        ) -> nnx.Conv:
            time, frequency = (kernel[0] - 1) * dilation // 2, (kernel[1] - 1) // 2
            return nnx.Conv(
                size_in,
                size_out,
                kernel,
                strides=(1, stride),
                kernel_dilation=(dilation, 1),
                padding=((time, time), (frequency, frequency)),
                conv_general_dilated=conv_general_dilated,
                # Activations of speech have a variance of about 1. With smaller kernels, such as Flax's own,
                # logits begin at 0.01, and learn their scale for long before they learn anything else.
                kernel_init=nnx.initializers.variance_scaling(
                    2 / (1 + SLOPE**2) / level**2, "fan_in", "normal"
                ),
                rngs=rngs,
            )

        self.window = window
        self.first = conv(2 * channels, filters, (3, 9), level=LEVEL)
        wide = functools.partial(conv, filters, filters)
        self.convs = nnx.List([*(wide((3, 9), 2, dilation) for dilation in DILATIONS), wide((3, 3))])
        self.last = conv(filters, 1, (3, 3))

    def __call__(self, audio: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
        """Logits and features of audio [batch, channels, samples], as in `Judgement`."""
        spectrum = jnp.moveaxis(stft(audio, self.window), 1, -1)
        x = jnp.concatenate([spectrum.real, spectrum.imag], axis=-1)
        features = []
        for conv in (self.first, *self.convs):
            x = jax.nn.leaky_relu(conv(x), SLOPE)
            features.append(x)
        return self.last(x)[..., 0], features


class Discriminator(nnx.Module):
    """Sub-discriminators at several resolutions; audio [batch, channels, samples] -> `Judgement`.

    Args:
        channels: of the audio.
        filters: of each layer but the last.
        windows: samples of the Fourier transform of each sub-discriminator.
    """

    def __init__(self, channels: int, filters: int, windows: Sequence[int], *, rngs: nnx.Rngs):
        self.scales = nnx.List(ScaleDiscriminator(channels, filters, window, rngs=rngs) for window in windows)

    def __call__(self, audio: jax.Array) -> Judgement:
        judgements = [scale(audio) for scale in self.scales]
        return Judgement([logits for logits, _ in judgements], [features for _, features in judgements])
