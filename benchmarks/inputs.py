"""What the benchmarks measure with: models of full size, speech, and random codes."""

import math
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

import mimi_jax
from mimi_jax import MimiConfig

if TYPE_CHECKING:  # it loads JAX, and some benchmarks choose JAX's device after they import this module
    from mimi_jax import Mimi

SAMPLE = Path(mimi_jax.__file__).parent / "samples" / "speech.flac"
CODEBOOKS = 8  # that every implementation uses where speed is measured
# So small that everything can be tried on a CPU in seconds.
SMALL = MimiConfig(
    num_filters=2,
    upsampling_ratios=(5, 4),
    hidden_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=2,
    intermediate_size=16,
    sliding_window=5,
    upsample_groups=16,
    num_quantizers=8,
    codebook_size=16,
    codebook_dim=8,
    vector_quantization_hidden_dimension=8,
)
CLIP_SECONDS = 10  # of audio in one clip, for codes and audio that are compared


def random_model(config: MimiConfig | None = None) -> "Mimi":
    """A model with random weights, by default of the published size. Enough for speed; for codes see
    `load_model`.

    NumPy draws the weights, always the same ones, so that nothing compiles.
    """
    from mimi_jax.checkpoint.parameters import abstract_model, fill, parameters

    generator = np.random.default_rng(0)

    def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
        if name.endswith(("initialized", "cluster_usage")):
            return np.ones(shape, np.float32)
        if name.endswith("embedding_sum"):
            scale = 1.0
        else:
            scale = 0.3 if len(shape) == 1 else math.prod(shape[:-1]) ** -0.5
        return np.float32(scale) * generator.standard_normal(shape, np.float32)

    model = abstract_model(config or MimiConfig())
    return fill(model, {name: draw(name, value.shape) for name, value in parameters(model).items()}, None)


def save_random_model(folder: str | Path) -> None:
    random_model().save_pretrained(folder)


def load_model(name: str | None) -> "Mimi":
    """The model of that name; None for the random weights of the parity tests, whose codes are well spread.

    Those weights need torch and transformers, which `make parity` installs.
    """
    if name is not None:
        return mimi_jax.Mimi.from_pretrained(name)
    from tests.parity.references import random_transformers_model

    with tempfile.TemporaryDirectory() as folder:
        random_transformers_model({}, seed=0).save_pretrained(folder)
        return mimi_jax.Mimi.from_pretrained(folder)


def write_speech(path: Path, minutes: float, rate: int) -> None:
    """Write a WAV file of `rate` Hz that repeats the bundled clip."""
    from mimi_jax.files.audio import audio_writer

    clip, left = mimi_jax.load_audio(SAMPLE, rate), round(60 * minutes * rate)
    with audio_writer(path, rate, channels=1, num_samples=left) as write:
        while left > 0:
            write(clip[:, :left])
            left -= clip.shape[1]


def load_speech(folder: Path | None, seconds: int, sampling_rate: int) -> np.ndarray:
    """Clips of `CLIP_SECONDS`, float32 [clips, 1, samples].

    Args:
        folder: its FLAC and WAV files are joined, in order; None repeats the bundled clip.
        seconds: in all clips together.
        sampling_rate: Hz.
    """
    paths = [SAMPLE]
    if folder is not None:
        paths = sorted(path for path in folder.rglob("*") if path.suffix in (".flac", ".wav"))
    if not paths:
        raise SystemExit(f"there are no .flac or .wav files in {folder}; name another folder")
    needed, parts = seconds * sampling_rate, []
    for path in paths:
        parts.append(mimi_jax.load_audio(path, sampling_rate)[0])
        if sum(map(len, parts)) >= needed:
            break
    return np.resize(np.concatenate(parts), (seconds // CLIP_SECONDS, 1, CLIP_SECONDS * sampling_rate))


def make_clips(config: MimiConfig, direction: str, batch: int, seconds: int) -> np.ndarray:
    """Speech for "encode", float32 [batch, 1, samples], or random codes for "decode",
    int64 [batch, codebooks, frames]."""
    samples = seconds * config.sampling_rate
    if direction == "encode":
        return np.resize(mimi_jax.load_audio(SAMPLE), (batch, 1, samples))
    shape = (batch, CODEBOOKS, math.ceil(samples / config.frame_size))
    return np.random.default_rng(0).integers(config.codebook_size, size=shape)


def make_frames(config: MimiConfig, direction: str, batch: int) -> np.ndarray:
    """Inputs of streaming steps of one frame each. Each row is one frame ahead of the row before it.

    Returns:
        Speech for "encode", float32 [frames, batch, 1, samples], or random codes for "decode",
        int64 [frames, batch, codebooks, 1].
    """
    audio = mimi_jax.load_audio(SAMPLE)[0]
    frames = audio[: audio.size // config.frame_size * config.frame_size].reshape(-1, 1, config.frame_size)
    if direction == "decode":
        codes = np.random.default_rng(0).integers(config.codebook_size, size=(len(frames), CODEBOOKS))
        frames = codes[:, :, None]
    return np.stack([np.roll(frames, -row, axis=0) for row in range(batch)], axis=1)
