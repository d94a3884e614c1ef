"""Code clips of any length in blocks of one size, through the streaming state.

One compiled program serves every length, and memory does not grow with the length (a model that cannot
stream codes whole clips, padded to a few lengths). A block is a step of a
stream, so in float32 the numbers are those of `encode` and `decode` on the whole clip. A `StreamingEncoder`
gives each frame as soon as it is complete; this waits for whole blocks, and is faster for it.
"""

from collections.abc import Iterable, Iterator

import numpy as np

from mimi_jax.files.batches import bucket_length, pad_batch
from mimi_jax.files.codes import check_range
from mimi_jax.model import Mimi, decode, decode_step, encode, encode_step
from mimi_jax.streams.push import fresh_state

BLOCK_FRAMES = 50  # 4 s: longer blocks are no faster on a CPU, and make a short clip pay for more padding


def encode_blocks(
    model: Mimi, pieces: Iterable[np.ndarray], num_quantizers: int | None = None
) -> Iterator[tuple[np.ndarray, int]]:
    """Encode a clip of any length, in float32 to exactly the codes that `encode` gives.

    A model that cannot stream (`config.is_streamable`) encodes the clip whole.

    Args:
        pieces: the clip in pieces of any length, float [channels, samples] in [-1, 1], at
            `config.sampling_rate`.
        num_quantizers: how many codebooks to use, the first ones; None for all.

    Yields:
        int32 [codebooks, frames], block by block, and how many samples they are of: together
        frames = ceil(samples / frame_size).

    Raises:
        ValueError: for other shapes or dtypes, and for codebooks the model does not have.
    """
    # Resolved here, since None and the number of all codebooks would be two programs.
    num_quantizers = model.config.num_quantizers if num_quantizers is None else num_quantizers
    num_quantizers = model.quantizer.resolve_count(num_quantizers)
    if not model.config.is_streamable:
        audio, mask = pad_batch([np.concatenate(list(pieces), axis=1)], model.config.frame_size)
        length = int(mask.sum())
        codes = encode(model, audio, mask, num_quantizers).audio_codes
        yield np.asarray(codes)[0, :, : model.encoded_length(length)], length
        return
    size = BLOCK_FRAMES * model.config.frame_size
    state = fresh_state(model.init_encoder_state, 1)
    for block in _blocks(pieces, size):
        length = block.shape[1]
        audio = np.pad(block, [(0, 0), (0, size - length)])
        # Full blocks get a mask too: without one they would need a program of their own.
        mask = np.arange(size)[None] < length
        state, codes = encode_step(model, state, audio[None], mask, num_quantizers=num_quantizers)
        yield np.asarray(codes)[0, :, : model.encoded_length(length)], length


def decode_blocks(model: Mimi, pieces: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """Decode codes of any length, in float32 to the audio that `decode` gives.

    A model that cannot stream (`config.is_streamable`) decodes them whole.

    Args:
        pieces: the codes in pieces of any length, int [codebooks, frames], of all or the first codebooks.

    Yields:
        float32 [channels, samples], block by block, frame_size samples a frame.

    Raises:
        ValueError: for other shapes or dtypes, and for codes or codebooks the model does not have.
    """
    pieces = (_check_codes(model, piece) for piece in pieces)
    if not model.config.is_streamable:
        codes = np.concatenate(list(pieces), axis=1)
        length, frame_size = codes.shape[1], model.config.frame_size
        codes = np.pad(codes, [(0, 0), (0, bucket_length(length, 1) - length)])
        mask = np.arange(codes.shape[1] * frame_size)[None] < length * frame_size
        audio = decode(model, codes[None], mask).audio_values
        yield np.asarray(audio, np.float32)[0, :, : length * frame_size]
        return
    state = fresh_state(model.init_decoder_state, 1)
    for block in _blocks(pieces, BLOCK_FRAMES):
        length = block.shape[1]
        # No layer looks ahead, so what follows the last frame cannot reach it.
        codes = np.pad(block, [(0, 0), (0, BLOCK_FRAMES - length)])
        state, audio = decode_step(model, state, codes[None])
        yield np.asarray(audio, np.float32)[0, :, : length * model.config.frame_size]


def _blocks(pieces: Iterable[np.ndarray], size: int) -> Iterator[np.ndarray]:
    """Cut what arrives, [rows, any], anew: into [rows, size], and what is left at the end."""
    pending: list[np.ndarray] = []
    total = length = 0
    for piece in pieces:
        if piece.ndim != 2:
            raise ValueError(f"a piece of a clip must be [channels, samples], got {list(piece.shape)}")
        pending.append(piece)
        total += piece.shape[1]
        length += piece.shape[1]
        if length >= size:
            ready = np.concatenate(pending, axis=1)
            length %= size
            yield from np.split(ready[:, : ready.shape[1] - length], ready.shape[1] // size, axis=1)
            pending = [ready[:, ready.shape[1] - length :].copy()]  # or it would keep all of it
    if length:
        yield np.concatenate(pending, axis=1)
    elif not total:
        raise ValueError("there is nothing to code: the clip has no samples")


def _check_codes(model: Mimi, codes: np.ndarray) -> np.ndarray:
    if codes.dtype.kind not in "iu" or codes.ndim != 2:
        raise ValueError(f"codes must be integers [codebooks, frames], got {codes.dtype} {list(codes.shape)}")
    model.quantizer.resolve_count(len(codes))
    check_range(codes, model.config.codebook_size)
    return codes.astype(np.int32)
