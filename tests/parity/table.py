"""Compare this package with `transformers` and `moshi` at full size, and print a Markdown table.

    python -m tests.parity.table [SPEECH_FOLDER]

The model has the default architecture, 96 million well-conditioned random weights, and computes in float32.
Speech comes from SPEECH_FOLDER (FLAC or WAV files, joined); without it, a synthetic signal is used.
"""

import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import torch

import mimi_jax
from mimi_jax import Mimi, MimiConfig
from tests.parity.references import code_gaps, encode_latents, speech_like

SAMPLING_RATE, FRAME_SIZE = MimiConfig().sampling_rate, MimiConfig().frame_size

# Samples: multiples of a frame, one of them beyond the window of attention (250 steps, 10 s); other lengths.
WHOLE_LENGTHS = (FRAME_SIZE, 25 * FRAME_SIZE, 200 * FRAME_SIZE)
OTHER_LENGTHS = (1, 1919, 1921, 50_000, 360_777)


class Parity(NamedTuple):
    """How close this package comes to a reference implementation on one clip."""

    reference: str
    num_samples: int
    codes: np.ndarray  # bool [batch, codebooks, frames], which codes are equal
    gaps: np.ndarray  # float [differing codes], see `code_gaps`
    audio_error: float  # relative L2 error of the audio decoded from the reference's codes

    @property
    def agreement(self) -> float:
        return float(self.codes.mean())

    @property
    def semantic_agreement(self) -> float:
        return float(self.codes[:, 0].mean())

    def row(self) -> str:
        """A line of the Markdown table."""
        frames = self.codes.shape[2]
        return (
            f"| {self.reference} | {self.num_samples:,} | {frames} | {self.codes.sum()} / {self.codes.size}"
            f" | {self.codes[:, 0].sum()} / {frames} | {self.audio_error:.1e} |"
        )


def speech(folder: Path | None, num_samples: int) -> np.ndarray:
    """Speech, float32 [1, 1, num_samples]: the clips of a folder joined, or a synthetic signal."""
    clips, length = [], 0
    paths = sorted(path for path in folder.rglob("*") if path.suffix in (".flac", ".wav")) if folder else []
    for path in paths:
        clips.append(mimi_jax.load_audio(path, SAMPLING_RATE))
        length += clips[-1].shape[1]
        if length >= num_samples:
            return np.concatenate(clips, axis=1)[None, :, :num_samples]
    return speech_like(num_samples, FRAME_SIZE, seed=1).numpy()


@torch.no_grad()
def compare(model: Mimi, reference: Any, audio: np.ndarray, moshi: Any = None) -> Parity:
    """Encode `audio` and decode the reference's codes, with this package and with the reference.

    Args:
        model: of this package.
        reference: the `transformers.MimiModel` with the same weights.
        audio: float32 [1, 1, samples].
        moshi: Kyutai's model with the same weights. If it is given, it is the one to compare with.
    """
    wave = torch.from_numpy(audio)
    if moshi is None:
        codes = reference.encode(wave).audio_codes
        expected = reference.decode(codes).audio_values
    else:
        codes = moshi.encode(wave)
        expected = moshi.decode(codes)
    equal = np.asarray(mimi_jax.encode(model, audio).audio_codes) == codes.numpy()
    gaps = np.empty(0)
    if not equal.all():
        gaps = code_gaps(reference, encode_latents(reference, wave)).numpy()[~equal]
    decoded = np.asarray(mimi_jax.decode(model, codes.numpy().astype(np.int32)).audio_values)
    error = np.linalg.norm(decoded - expected.numpy()) / np.linalg.norm(expected.numpy())
    name = "transformers" if moshi is None else "moshi"
    return Parity(name, audio.shape[2], equal, gaps, float(error))


def main() -> None:
    import tempfile

    from tests.parity.references import moshi_model_from, random_transformers_model

    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else None
    reference = random_transformers_model({}, seed=0)
    with tempfile.TemporaryDirectory() as saved:
        reference.save_pretrained(saved)
        model = Mimi.from_pretrained(saved)
    moshi = moshi_model_from(reference)
    audio = speech(folder, max(WHOLE_LENGTHS + OTHER_LENGTHS))
    print(f"on {jax.devices()[0].device_kind}, float32\n")
    print("| reference | samples | frames | equal codes | equal semantic codes | audio error |")
    print("|---|---|---|---|---|---|")
    for length in sorted(WHOLE_LENGTHS + OTHER_LENGTHS):
        for other in [None, moshi] if length in WHOLE_LENGTHS else [None]:
            parity = compare(model, reference, audio[:, :, :length], other)
            print(parity.row(), flush=True)
            for gap in parity.gaps:
                print(f"differing code, relative distance gap {gap:.1e}", file=sys.stderr)


if __name__ == "__main__":
    main()
