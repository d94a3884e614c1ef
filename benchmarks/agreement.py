"""What bfloat16 changes: the share of codes that stay as in float32, by codebook, and the error of the audio.

    python -m benchmarks.agreement [MODEL] [--speech FOLDER] [--seconds 120]

MODEL is what `Mimi.from_pretrained` takes; without it, the full-size random weights of the parity tests,
which need what `make parity` installs. FOLDER holds speech (FLAC or WAV, joined); without it, the bundled
clip is repeated. Each code depends on those of the codebooks before it: once one differs, so does what is
left for the others, and agreement falls from codebook to codebook. The audio is decoded from the float32
codes.
"""

import argparse
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import mimi_jax
from benchmarks.latency import SAMPLE

CLIP_SECONDS = 10


def load_model(name: str | None) -> mimi_jax.Mimi:
    if name is not None:
        return mimi_jax.Mimi.from_pretrained(name)
    from tests.parity.references import random_transformers_model

    with tempfile.TemporaryDirectory() as folder:
        random_transformers_model({}, seed=0).save_pretrained(folder)
        return mimi_jax.Mimi.from_pretrained(folder)


def load_speech(folder: Path | None, seconds: int, sampling_rate: int) -> np.ndarray:
    """float32 [clips, 1, samples]: clips of `CLIP_SECONDS`."""
    paths = (
        sorted(path for path in folder.rglob("*") if path.suffix in (".flac", ".wav")) if folder else [SAMPLE]
    )
    if not paths:
        raise SystemExit(f"no .flac or .wav in {folder}")
    needed, pieces = seconds * sampling_rate, []
    for path in paths:
        pieces.append(mimi_jax.load_audio(path, sampling_rate)[0])
        if sum(map(len, pieces)) >= needed:
            break
    return np.resize(np.concatenate(pieces), (seconds // CLIP_SECONDS, 1, CLIP_SECONDS * sampling_rate))


def compare(model: mimi_jax.Mimi, half: mimi_jax.Mimi, clip: np.ndarray) -> tuple[np.ndarray, float, float]:
    """Equal codes, bool [codebooks, frames], and the energies of the audio's error and of the audio."""
    codes = mimi_jax.encode(model, clip).audio_codes
    equal = np.asarray(codes == mimi_jax.encode(half, clip).audio_codes)[0]
    audio = np.asarray(mimi_jax.decode(model, codes).audio_values, np.float64)
    error = np.asarray(mimi_jax.decode(half, codes).audio_values, np.float64) - audio
    return equal, float(np.sum(error**2)), float(np.sum(audio**2))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", metavar="MODEL")
    parser.add_argument("--speech", type=Path, metavar="FOLDER")
    parser.add_argument("--seconds", type=int, default=120)
    options = parser.parse_args()
    model = load_model(options.model)
    half = model.astype(jnp.bfloat16)
    clips = load_speech(options.speech, options.seconds, model.config.sampling_rate)
    results = [compare(model, half, clip[None]) for clip in clips]
    equal = np.concatenate([result[0] for result in results], axis=1)
    error = np.sqrt(sum(result[1] for result in results) / sum(result[2] for result in results))
    shares = equal.mean(axis=1)
    name, device = options.model or "random weights", jax.devices()[0].device_kind
    print(f"{name}, {len(clips) * CLIP_SECONDS} s, {device}\n")
    print("| codebook | equal codes |\n|---|---|")
    for number, share in enumerate(shares):
        print(f"| {number}{' (semantic)' * (number < model.config.num_semantic_quantizers)} | {share:.2%} |")
    print(f"\nall codebooks {shares.mean():.2%}, the first eight {shares[:8].mean():.2%};", end=" ")
    print(f"relative L2 error of the audio {error:.2e} ({-20 * np.log10(error):.1f} dB)")


if __name__ == "__main__":
    main()
