"""What bfloat16 changes: the share of codes that stay as in float32, by codebook, and the error of the audio.

    python -m benchmarks.agreement [MODEL] [--speech FOLDER] [--seconds 120] [--markdown FILE]

MODEL is what `Mimi.from_pretrained` takes; without it, the random weights of full size that the parity tests
use, which need what `make parity` installs. FOLDER holds speech (FLAC or WAV, joined); without it, the
bundled clip is repeated. Each codebook quantizes what the codebooks before it left over: once one code
differs, the later ones quantize something else, so agreement falls from codebook to codebook. The audio is
decoded from the float32 codes.
"""

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import mimi_jax
from benchmarks.inputs import CLIP_SECONDS, load_model, load_speech
from benchmarks.report import Report, add_markdown_option


class Agreement(NamedTuple):
    """How close a model comes to the float32 model."""

    shares: np.ndarray  # [codebooks], of equal codes
    error: float  # relative L2 error of the audio decoded from the float32 codes


def agreement(model: mimi_jax.Mimi, other: mimi_jax.Mimi, clips: Iterable[np.ndarray]) -> Agreement:
    """Compare `other` with the float32 `model` on clips [1, samples]."""
    equal, error, energy = [], 0.0, 0.0
    for clip in clips:
        codes = mimi_jax.encode(model, clip[None]).audio_codes
        equal.append(np.asarray(codes == mimi_jax.encode(other, clip[None]).audio_codes)[0])
        audio = np.asarray(mimi_jax.decode(model, codes).audio_values, np.float64)
        difference = np.asarray(mimi_jax.decode(other, codes).audio_values, np.float64) - audio
        error, energy = error + float(np.sum(difference**2)), energy + float(np.sum(audio**2))
    return Agreement(np.concatenate(equal, axis=1).mean(axis=1), float(np.sqrt(error / energy)))


def decibels(error: float) -> str:
    return f"{-20 * np.log10(error):.1f} dB"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", metavar="MODEL")
    parser.add_argument("--speech", type=Path, metavar="FOLDER")
    parser.add_argument("--seconds", type=int, default=120)
    add_markdown_option(parser)
    options = parser.parse_args()
    model = load_model(options.model)
    clips = load_speech(options.speech, options.seconds, model.config.sampling_rate)
    shares, error = agreement(model, model.astype(jnp.bfloat16), clips)
    name = options.model or "random weights"
    report = Report(jax.devices()[0].device_kind, [f"{name}, {len(clips) * CLIP_SECONDS} s"])
    report.table(["codebook", "equal codes"])
    for number, share in enumerate(shares):
        semantic = " (semantic)" * (number < model.config.num_semantic_quantizers)
        report.row([f"{number}{semantic}", f"{share:.2%}"])
    report.line()
    report.line(
        f"All codebooks {shares.mean():.2%}, the first eight {shares[:8].mean():.2%};"
        f" relative L2 error of the audio {error:.2e} ({decibels(error)})"
    )
    report.save(options.markdown)


if __name__ == "__main__":
    main()
