"""Encode and decode clips of any length in chunks of one size, through the streaming state.

One compiled program serves every length, and the memory does not grow with the length. Each chunk is a step
of a stream, so in float32 the codes and the audio are those of `encode` and `decode` on the whole clip. A
`StreamingEncoder` gives each frame as soon as it is complete. The functions here wait for a whole chunk, and
are faster for it.

A model that cannot stream (`config.is_streamable`) gets the whole clip at once, padded to one of a few
lengths.
"""

import sys
from collections.abc import Iterable, Iterator

import numpy as np

from mimi_jax.boundary import as_numpy, transfers_allowed
from mimi_jax.files.batches import bucket_length, pad_batch
from mimi_jax.model import Mimi, decode, decode_step, encode, encode_step
from mimi_jax.streams.push import codes_as_numpy, fresh_state

# 4 s. Longer chunks are not faster on a CPU, and a short clip would be padded more.
CHUNK_FRAMES = 50


def encode_chunks(
    model: Mimi, pieces: Iterable[np.ndarray], num_quantizers: int | None = None
) -> Iterator[tuple[np.ndarray, int]]:
    """Encode a clip of any length. In float32 the codes are exactly those of `encode`.

    Args:
        model: a model with an encoder.
        pieces: the clip in pieces of any length, float [channels, samples] in [-1, 1], at
            `config.sampling_rate`.
        num_quantizers: how many codebooks to use, the first ones; None for all.

    Yields:
        int32 [codebooks, frames], chunk by chunk, and the number of samples that these codes stand for. All
        together, frames = ceil(samples / frame_size).

    Raises:
        ValueError: a piece has another shape or dtype, there are no samples, or the model has fewer
            codebooks.
    """
    if not model.config.is_streamable:
        audio, mask = pad_batch(list(_chunks(pieces, sys.maxsize)), model.config.frame_size)
        length = int(mask.sum())
        with transfers_allowed():
            codes = np.asarray(encode(model, audio, mask, num_quantizers).audio_codes)
        yield codes[0, :, : model.encoded_length(length)], length
        return
    size = CHUNK_FRAMES * model.config.frame_size
    state = fresh_state(model.init_encoder_state, 1)
    for chunk in _chunks(pieces, size):
        length = chunk.shape[1]
        audio = np.pad(chunk, [(0, 0), (0, size - length)])
        # Full chunks get a mask too. Without it they would need a program of their own.
        mask = np.arange(size)[None] < length
        with transfers_allowed():
            state, codes = encode_step(model, state, audio[None], mask, num_quantizers)
            codes = np.asarray(codes)
        yield codes[0, :, : model.encoded_length(length)], length


def decode_chunks(model: Mimi, pieces: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """Decode codes of any length. In float32 the audio is that of `decode`.

    Args:
        model: a model with a decoder.
        pieces: the codes in pieces of any length, int [codebooks, frames], of all codebooks or the first
            ones.

    Yields:
        float32 [channels, samples], chunk by chunk, with frame_size samples for each frame.

    Raises:
        ValueError: a piece has another shape or dtype, there are no frames, or the model does not have such
            codes or codebooks.
    """
    pieces = (codes_as_numpy(model, piece)[0] for piece in pieces)
    if not model.config.is_streamable:
        [codes] = _chunks(pieces, sys.maxsize)
        length, frame_size = codes.shape[1], model.config.frame_size
        codes = np.pad(codes, [(0, 0), (0, bucket_length(length, 1) - length)])
        mask = np.arange(codes.shape[1] * frame_size)[None] < length * frame_size
        with transfers_allowed():
            audio = np.asarray(decode(model, codes[None], mask).audio_values, np.float32)
        yield audio[0, :, : length * frame_size]
        return
    state = fresh_state(model.init_decoder_state, 1)
    for chunk in _chunks(pieces, CHUNK_FRAMES):
        length = chunk.shape[1]
        # No layer looks ahead, so the padding after the last frame does not change its audio.
        codes = np.pad(chunk, [(0, 0), (0, CHUNK_FRAMES - length)])
        with transfers_allowed():
            state, audio = decode_step(model, state, codes[None])
            audio = np.asarray(audio, np.float32)
        yield audio[0, :, : length * model.config.frame_size]


def _chunks(pieces: Iterable[np.ndarray], size: int) -> Iterator[np.ndarray]:
    """Join pieces [rows, any] and cut them into chunks [rows, size]. The last chunk may be shorter."""
    pending: list[np.ndarray] = []
    total = length = 0
    for piece in pieces:
        piece = as_numpy("a piece", piece)
        if piece.ndim != 2:
            raise ValueError(f"a piece of a clip must be [channels, samples], got {list(piece.shape)}")
        pending.append(piece)
        total += piece.shape[1]
        length += piece.shape[1]
        if length >= size:
            ready = np.concatenate(pending, axis=1)
            length %= size
            yield from np.split(ready[:, : ready.shape[1] - length], ready.shape[1] // size, axis=1)
            pending = [ready[:, ready.shape[1] - length :].copy()]  # a view would keep all of `ready`
    if length:
        yield np.concatenate(pending, axis=1)
    elif not total:
        raise ValueError("the clip is empty, so there is nothing to encode or decode")
