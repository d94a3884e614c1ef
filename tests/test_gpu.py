"""On an NVIDIA GPU everything gives what a CPU gives. All tests together take less than two minutes:

    python -m pytest -m gpu

Expected values are committed or come from NumPy in float64, so nothing large is computed on the CPU.
"""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import mimi_jax
from benchmarks.inputs import random_model
from mimi_jax import MimiConfig, StreamingDecoder, StreamingEncoder
from mimi_jax.model import Mimi
from mimi_jax.nn.conv import Conv1d, ConvTranspose1d
from mimi_jax.ops import policy, triton_stages
from tests.models import (
    check_wide,
    load_fixture,
    load_wide,
    noise,
    random_module,
    relative_error,
    wide_audio,
    wide_model,
)

pytestmark = pytest.mark.gpu

# Next to the waveform the layers have the published sizes; the others are small, so that it compiles fast.
WIDE_OUTSIDE = MimiConfig(
    upsampling_ratios=(5, 4),
    hidden_size=32,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=2,
    intermediate_size=32,
    sliding_window=25,
    upsample_groups=32,
    num_quantizers=2,
    codebook_size=64,
    codebook_dim=16,
    vector_quantization_hidden_dimension=16,
)


@pytest.fixture(scope="module", autouse=True)
def _gpu() -> None:
    """Compute on the GPU, or skip."""
    if jax.default_backend() != "gpu":
        pytest.skip(f"needs an NVIDIA GPU; JAX computes on {jax.default_backend()}")


@jax.jit
def latents_and_codes(model: Mimi, audio: jax.Array) -> tuple[jax.Array, jax.Array]:
    latents = model.encode_latents(audio)
    return latents, model.quantize(latents)


@jax.jit
def decoded(model: Mimi, codes: jax.Array) -> jax.Array:
    return model.decode_latents(model.dequantize(codes))


@pytest.mark.parametrize("name", ["base", "kyutai"])
def test_equals_the_references(name: str):
    """The tiny models of the fixtures, bit for bit in codes: the whole path is right, whatever its sizes."""
    model, clips = load_fixture(name)
    latents, codes = latents_and_codes(model, clips[1].audio)
    np.testing.assert_array_equal(codes, clips[1].audio_codes)
    assert relative_error(latents, clips[1].latents) < 1e-5
    assert relative_error(decoded(model, codes), clips[1].audio_values) < 1e-5


def test_layers_of_the_published_sizes_equal_the_cpu():
    """No TF32, which would be off by 1e-3, and no wrong cuDNN kernel in float32."""
    latents, codes = latents_and_codes(wide_model(), wide_audio())
    check_wide(latents, codes, decoded(wide_model(), load_wide()["audio_codes"]))


def test_bfloat16_equals_float32():
    """What the policy chooses in half precision, as far as the dtype goes."""
    model, stored = wide_model().astype(jnp.bfloat16), load_wide()

    def repeated(x: np.ndarray) -> np.ndarray:
        """So many clips that every stage is long enough for a fused device kernel."""
        return np.tile(x, (256, 1, 1))

    audio, codes = repeated(wide_audio()), repeated(stored["audio_codes"])
    compute = policy.resolve("auto")
    is_fused = (
        "cuda" in compute.fused and compute.one_device and triton_stages.is_available(compute.capability)
    )
    programs = [latents_and_codes.lower(model, audio), decoded.lower(model, codes)]
    calls = [len(re.findall("custom_call @triton", program.as_text())) for program in programs]
    assert calls == ([4, 4] if is_fused else [0, 0])
    latents, _ = latents_and_codes(model, audio)
    assert relative_error(latents, repeated(stored["latents"])) < 3e-2
    assert relative_error(decoded(model, codes), repeated(stored["audio_values"])) < 3e-2


def test_a_convolution_in_float32_is_exact():
    """One layer of 64 to 128 channels beside float64. TF32 rounds its inputs to 2**-11."""
    conv = random_module(lambda rngs: Conv1d(64, 128, 8, stride=4, use_bias=False, rngs=rngs))
    x = noise(2, 400, 64)
    padded = np.pad(x, ((0, 0), (4, 0), (0, 0))).astype(np.float64)
    windows = np.stack([padded[:, tap : tap + 400 : 4] for tap in range(8)], axis=2)
    expected = np.einsum("btki,kio->bto", windows, np.asarray(conv.kernel[...], np.float64))

    @jax.jit
    def convolve(x: jax.Array) -> jax.Array:
        with jax.default_matmul_precision("highest"), policy.computing(policy.resolve("auto")):
            return conv(x)

    assert relative_error(convolve(x), expected) < 2e-6


def test_the_depthwise_upsample_is_right():
    """Grouped transposed convolutions of cuDNN were wrong once."""
    build = functools.partial(ConvTranspose1d, 512, 512, 2, groups=512, use_bias=False)
    upsample = random_module(lambda rngs: build(rngs=rngs))
    x = noise(2, 30, 512)
    taps = np.asarray(upsample.kernel[...])[:, :, 0, :, 0]  # [2, channels, stride], late taps first
    before = np.concatenate([np.zeros_like(x[:, :1]), x[:, :-1]], axis=1)
    expected = before[..., None] * taps[0] + x[..., None] * taps[1]
    expected = np.moveaxis(expected, 3, 2).reshape(2, 60, 512)
    np.testing.assert_allclose(jax.jit(lambda x: upsample(x))(x), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_batch_in_pieces_equals_a_clip_alone(dtype: Any):
    """64 clips of 30 s have more than 2**31 activations next to the waveform, and go in pieces."""
    model = random_model(WIDE_OUTSIDE).astype(dtype)
    clip = 0.1 * noise(1, 1, 720_000)
    alone = np.asarray(model.encode_latents(clip), np.float32)
    batch = jnp.broadcast_to(clip, (64, *clip.shape[1:]))
    latents = np.asarray(jax.jit(lambda model, x: model.encode_latents(x)[::21])(model, batch), np.float32)
    for row in latents:  # the rows 0, 21, 42 and 63
        assert relative_error(row, alone[0]) < (1e-5 if dtype == jnp.float32 else 3e-2)


def test_a_stream_equals_the_whole_clip():
    """The states of all layers on the GPU, in steps of eight frames and of one."""
    model, clips = load_fixture("base")
    audio, expected = clips[0].audio, clips[0].audio_codes
    encoder, decoder = StreamingEncoder(model, len(audio)), StreamingDecoder(model, len(audio))
    size = model.config.frame_size
    pieces = np.split(audio, [9 * size, 10 * size], axis=2)
    codes = [*map(encoder.push, pieces), encoder.flush()]
    codes = np.concatenate([some for some in codes if some is not None], axis=2)
    np.testing.assert_array_equal(codes, expected)
    pieces = np.split(codes, [9, 10], axis=2)
    heard = [some for some in map(decoder.push, pieces) if some is not None]
    assert relative_error(np.concatenate(heard, axis=2), clips[0].audio_values) < 1e-5


def test_gradients_in_bfloat16_equal_float32():
    """Training goes past the fused device kernels, and reaches the same gradients."""

    def loss(model: Mimi) -> jax.Array:
        return jnp.mean(model.encode_latents(wide_audio()).astype(jnp.float32) ** 2)

    @jax.jit
    def gradient(model: Mimi) -> jax.Array:
        kernel = nnx.grad(loss)(model)["encoder"]["stages"][0]["downsample"]["kernel"]
        return kernel[...].astype(jnp.float32)

    model = random_model(WIDE_OUTSIDE)
    assert relative_error(gradient(model.astype(jnp.bfloat16)), gradient(model)) < 0.1


def test_encode_takes_and_gives_arrays_on_the_gpu():
    """`encode` and `decode` themselves, as users call them: masks, lengths and the device of the results."""
    model, clips = load_fixture("base")
    audio = jnp.asarray(clips[1].audio)
    out = mimi_jax.encode(model, audio, jnp.ones((len(audio), audio.shape[2]), bool))
    np.testing.assert_array_equal(out.audio_codes, clips[1].audio_codes)
    assert {device.platform for device in out.audio_codes.devices()} == {"gpu"}
