"""Losses and the discriminator equal torch's, and a model trained here gives the same in transformers."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx
from transformers.audio_utils import mel_filter_bank

import mimi_jax
from mimi_jax.checkpoint import BUNDLED
from mimi_jax.quality.spectrum import mel_filters, stft
from mimi_jax.train import Trainer, losses, start_model
from mimi_jax.train.discriminator import DILATIONS, Discriminator
from mimi_jax.train.recipe import DiscriminatorRecipe
from tests.train.recipes import tiny_recipe
from tests.train.test_step import batch_of

pytestmark = pytest.mark.parity
RATE = 24_000


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32) * 0.1


def torch_stft(x: torch.Tensor, window: int) -> torch.Tensor:
    """[batch, samples] -> complex [batch, columns, bins], as in torchaudio with `normalized=True`."""
    hann = torch.hann_window(window, dtype=x.dtype)
    out = torch.stft(x, window, window // 4, window=hann, center=False, return_complex=True)
    return out.transpose(1, 2) / hann.pow(2).sum().sqrt()


def torch_mel_loss(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """audiocraft's `msspec` loss, from its definition."""
    total = torch.zeros((), dtype=x.dtype)
    for window in losses.WINDOWS:
        bank = torch.from_numpy(
            mel_filter_bank(window // 2 + 1, 64, 64.0, RATE / 2, RATE, mel_scale="htk")
        ).to(x)
        side = (window - window // 4) // 2
        mels = [
            torch_stft(torch.nn.functional.pad(a, (side, side), mode="reflect")[:, 0], window).abs().square()
            @ bank
            for a in (x, y)
        ]
        total = total + (mels[0] - mels[1]).abs().mean()
        total = total + ((1e-5 + mels[0]).log10() - (1e-5 + mels[1]).log10()).pow(2).mean()
    return total / 10


@pytest.mark.parametrize("window", DiscriminatorRecipe().windows)
def test_stft(window: int):
    x = noise(2, 6000)
    theirs = torch_stft(torch.from_numpy(x), window).numpy()
    np.testing.assert_allclose(stft(jnp.asarray(x), window), theirs, atol=2e-6)


@pytest.mark.filterwarnings("ignore:At least one mel filter has all zero values")
def test_mel_filters():
    for window in losses.WINDOWS:
        theirs = mel_filter_bank(window // 2 + 1, 64, 64.0, RATE / 2, RATE, mel_scale="htk")
        np.testing.assert_allclose(mel_filters(window, RATE, 64, 64.0), theirs.T, atol=1e-5)


@pytest.mark.filterwarnings("ignore:At least one mel filter has all zero values")
def test_mel_loss_and_its_gradient():
    x, y = noise(2, 1, 4800), noise(2, 1, 4800, seed=1)
    ours, gradient = jax.value_and_grad(losses.mel_loss, argnums=1)(jnp.asarray(x), jnp.asarray(y), RATE)
    # In float64, so that torch's own rounding is negligible.
    fake = torch.from_numpy(y.astype(np.float64)).requires_grad_()
    theirs = torch_mel_loss(torch.from_numpy(x.astype(np.float64)), fake)
    theirs.backward()
    assert float(ours) == pytest.approx(theirs.item(), rel=1e-5)
    assert fake.grad is not None
    error = np.linalg.norm(gradient - fake.grad.numpy()) / np.linalg.norm(fake.grad.numpy())
    assert error < 1e-4


def torch_judge(judge: Discriminator, audio: torch.Tensor) -> tuple[list, list]:
    """audiocraft's discriminator with our weights; its arrays are [batch, channels, columns, bins]."""
    logits, features = [], []
    for scale in judge.scales:
        spectrum = torch_stft(audio[:, 0], scale.window)
        x = torch.stack([spectrum.real, spectrum.imag], dim=1)
        maps = []
        convs = [(scale.first, (1, 1), (1, 4))]
        convs += [(c, (d, 1), (d, 4)) for c, d in zip(scale.convs[:3], DILATIONS, strict=True)]
        convs += [(scale.convs[3], (1, 1), (1, 1)), (scale.last, (1, 1), (1, 1))]
        for i, (conv, dilation, padding) in enumerate(convs):
            kernel = torch.from_numpy(np.array(conv.kernel[...]).transpose(3, 2, 0, 1))
            assert conv.bias is not None
            bias = torch.from_numpy(np.array(conv.bias[...]))
            stride = (1, 2) if 1 <= i <= 3 else (1, 1)
            x = torch.nn.functional.conv2d(x, kernel, bias, stride, padding, dilation)
            if i < 5:
                x = torch.nn.functional.leaky_relu(x, 0.3)
                maps.append(x)
        logits.append(x[:, 0])
        features.append(maps)
    return logits, features


def test_discriminator():
    judge = Discriminator(1, 4, DiscriminatorRecipe().windows, rngs=nnx.Rngs(0))
    audio = noise(2, 1, 9600)
    ours = judge(jnp.asarray(audio))
    logits, features = torch_judge(judge, torch.from_numpy(audio))
    for mine, theirs in zip(ours.logits, logits, strict=True):
        np.testing.assert_allclose(mine, theirs.numpy(), atol=1e-5)
    for mine_of_scale, theirs_of_scale in zip(ours.features, features, strict=True):
        for mine, theirs in zip(mine_of_scale, theirs_of_scale, strict=True):
            np.testing.assert_allclose(jnp.moveaxis(mine, -1, 1), theirs.numpy(), atol=1e-5)


def test_a_trained_model_is_the_same_in_transformers(tmp_path: Path):
    recipe = tiny_recipe()
    # transformers derives the rates from the ratios, and a codec of 2.4 kHz has other rates.
    model = dataclasses.replace(
        recipe.model, frame_rate=None, sampling_rate=24_000, upsampling_ratios=(8, 6, 5, 4)
    )
    recipe = dataclasses.replace(recipe, model=model)
    trainer = Trainer(recipe, start_model(recipe))
    batch, state = batch_of(recipe), trainer.init()
    latents = trainer.encode_latents(state, batch["audio"]).reshape(-1, model.hidden_size)
    state = trainer.fit_codebooks(state, jnp.tile(latents, (4, 1)), len(latents))
    for _ in range(5):
        state, _ = trainer.step(state, batch, phase="reconstruction")
    ours = trainer.export(state)
    ours.save_pretrained(tmp_path)
    assert_same_in_transformers(ours, tmp_path, noise(2, 1, 19_200, seed=5))


def test_mini_is_the_same_in_transformers():
    audio = mimi_jax.load_audio(BUNDLED.parent / "samples" / "speech.flac")[None]
    assert_same_in_transformers(mimi_jax.Mimi.from_pretrained("mini"), BUNDLED / "mini", audio)


def assert_same_in_transformers(ours: mimi_jax.Mimi, folder: Path, audio: np.ndarray) -> None:
    theirs = transformers.MimiModel.from_pretrained(folder).eval()
    with torch.no_grad():
        codes: Any = theirs.encode(torch.from_numpy(audio)).audio_codes
        decoded_by_them: Any = theirs.decode(codes).audio_values
    np.testing.assert_array_equal(mimi_jax.encode(ours, audio).audio_codes, codes.numpy())
    np.testing.assert_allclose(
        mimi_jax.decode(ours, codes.numpy()).audio_values, decoded_by_them.numpy(), atol=1e-5
    )
