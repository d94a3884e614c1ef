"""Code clips of any length in blocks of one size, through the streaming state.

One compiled program serves every length, and memory does not grow with the length. A block is a step of a
stream, so the numbers are those of `encode` and `decode` on the whole clip.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from mimi_jax.model import Mimi, decode, decode_step, encode, encode_step

BLOCK_FRAMES = 50  # 4 s: longer blocks are no faster on a CPU, and make a short clip pay for more padding

Progress = Callable[[int], object]


def encode_in_blocks(
    model: Mimi, audio: np.ndarray, num_quantizers: int | None = None, *, progress: Progress | None = None
) -> np.ndarray:
    """Encode a clip of any length, to exactly the codes that `encode` gives.

    A model that cannot stream (`config.is_streamable`) encodes the clip whole.

    Args:
        audio: float [channels, samples] in [-1, 1], at `config.sampling_rate`.
        num_quantizers: how many codebooks to use, the first ones; None for all.
        progress: called after each block with the samples in it, as `tqdm.update` wants it.

    Returns:
        int32 [codebooks, frames], with frames = ceil(samples / frame_size).

    Raises:
        ValueError: for other shapes or dtypes, and for codebooks the model does not have.
    """
    if np.ndim(audio) != 2 or np.size(audio) == 0:
        raise ValueError(f"audio must be [channels, samples > 0], got {list(np.shape(audio))}")
    # Resolved here, since None and the number of all codebooks would be two programs.
    num_quantizers = model.config.num_quantizers if num_quantizers is None else num_quantizers
    num_quantizers = model.quantizer.check_count(num_quantizers)
    num_samples = audio.shape[1]
    if not model.config.is_streamable:
        codes = np.asarray(encode(model, audio[None], num_quantizers=num_quantizers).audio_codes[0])
        _report(progress, num_samples)
        return codes
    size = BLOCK_FRAMES * model.config.frame_size
    state = _fresh(model.init_encoder_state)
    blocks = []
    for start in range(0, num_samples, size):
        block = audio[:, start : start + size]
        length = block.shape[1]
        block = np.pad(block, [(0, 0), (0, size - length)])
        # Full blocks get a mask too: without one they would need a program of their own.
        state, codes = encode_step(
            model, state, block[None], np.arange(size)[None] < length, num_quantizers=num_quantizers
        )
        blocks.append(np.asarray(codes[0]))
        _report(progress, length)
    return np.concatenate(blocks, axis=1)[:, : model.encoded_length(num_samples)]


def decode_in_blocks(model: Mimi, codes: np.ndarray, *, progress: Progress | None = None) -> np.ndarray:
    """Decode codes of any length, to exactly the audio that `decode` gives.

    A model that cannot stream (`config.is_streamable`) decodes them whole.

    Args:
        codes: int [codebooks, frames], of all or the first codebooks.
        progress: called after each block with the frames in it, as `tqdm.update` wants it.

    Returns:
        float32 [channels, frames * frame_size].

    Raises:
        ValueError: for other shapes or dtypes, and for codes or codebooks the model does not have.
    """
    codes = np.asarray(codes)
    _check_codes(model, codes)
    num_frames = codes.shape[1]
    if not model.config.is_streamable:
        audio = np.asarray(decode(model, codes[None]).audio_values[0], np.float32)
        _report(progress, num_frames)
        return audio
    state = _fresh(model.init_decoder_state)
    blocks = []
    for start in range(0, num_frames, BLOCK_FRAMES):
        block = codes[:, start : start + BLOCK_FRAMES].astype(np.int32)
        length = block.shape[1]
        # No layer looks ahead, so what follows the last frame cannot reach it.
        block = np.pad(block, [(0, 0), (0, BLOCK_FRAMES - length)])
        state, audio = decode_step(model, state, block[None])
        blocks.append(np.asarray(audio[0], np.float32))
        _report(progress, length)
    return np.concatenate(blocks, axis=1)[:, : num_frames * model.config.frame_size]


def _check_codes(model: Mimi, codes: np.ndarray) -> None:
    if codes.dtype.kind not in "iu" or codes.ndim != 2 or codes.size == 0:
        raise ValueError(
            f"codes must be integers [codebooks, frames > 0], got {codes.dtype} {list(codes.shape)}"
        )
    model.quantizer.check_count(len(codes))
    size = model.config.codebook_size
    if codes.min() < 0 or codes.max() >= size:
        raise ValueError(f"codes must lie in [0, {size}), got {codes.min()} to {codes.max()}")


def _fresh(init_state: Callable[[int], Any]) -> Any:
    """The state of one fresh stream, which is all zeros, without compiling a program for each array of it."""
    return jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), jax.eval_shape(lambda: init_state(1)))


def _report(progress: Progress | None, count: int) -> None:
    if progress is not None:
        progress(count)
