"""Put clips of different lengths into one array, in one of a few lengths. NumPy only."""

import operator
from collections.abc import Iterable

import numpy as np
from numpy.typing import ArrayLike

from mimi_jax.config import ceil_div


def bucket_length(length: int, unit: int) -> int:
    """The length to pad to, so that clips of all lengths share a few shapes, each of which compiles once.

    Lengths are multiples of `unit`, and there are four of them between a length and its double. The padding
    is at most a quarter of the clip, or less than one unit. Clips from 1 to 60 seconds have 24 shapes.

    Args:
        length: in samples, or in whatever `unit` is given in; at least 1.
        unit: `config.frame_size` for audio, 1 for frames of codes.
    """
    units = ceil_div(operator.index(length), unit)
    step = max(1 << ((units - 1).bit_length() - 3), 1) if units > 4 else 1
    return ceil_div(units, step) * step * unit


def pad_batch(clips: Iterable[ArrayLike], frame_size: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Put clips of different lengths into one array, padded with zeros on the right.

    Args:
        clips: float [samples] or [channels, samples] each, all with the same number of channels.
        frame_size: None pads to the longest clip. `config.frame_size` pads to one of the few lengths of
            `bucket_length`, so that batches of all lengths share a few compiled programs.

    Returns:
        audio, float32 [batch, channels, samples], and padding_mask, bool [batch, samples], True where the
        audio is real.

    Raises:
        ValueError: there are no clips, a clip is empty or not float, or the numbers of channels differ.
    """
    rows = [as_channels(clip) for clip in clips]
    if not rows:
        raise ValueError("a batch needs at least one clip, got none")
    channels = {len(row) for row in rows}
    if len(channels) > 1:
        raise ValueError(
            f"all clips of a batch must have the same number of channels, got {sorted(channels)}"
        )
    lengths = np.array([row.shape[1] for row in rows])
    longest = int(lengths.max())
    num_samples = longest if frame_size is None else bucket_length(longest, frame_size)
    padding_mask = np.arange(num_samples) < lengths[:, None]
    audio = np.zeros((len(rows), *channels, num_samples), np.float32)
    for padded, row in zip(audio, rows, strict=True):
        padded[:, : row.shape[1]] = row
    return audio, padding_mask


def as_channels(audio: ArrayLike) -> np.ndarray:
    """Float audio [samples] or [channels, samples] as float32 [channels, samples].

    Raises:
        ValueError: the audio has another shape, is empty, or is not floating point.
    """
    array = np.asarray(audio)
    # Integers would be taken as full scale. JAX's bfloat16 has kind V.
    if array.dtype.kind not in "fV" or array.ndim not in (1, 2) or array.size == 0:
        raise ValueError(
            "audio must be float [channels, samples] or [samples] in [-1, 1] with at least one sample, got"
            f" {array.dtype} {list(array.shape)}"
        )
    return np.atleast_2d(array).astype(np.float32)
