"""The losses that training minimizes. Every loss is a scalar, a mean over the batch.

The reconstruction and adversarial losses are those of EnCodec (arXiv 2210.13438), configured as in
audiocraft's `config/solver/compression/default.yaml`, to which the Moshi paper (arXiv 2410.00037, section
3.3) refers. Audio is float32 [batch, channels, samples].
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from mimi_jax.quality.spectrum import FLOOR, WINDOWS, mel_spectrogram


def waveform_loss(real: jax.Array, fake: jax.Array) -> jax.Array:
    """The mean absolute difference of samples."""
    return jnp.mean(jnp.abs(real - fake))


def mel_loss(
    real: jax.Array, fake: jax.Array, sampling_rate: int, power: float = 2.0, floor: float = FLOOR
) -> jax.Array:
    """The mean over five scales of L1 between mel bands and L2 between their logarithms.

    Args:
        sampling_rate: Hz.
        power: 2 for bands of power, as audiocraft has them, or 1 for bands of magnitudes.
        floor: is added to the bands before their logarithm. Differences far below it do not count.
    """
    total = jnp.zeros(())
    for window in WINDOWS:
        x, y = (mel_spectrogram(audio, window, sampling_rate, power) for audio in (real, fake))
        total += jnp.mean(jnp.abs(x - y))
        total += jnp.mean((jnp.log10(floor + x) - jnp.log10(floor + y)) ** 2)
    return total / (2 * len(WINDOWS))


def adversarial_loss(fake_logits: Sequence[jax.Array]) -> jax.Array:
    """Hinge loss of the generator: it is small where each sub-discriminator takes the audio for real."""
    return -jnp.mean(jnp.stack([jnp.mean(logits) for logits in fake_logits]))


def discriminator_loss(real_logits: Sequence[jax.Array], fake_logits: Sequence[jax.Array]) -> jax.Array:
    """Hinge loss of the discriminator: 0 if real audio gets more than 1 and generated audio less than -1."""
    losses = [
        jnp.mean(jax.nn.relu(1 - real)) + jnp.mean(jax.nn.relu(1 + fake))
        for real, fake in zip(real_logits, fake_logits, strict=True)
    ]
    return jnp.mean(jnp.stack(losses))


def feature_loss(real: Sequence[Sequence[jax.Array]], fake: Sequence[Sequence[jax.Array]]) -> jax.Array:
    """The mean over all layers and sub-discriminators of the L1 distance between feature maps."""
    distances = [
        jnp.mean(jnp.abs(x - y))
        for real_maps, fake_maps in zip(real, fake, strict=True)
        for x, y in zip(real_maps, fake_maps, strict=True)
    ]
    return jnp.mean(jnp.stack(distances))


def cosine_loss(student: jax.Array, teacher: jax.Array) -> jax.Array:
    """1 - cosine similarity along the last axis; its mean over the other axes."""
    product = jnp.sum(student * teacher, axis=-1)
    squares = jnp.sum(student**2, axis=-1) * jnp.sum(teacher**2, axis=-1)
    return jnp.mean(1 - product / jnp.sqrt(jnp.maximum(squares, 1e-16)))


def pool_teacher(features: jax.Array, stride: int = 4) -> jax.Array:
    """A teacher's features at the rate of frames: averages over two strides, centred on each frame.

    The Moshi paper (section 3.3.2) pools WavLM's 50 Hz with a window of 8 and a stride of 4, and calls it
    critical that this looks ahead. The first and the last vector are repeated beyond the ends. With a
    stride of 1 the features stay as they are.

    Args:
        features: float [batch, vectors, dim]; `vectors` is a multiple of `stride`.
        stride: vectors of the teacher for each frame.

    Returns:
        float [batch, vectors / stride, dim].
    """
    if stride == 1:
        return features
    side = stride // 2
    x = jnp.pad(features, ((0, 0), (side, stride - side), (0, 0)), mode="edge")
    strides = x.reshape(x.shape[0], -1, stride, x.shape[2]).mean(axis=2)
    return (strides[:, :-1] + strides[:, 1:]) / 2
