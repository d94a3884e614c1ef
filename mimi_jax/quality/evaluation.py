"""How good a model is on your own audio: several measures for each number of codebooks.

SI-SDR, a mel distance, STOI (pystoi) and ViSQOL (visqol-python) compare decoded audio with the original.
The perplexity of a codebook says how many of its codes are in use. A clip that cannot be measured is left
out, by name and with the reason.
"""

import collections
import contextlib
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from mimi_jax.checkpoint import code_spec
from mimi_jax.files.batches import pad_batch
from mimi_jax.files.corpus import SILENCE, Clip, Clips, LeftOut, read_crop, reason_of
from mimi_jax.files.processes import default_num_workers
from mimi_jax.model import Mimi, decode, encode
from mimi_jax.quality.metrics import STOI_SECONDS, VISQOL_SECONDS
from mimi_jax.quality.scoring import Scorer, Scores
from mimi_jax.quality.spectrum import WINDOWS, mel_distance


class Quality(NamedTuple):
    """The quality for one number of codebooks. All measures are means over clips."""

    num_quantizers: int
    kbits: float  # per second
    si_sdr: float  # dB
    mel_distance: float  # dB, see `mimi_jax.quality.spectrum.mel_distance`
    stoi: float  # 0 to 1
    visqol: float | None  # 1 to 5; None if it was not measured


class Evaluation(NamedTuple):
    num_clips: int
    seconds: float
    codebook_size: int
    qualities: list[Quality]  # by rising number of codebooks
    perplexities: list[float]  # of each codebook, over all frames of all clips
    left_out: list[LeftOut]  # clips that are in none of these numbers


def default_counts(num_quantizers: int, num_semantic: int) -> list[int]:
    """Return numbers of codebooks worth comparing: the smallest, half of all, all, and powers of two."""
    powers = {2**power for power in range(num_quantizers.bit_length())}
    counts = powers | {num_semantic, num_quantizers // 2, num_quantizers}
    return sorted(count for count in counts if num_semantic <= count <= num_quantizers)


class _Coded(NamedTuple):
    """A clip before and after the codec. The lists have an element for each number of codebooks."""

    original: np.ndarray  # float32 [channels, samples]
    decoded: list[np.ndarray]
    mel_distances: list[float]
    usage: np.ndarray  # how often each code occurred, [codebooks, codes]


class _Measured(NamedTuple):
    """The numbers of a clip."""

    num_samples: int
    usage: np.ndarray
    mel_distances: list[float]
    scores: list[Scores]


def evaluate(
    model: Mimi, corpus: Clips, counts: Sequence[int], *, visqol: bool = True, workers: int | None = None
) -> Evaluation:
    """Encode and decode clips with several numbers of codebooks, and measure the quality.

    Args:
        model: the whole model.
        corpus: from `mimi_jax.files.corpus.find_clips`; the channels of its clips are mixed to those of the
            model.
        counts: numbers of codebooks.
        visqol: whether to measure ViSQOL, which takes longer than the other measures.
        workers: processes that compare clips; None for one less than the number of CPUs, at most 16. The
            numbers do not depend on it.

    Raises:
        ValueError: no clip can be measured, the model does not have that many codebooks, or `workers` is not
            positive.
        ChildProcessError: the processes die as they start.
    """
    workers = default_num_workers() if workers is None else workers
    if workers < 1:
        raise ValueError(f"workers must be positive, got {workers}")
    counts = sorted(counts)
    kbits = [code_spec(model, count).kbits for count in counts]
    measured, left_out = [], list(corpus.left_out)
    with contextlib.ExitStack() as stack:
        scorers = [stack.enter_context(Scorer(visqol)) for _ in range(min(workers, len(corpus.clips)))]
        outcomes = _measure(model, corpus.clips, counts, scorers, VISQOL_SECONDS if visqol else STOI_SECONDS)
        for outcome in tqdm(outcomes, "evaluating", len(corpus.clips), unit="clip", disable=None):
            if isinstance(outcome, LeftOut):
                left_out.append(outcome)
            else:
                measured.append(outcome)
    if not measured:
        reason = f"{left_out[0].name}: {left_out[0].reason}" if left_out else "there are none"
        raise ValueError(f"no clip can be measured; {reason}")
    return Evaluation(
        num_clips=len(measured),
        seconds=sum(clip.num_samples for clip in measured) / model.config.sampling_rate,
        codebook_size=model.config.codebook_size,
        qualities=[
            _quality(measured, level, *row) for level, row in enumerate(zip(counts, kbits, strict=True))
        ],
        perplexities=_perplexities(np.sum([clip.usage for clip in measured], axis=0)),
        left_out=left_out,
    )


def _measure(
    model: Mimi, clips: Sequence[Clip], counts: Sequence[int], scorers: Sequence[Scorer], shortest: float
) -> Iterator[_Measured | LeftOut]:
    """Measure clips, in their order. While one is encoded and decoded, those before it are scored."""
    waiting: collections.deque[Callable[[], _Measured | LeftOut]] = collections.deque()
    for clip, scorer in zip(clips, itertools.cycle(scorers), strict=False):
        try:
            coded = _code(model, clip, counts, shortest)
        except ConnectionError:  # without a part of the clips, the means would be others
            raise
        except (OSError, ValueError, RuntimeError, MemoryError) as error:  # JAX's is a RuntimeError
            coded = LeftOut(clip.name, reason_of(error))
        if len(waiting) == len(scorers):  # the oldest clip is with the scorer whose turn it is
            yield waiting.popleft()()
        waiting.append(_start_to_score(scorer, clip, coded, model.config.sampling_rate))
    while waiting:
        yield waiting.popleft()()


def _code(model: Mimi, clip: Clip, counts: Sequence[int], shortest: float) -> _Coded:
    """Encode and decode a clip.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is damaged, or the clip is silent or shorter than `shortest` seconds.
        RuntimeError, MemoryError: the device or the computer has too little memory for the clip.
    """
    config = model.config
    seconds = clip.num_samples / clip.sampling_rate
    if seconds < shortest:
        raise ValueError(f"it is {seconds:.2f} s long; the measures need {shortest:g} s")
    length = round(seconds * config.sampling_rate)
    audio = read_crop(clip, 0.0, length, config)
    if not (np.abs(audio) > SILENCE).any():
        raise ValueError("it is silent: no sample is above -80 dBFS")
    batch, mask = pad_batch([audio], config.frame_size)
    codes, codes_mask = encode(model, batch, mask)
    levels = np.asarray(codes[0, :, np.asarray(codes_mask[0])]).T
    usage = np.array([np.bincount(level, minlength=config.codebook_size) for level in levels])
    decoded = [
        np.asarray(decode(model, codes[:, :count], mask).audio_values)[0, :, :length] for count in counts
    ]
    distances = [_mel_distance(audio, fake, config.sampling_rate) for fake in decoded]
    return _Coded(audio, decoded, distances, usage)


def _start_to_score(
    scorer: Scorer, clip: Clip, coded: _Coded | LeftOut, sampling_rate: int
) -> Callable[[], _Measured | LeftOut]:
    """Let a worker score a clip, and return the function that waits for it."""
    if isinstance(coded, LeftOut):
        return lambda: coded
    future = scorer.submit(coded.original, coded.decoded, sampling_rate)

    def finish() -> _Measured | LeftOut:
        try:
            scores = scorer.wait(future)
        except ValueError as error:
            return LeftOut(clip.name, reason_of(error))
        return _Measured(coded.original.shape[1], coded.usage, coded.mel_distances, scores)

    return finish


def _quality(clips: Sequence[_Measured], level: int, count: int, kbits: float) -> Quality:
    """Compute the means over clips for one number of codebooks, whose numbers stand at index `level`."""
    scores = [clip.scores[level] for clip in clips]
    visqols = [score.visqol for score in scores if score.visqol is not None]
    return Quality(
        num_quantizers=count,
        kbits=kbits,
        si_sdr=float(np.mean([score.si_sdr for score in scores])),
        mel_distance=float(np.mean([clip.mel_distances[level] for clip in clips])),
        stoi=float(np.mean([score.stoi for score in scores])),
        visqol=float(np.mean(visqols)) if visqols else None,
    )


def _perplexities(usage: np.ndarray) -> list[float]:
    """Compute exp(entropy) of each codebook from how often each code occurred, [codebooks, codes]."""
    shares = usage / usage.sum(axis=1, keepdims=True)
    entropy = -np.sum(shares * np.log(np.maximum(shares, 1e-12)), axis=1)
    return list(np.exp(entropy))


def _mel_distance(real: np.ndarray, fake: np.ndarray, sampling_rate: int) -> float:
    """Pad both clips with silence, so that few lengths are compiled. The padding adds no difference."""
    padded, _ = pad_batch([real, fake], max(WINDOWS))
    return float(mel_distance(*padded, sampling_rate)) * padded.shape[-1] / real.shape[-1]


def table(evaluation: Evaluation) -> str:
    """Return the qualities as a table in Markdown."""
    names = ["codebooks", "kbit/s", "SI-SDR (dB)", "mel distance (dB)", "STOI", "ViSQOL"]
    rows = [
        [
            f"{row.num_quantizers}",
            f"{row.kbits:.2f}",
            f"{row.si_sdr:.1f}",
            f"{row.mel_distance:.2f}",
            f"{row.stoi:.3f}",
            *([] if row.visqol is None else [f"{row.visqol:.2f}"]),
        ]
        for row in evaluation.qualities
    ]
    width = len(rows[0])
    lines = [f"| {' | '.join(cells)} |" for cells in (names[:width], *rows)]
    return "\n".join([lines[0], "|---" * width + "|", *lines[1:]])


def to_json(evaluation: Evaluation) -> str:
    rows = {name: [row._asdict() for row in getattr(evaluation, name)] for name in ("qualities", "left_out")}
    return json.dumps(evaluation._asdict() | rows, indent=2, default=float) + "\n"
