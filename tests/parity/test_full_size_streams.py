"""Streams at full size give what whole clips give: in pieces and chunks, with pauses, and for half an hour.

The model is the one that `test_full_size.py` compares with the references.
"""

import sys
from collections.abc import Sequence

import numpy as np
import pytest

import mimi_jax
from mimi_jax import Mimi, StreamingEncoder
from mimi_jax.streams.chunks import decode_chunks, encode_chunks
from tests.parity.conftest import SPEECH
from tests.parity.table import FRAME_SIZE, speech

LENGTHS = (1, 1919, 1921, 50_000, 288_777)
LONG = 264  # frames: more than two windows of attention, of 125 each
MINUTE = 60 * 24_000


def load_speech(num_samples: int) -> np.ndarray:
    """float32 [samples]."""
    return speech(SPEECH if SPEECH.is_dir() else None, num_samples)[0, 0]


def check_codes(name: str, actual: np.ndarray, expected: np.ndarray) -> None:
    assert actual.shape == expected.shape
    differing = int((actual != expected).sum())
    print(f"{name}: {differing} of {expected.size} codes differ", file=sys.stderr)
    assert differing <= expected.size / 1000


def check_audio(name: str, actual: np.ndarray, expected: np.ndarray) -> None:
    error = float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))
    print(f"{name}: audio error {error:.1e}", file=sys.stderr)
    assert error <= 1e-5


def joined(parts: Sequence[np.ndarray | None]) -> np.ndarray:
    return np.concatenate([part for part in parts if part is not None], axis=2)


@pytest.fixture(scope="module")
def audio() -> np.ndarray:
    return load_speech(LONG * FRAME_SIZE)


@pytest.mark.parity
@pytest.mark.parametrize("num_samples", LENGTHS)
def test_random_pieces_give_the_codes_of_encode(model: Mimi, audio: np.ndarray, num_samples: int):
    clip = audio[:num_samples]
    encoder, generator = StreamingEncoder(model), np.random.default_rng(num_samples)
    cuts = np.sort(generator.integers(0, num_samples, 1 + num_samples // 4000))
    codes = joined([*(encoder.push(piece) for piece in np.split(clip, cuts)), encoder.flush()])
    expected = np.asarray(mimi_jax.encode(model, clip[None, None]).audio_codes)
    assert expected.shape[1] == 32
    check_codes(f"{num_samples} samples in {len(cuts) + 1} pieces", codes, expected)


@pytest.mark.parity
def test_random_chunks_give_the_whole_beyond_two_windows(model: Mimi, audio: np.ndarray):
    clip = audio[None, None]
    codes = np.asarray(mimi_jax.encode(model, clip).audio_codes)
    whole = np.asarray(mimi_jax.decode(model, codes).audio_values)
    generator, encoder, decoder = (
        np.random.default_rng(0),
        model.init_encoder_state(1),
        model.init_decoder_state(1),
    )
    stepped, decoded, start = [], [], 0
    while start < LONG:
        stop = min(LONG, start + int(generator.choice([1, 2, 7, 20])))
        piece = clip[:, :, start * FRAME_SIZE : stop * FRAME_SIZE]
        encoder, new = mimi_jax.encode_step(model, encoder, piece)
        stepped.append(np.asarray(new))
        decoder, new = mimi_jax.decode_step(model, decoder, codes[:, :, start:stop])
        decoded.append(np.asarray(new))
        start = stop
    check_codes(f"{LONG} frames in {len(stepped)} random chunks", joined(stepped), codes)
    check_audio(f"{LONG} frames in {len(stepped)} random chunks", joined(decoded), whole)


@pytest.mark.parity
def test_rows_with_random_pauses_and_resets_give_their_clips(model: Mimi, audio: np.ndarray):
    """Four rows; a row that is not active gets NaN, or codes that are not valid."""
    batch, generator = 4, np.random.default_rng(1)
    encoder, decoder = model.init_encoder_state(batch), model.init_decoder_state(batch)
    speech, codes, decoded = ([[[]] for _ in range(batch)] for _ in range(3))  # of each stream of each row
    for _ in range(60):
        resets, active = generator.random(batch) < 0.05, generator.random(batch) < 0.5
        encoder, decoder = mimi_jax.reset_rows(encoder, resets), mimi_jax.reset_rows(decoder, resets)
        for row in np.flatnonzero(resets):
            for streams in (speech, codes, decoded):
                streams[row].append([])
        starts = generator.integers(0, len(audio) - FRAME_SIZE, batch)
        step = np.stack([audio[start : start + FRAME_SIZE] for start in starts])[:, None]
        fed = np.where(active[:, None, None], step, np.nan)
        encoder, new = mimi_jax.encode_step(model, encoder, fed, active=active)
        fed = np.where(active[:, None, None], new, -1)
        decoder, heard = mimi_jax.decode_step(model, decoder, fed, active=active)
        for row in np.flatnonzero(active):
            for streams, part in ((speech, step), (codes, np.asarray(new)), (decoded, np.asarray(heard))):
                streams[row][-1].append(part[row])
    clips, got, sound = (
        [np.concatenate(stream, axis=1) for row in streams for stream in row if stream]
        for streams in (speech, codes, decoded)
    )
    padded, mask = mimi_jax.pad_batch(clips)
    expected = np.asarray(mimi_jax.encode(model, padded, mask).audio_codes)
    expected = [row[:, : part.shape[1]] for row, part in zip(expected, got, strict=True)]
    check_codes(f"{len(clips)} streams in 4 rows", np.concatenate(got, 1), np.concatenate(expected, 1))
    for clip, part in zip(sound, got, strict=True):
        check_audio(
            f"{part.shape[1]} frames", clip, np.asarray(mimi_jax.decode(model, part[None]).audio_values)[0]
        )


@pytest.mark.slow
def test_half_an_hour_does_not_drift(model: Mimi):
    """The last minute equals that of a clip that starts 200 s before it, which is 20 windows of attention."""
    audio = load_speech(30 * MINUTE)[None]
    codes = np.concatenate([part for part, _ in encode_chunks(model, [audio])], axis=1)[None]
    first = 26 * MINUTE - MINUTE // 3
    late = np.asarray(mimi_jax.encode(model, audio[None, :, first:]).audio_codes)
    minute = MINUTE // FRAME_SIZE
    check_codes("the last minute of 30", codes[:, :, -minute:], late[:, :, -minute:])
    decoded = np.concatenate(list(decode_chunks(model, [codes[0]])), axis=1)
    late = np.asarray(mimi_jax.decode(model, codes[:, :, first // FRAME_SIZE :]).audio_values)[0]
    check_audio("the last minute of 30", decoded[:, -MINUTE:], late[:, -MINUTE:])
