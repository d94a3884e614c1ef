"""Each loss equals an oracle in NumPy, and its gradient equals finite differences."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mimi_jax.quality.spectrum import mel_filters, stft
from mimi_jax.train import losses

RATE = 24_000
mel_loss = jax.jit(functools.partial(losses.mel_loss, sampling_rate=RATE), static_argnames="power")


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32) * 0.1


@pytest.mark.parametrize("power", [1, 2])
def test_mel_loss_is_the_sum_over_scales(power: int):
    x, y = noise(2, 1, 4800), noise(2, 1, 4800, seed=1)
    expected = 0.0
    for window in (64, 128, 256, 512, 1024):
        mels = []
        for audio in (x, y):
            side = (window - window // 4) // 2
            padded = np.pad(audio, ((0, 0), (0, 0), (side, side)), mode="reflect")
            spectrum = np.abs(jax.jit(stft, static_argnums=1)(padded, window)) ** power
            mels.append(spectrum @ mel_filters(window, RATE, 64, 64.0).T)
        expected += np.mean(np.abs(mels[0] - mels[1]))
        expected += np.mean((np.log10(1e-5 + mels[0]) - np.log10(1e-5 + mels[1])) ** 2)
    assert float(mel_loss(x, y, power=power)) == pytest.approx(expected / 10, rel=1e-4)


def test_mel_loss_compares_power_by_default():
    """As audiocraft does, since 2 is torchaudio's default."""
    x, y = noise(2, 1, 4800), noise(2, 1, 4800, seed=1)
    assert mel_loss(x, y) == mel_loss(x, y, power=2)


def test_losses_of_equal_audio_are_zero():
    x = jnp.asarray(noise(2, 1, 4800))
    assert mel_loss(x, x) == 0
    assert losses.waveform_loss(x, x) == 0


def test_hinge():
    logits = jnp.array([[0.5, 2.0, -3.0]])
    assert losses.adversarial_loss([logits, logits + 3]) == pytest.approx(-(-0.5 / 3 + 8.5 / 3) / 2)
    # Real below 1 costs 0.5 + 0 + 4, fake above -1 costs 1.5 + 3 + 0.
    assert losses.discriminator_loss([logits], [logits]) == pytest.approx((4.5 + 4.5) / 3)


def test_feature_loss_is_the_mean_over_maps_whatever_their_sizes():
    small, large = jnp.ones((1, 2)), jnp.ones((1, 100))
    assert losses.feature_loss([[small], [large]], [[small * 3], [large * 2]]) == pytest.approx((2 + 1) / 2)


def test_cosine_loss():
    x = jnp.array([[1.0, 0.0], [1.0, 1.0]])
    y = jnp.array([[3.0, 0.0], [-2.0, -2.0]])
    assert losses.cosine_loss(x, y) == pytest.approx((0 + 2) / 2)
    assert losses.cosine_loss(x, 0 * x) == 1
    assert np.isfinite(jax.grad(losses.cosine_loss)(0 * x, y)).all()


def test_teacher_is_pooled_around_each_frame():
    features = jnp.arange(12.0).reshape(1, 12, 1)
    # Kernel 8 and stride 4 with two repeated steps at either end: frame 1 is the mean of steps 2 to 9.
    expected = np.mean([[0, 0, 0, 1, 2, 3, 4, 5], range(2, 10), [6, 7, 8, 9, 10, 11, 11, 11]], axis=1)
    np.testing.assert_allclose(losses.pool_teacher(features)[0, :, 0], expected)


LOSSES = {
    "waveform": losses.waveform_loss,
    "mel": mel_loss,
    "adversarial": lambda x, y: losses.adversarial_loss([x * y, jnp.sin(y)]),
    "discriminator": lambda x, y: losses.discriminator_loss([x * 20], [y * 20]),
    "features": lambda x, y: losses.feature_loss([[x], [x**2]], [[y], [y**2]]),
    "cosine": losses.cosine_loss,
}


@pytest.mark.parametrize("name", LOSSES)
def test_gradient_is_the_slope(name: str):
    """Along a random direction, in float64, where a finite difference is exact to six digits."""
    with jax.enable_x64(True):
        x, y, direction = (jnp.asarray(noise(2, 1, 1920, seed=i), jnp.float64) for i in range(3))
        loss = jax.jit(LOSSES[name])
        slope = (loss(x, y + 1e-6 * direction) - loss(x, y - 1e-6 * direction)) / 2e-6
        gradient = jnp.vdot(jax.jit(jax.grad(loss, argnums=1))(x, y), direction)
    assert float(abs(slope)) > 1e-5
    assert float(gradient) == pytest.approx(float(slope), rel=1e-4)
