"""On an NVIDIA GPU the codes and the audio are those of the CPU: no TF32, no wrong depthwise kernel."""

from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

import mimi_jax
from mimi_jax import Mimi, MimiConfig

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def gpu() -> Any:
    try:
        return jax.devices("gpu")[0]
    except RuntimeError as error:
        pytest.skip(f"needs an NVIDIA GPU: {error}")


@pytest.fixture(scope="module")
def model() -> Mimi:
    with jax.default_device(jax.devices("cpu")[0]):
        return Mimi(MimiConfig(layer_scale_initial_scale=0.3), rngs=nnx.Rngs(0))


def test_codes_and_audio_equal_the_cpus(gpu: Any, model: Mimi):
    audio = 0.1 * np.random.default_rng(0).standard_normal((2, 1, 288_777), np.float32)
    with jax.default_device(jax.devices("cpu")[0]):
        codes = np.asarray(mimi_jax.encode(model, audio).audio_codes)
        expected = np.asarray(mimi_jax.decode(model, codes).audio_values)
    there = jax.device_put(model, gpu)
    assert (
        np.mean(np.asarray(mimi_jax.encode(there, jax.device_put(audio, gpu)).audio_codes) == codes) >= 0.999
    )
    got = np.asarray(mimi_jax.decode(there, jax.device_put(codes, gpu)).audio_values)
    assert np.linalg.norm(got - expected) / np.linalg.norm(expected) <= 1e-5


def test_the_depthwise_upsample_is_right(gpu: Any, model: Mimi):
    assert model.upsample is not None
    x = np.random.default_rng(1).standard_normal((2, 30, 512), np.float32)
    taps = np.asarray(model.upsample.kernel[...])[:, :, 0, :, 0]  # [2, channels, stride], late taps first
    before = np.concatenate([np.zeros_like(x[:, :1]), x[:, :-1]], axis=1)
    expected = before[..., None] * taps[0] + x[..., None] * taps[1]
    expected = np.moveaxis(expected, 3, 2).reshape(2, 60, 512)
    got = jax.device_put(model.upsample, gpu)(jax.device_put(x, gpu))
    np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-6)


def test_a_batch_in_pieces_equals_a_clip_alone(gpu: Any, model: Mimi):
    """64 clips of 30 s have more than 2**31 activations next to the waveform, and go in pieces of time."""
    clip = 0.1 * np.random.default_rng(0).standard_normal((1, 1, 720_000), np.float32)
    there = jax.device_put(model, gpu)
    alone = np.asarray(mimi_jax.encode(there, jax.device_put(clip, gpu)).audio_codes)
    batch = jax.device_put(np.repeat(clip, 64, axis=0), gpu)
    codes = np.asarray(mimi_jax.encode(there, batch).audio_codes)
    assert np.mean(codes == alone) >= 0.999
