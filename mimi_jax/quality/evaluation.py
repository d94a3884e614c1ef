"""How good a model is on your own audio: several measures for each number of codebooks.

SI-SDR, a mel distance, STOI (pystoi) and ViSQOL (visqol-python) compare decoded audio with the original.
The perplexity of a codebook says how many of its codes are in use.
"""

import json
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import soxr

from mimi_jax.checkpoint import code_spec
from mimi_jax.files.batches import pad_batch
from mimi_jax.files.corpus import Clip, read_crop
from mimi_jax.model import Mimi, decode, encode
from mimi_jax.quality.metrics import si_sdr
from mimi_jax.quality.spectrum import WINDOWS, mel_distance

VISQOL_RATE = 16_000  # Hz, of its speech mode


class Quality(NamedTuple):
    """The quality for one number of codebooks. All measures are means over clips."""

    num_quantizers: int
    kbits: float  # per second
    si_sdr: float  # dB
    mel_distance: float  # dB, see `mimi_jax.quality.spectrum.mel_distance`
    stoi: float  # 0 to 1
    visqol: float  # 1 to 5


class Evaluation(NamedTuple):
    num_clips: int
    seconds: float
    codebook_size: int
    qualities: list[Quality]  # by rising number of codebooks
    perplexities: list[float]  # of each codebook, over all frames of all clips


def default_counts(num_quantizers: int, num_semantic: int) -> list[int]:
    """Return numbers of codebooks worth comparing: the smallest, half of all, all, and powers of two."""
    powers = {2**power for power in range(num_quantizers.bit_length())}
    counts = powers | {num_semantic, num_quantizers // 2, num_quantizers}
    return sorted(count for count in counts if num_semantic <= count <= num_quantizers)


def evaluate(model: Mimi, clips: Iterable[Clip], counts: Sequence[int]) -> Evaluation:
    """Encode and decode clips with several numbers of codebooks, and measure the quality.

    Args:
        model: the whole model.
        clips: from `mimi_jax.files.corpus.find_clips`; their channels are mixed to those of the model.
        counts: numbers of codebooks.

    Raises:
        ValueError: there are no clips, or the model does not have that many codebooks.
    """
    config = model.config
    kbits = {count: code_spec(model, count).kbits for count in sorted(counts)}
    scores: dict[int, list[tuple[float, ...]]] = {count: [] for count in kbits}
    usage = np.zeros((config.num_quantizers, config.codebook_size))
    num_clips, num_samples, visqol = 0, 0, _make_visqol()
    for clip in clips:
        length = round(clip.num_samples * config.sampling_rate / clip.sampling_rate)
        audio = read_crop(clip, 0.0, length, config)
        batch, mask = pad_batch([audio], config.frame_size)
        codes, codes_mask = encode(model, batch, mask)
        for level, level_codes in enumerate(np.asarray(codes[0, :, np.asarray(codes_mask[0])]).T):
            usage[level] += np.bincount(level_codes, minlength=config.codebook_size)
        for count, rows in scores.items():
            decoded = np.asarray(decode(model, codes[:, :count], mask).audio_values)[0, :, :length]
            rows.append(_compare(audio, decoded, config.sampling_rate, visqol))
        num_clips, num_samples = num_clips + 1, num_samples + length
    if num_clips == 0:
        raise ValueError("there are no clips to evaluate the model on; give at least one")
    qualities = [Quality(count, kbits[count], *np.mean(rows, axis=0)) for count, rows in scores.items()]
    seconds = num_samples / config.sampling_rate
    return Evaluation(num_clips, seconds, config.codebook_size, qualities, _perplexities(usage))


def _perplexities(usage: np.ndarray) -> list[float]:
    """Compute exp(entropy) of each codebook from how often each code occurred, [codebooks, codes]."""
    shares = usage / usage.sum(axis=1, keepdims=True)
    entropy = -np.sum(shares * np.log(np.maximum(shares, 1e-12)), axis=1)
    return list(np.exp(entropy))


def _make_visqol() -> Any:
    from visqol import VisqolApi

    visqol = VisqolApi()
    visqol.create(mode="speech")
    return visqol


def _compare(real: np.ndarray, fake: np.ndarray, sampling_rate: int, visqol: Any) -> tuple[float, ...]:
    """Compute the measures of `Quality`, in their order, for audio [channels, samples]."""
    from pystoi import stoi

    mono = [channels.mean(axis=0) for channels in (real, fake)]
    low = [soxr.resample(channel, sampling_rate, VISQOL_RATE).astype(np.float64) for channel in mono]
    return (
        si_sdr(real, fake),
        _mel_distance(real, fake, sampling_rate),
        float(stoi(mono[0], mono[1], sampling_rate)),
        float(visqol.measure_from_arrays(*low, VISQOL_RATE).moslqo),
    )


def _mel_distance(real: np.ndarray, fake: np.ndarray, sampling_rate: int) -> float:
    """Pad both clips with silence, so that few lengths are compiled. The padding adds no difference."""
    padded, _ = pad_batch([real, fake], max(WINDOWS))
    return float(mel_distance(*padded, sampling_rate)) * padded.shape[-1] / real.shape[-1]


def table(evaluation: Evaluation) -> str:
    """Return the qualities as a table in Markdown."""
    lines = [
        "| codebooks | kbit/s | SI-SDR (dB) | mel distance (dB) | STOI | ViSQOL |",
        "|---|---|---|---|---|---|",
    ]
    for row in evaluation.qualities:
        lines.append(
            f"| {row.num_quantizers} | {row.kbits:.2f} | {row.si_sdr:.1f} | {row.mel_distance:.2f} |"
            f" {row.stoi:.3f} | {row.visqol:.2f} |"
        )
    return "\n".join(lines)


def to_json(evaluation: Evaluation) -> str:
    fields = evaluation._asdict() | {"qualities": [row._asdict() for row in evaluation.qualities]}
    return json.dumps(fields, indent=2, default=float) + "\n"
