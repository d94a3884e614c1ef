"""What training makes small. Every loss is a scalar, a mean over the batch.

The reconstruction and adversarial losses are EnCodec's (arXiv 2210.13438) as audiocraft's
`config/solver/compression/default.yaml` sets them, to which the Moshi paper (arXiv 2410.00037, section
3.3) refers. Audio is [batch, channels, samples].
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from mimi_jax.quality.mel import mel_filters

WINDOWS = tuple(2**power for power in range(6, 11))  # samples of the mel loss' Fourier transforms
NUM_BANDS = 64
LOWEST = 64.0  # Hz
FLOOR = 1e-5


def stft(x: jax.Array, window: int) -> jax.Array:
    """Short-time Fourier transform with a Hann window and a hop of a quarter of it.

    That of `torch.stft(center=False)` over the window's norm, as `torchaudio` has it with `normalized=True`.

    Args:
        x: float [..., samples], at least `window` of them.
        window: samples of the transform, a multiple of 4.

    Returns:
        complex [..., frames, window / 2 + 1].
    """
    hop = window // 4
    blocks = x[..., : x.shape[-1] // hop * hop].reshape(*x.shape[:-1], -1, hop)
    frames = blocks.shape[-2] - 3
    # Four shifted views, whose gradient is an addition; that of a gather is a slow scatter.
    framed = jnp.concatenate([blocks[..., i : i + frames, :] for i in range(4)], axis=-1)
    hann = np.sin(np.pi * np.arange(window) / window) ** 2
    hann = (hann / np.sqrt(np.sum(hann**2))).astype(np.float32)
    return jnp.fft.rfft(framed * hann)


def mel_spectrogram(x: jax.Array, window: int, sampling_rate: int) -> jax.Array:
    """Magnitudes in bands: [..., samples] -> [..., ceil(samples / hop), NUM_BANDS] for whole hops."""
    side = (window - window // 4) // 2
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(side, side)], mode="reflect")
    spectrum = stft(x, window)
    # The magnitude's gradient is infinite at zero.
    power = jnp.maximum(spectrum.real**2 + spectrum.imag**2, 1e-14)
    return jnp.sqrt(power) @ mel_filters(window, sampling_rate, NUM_BANDS, LOWEST).T


def waveform_loss(real: jax.Array, fake: jax.Array) -> jax.Array:
    return jnp.mean(jnp.abs(real - fake))


def mel_loss(real: jax.Array, fake: jax.Array, sampling_rate: int, floor: float = FLOOR) -> jax.Array:
    """The mean over five scales of L1 between mel magnitudes and L2 between their logarithms.

    Args:
        floor: what magnitudes are raised by before their logarithm, which hears nothing far below it.
    """
    total = jnp.zeros(())
    for window in WINDOWS:
        x, y = (mel_spectrogram(audio, window, sampling_rate) for audio in (real, fake))
        total += jnp.mean(jnp.abs(x - y))
        total += jnp.mean((jnp.log10(floor + x) - jnp.log10(floor + y)) ** 2)
    return total / (2 * len(WINDOWS))


@jax.jit(static_argnames="sampling_rate")
def mel_distance(real: ArrayLike, fake: ArrayLike, sampling_rate: int) -> jax.Array:
    """The part of `mel_loss` that does not depend on loudness, as a distance: mean |difference| in dB."""
    differences = []
    for window in WINDOWS:
        x, y = (mel_spectrogram(jnp.asarray(audio), window, sampling_rate) for audio in (real, fake))
        differences.append(jnp.mean(jnp.abs(jnp.log10(FLOOR + x) - jnp.log10(FLOOR + y))))
    return 20 * jnp.mean(jnp.stack(differences))


def adversarial_loss(fake_logits: Sequence[jax.Array]) -> jax.Array:
    """What the generator makes small, so that each sub-discriminator takes it for real."""
    return -jnp.mean(jnp.stack([jnp.mean(logits) for logits in fake_logits]))


def discriminator_loss(real_logits: Sequence[jax.Array], fake_logits: Sequence[jax.Array]) -> jax.Array:
    """Hinge: real above 1, fake below -1."""
    losses = [
        jnp.mean(jax.nn.relu(1 - real)) + jnp.mean(jax.nn.relu(1 + fake))
        for real, fake in zip(real_logits, fake_logits, strict=True)
    ]
    return jnp.mean(jnp.stack(losses))


def feature_loss(real: Sequence[Sequence[jax.Array]], fake: Sequence[Sequence[jax.Array]]) -> jax.Array:
    """L1 between feature maps: the mean over layers and sub-discriminators, not relative."""
    distances = [
        jnp.mean(jnp.abs(x - y))
        for real_maps, fake_maps in zip(real, fake, strict=True)
        for x, y in zip(real_maps, fake_maps, strict=True)
    ]
    return jnp.mean(jnp.stack(distances))


def cosine_loss(student: jax.Array, teacher: jax.Array) -> jax.Array:
    """1 - cosine similarity of [..., features], its mean over the rest."""
    product = jnp.sum(student * teacher, axis=-1)
    squares = jnp.sum(student**2, axis=-1) * jnp.sum(teacher**2, axis=-1)
    return jnp.mean(1 - product / jnp.sqrt(jnp.maximum(squares, 1e-16)))


def pool_teacher(features: jax.Array, stride: int = 4) -> jax.Array:
    """A teacher's features at the rate of codes: an average over two strides, centred on each frame.

    The Moshi paper (section 3.3.2) pools WavLM's 50 Hz with kernel 8 and stride 4, and calls it critical
    that this looks ahead. The ends are repeated. Features at the rate of codes stay as they are.

    Args:
        features: [batch, time, dim]; time a multiple of `stride`.

    Returns:
        [batch, time / stride, dim].
    """
    if stride == 1:
        return features
    side = stride // 2
    x = jnp.pad(features, ((0, 0), (side, stride - side), (0, 0)), mode="edge")
    strides = x.reshape(x.shape[0], -1, stride, x.shape[2]).mean(axis=2)
    return (strides[:, :-1] + strides[:, 1:]) / 2
