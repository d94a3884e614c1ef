"""Chunks give what whole clips give, with one program for every length."""

import jax
import numpy as np
import pytest

import mimi_jax
from mimi_jax import Mimi, MimiConfig
from mimi_jax.streams.chunks import CHUNK_FRAMES, decode_chunks, encode_chunks
from tests.models import load_fixture, random_module, relative_error
from tests.streams.compilations import count_compilations

CHUNK = CHUNK_FRAMES * 16  # samples; the fixtures have 16 samples per frame
LONGEST = 2 * CHUNK + 107  # not a multiple of 16
LENGTHS = [1, 15, 16, CHUNK - 1, CHUNK, CHUNK + 1, LONGEST]


def noise(num_samples: int, channels: int = 1) -> np.ndarray:
    """float32 [channels, samples]."""
    return np.random.default_rng(0).normal(0, 0.3, (channels, num_samples)).astype(np.float32)


def random_codes(model: Mimi, num_frames: int, num_codebooks: int | None = None) -> np.ndarray:
    """int32 [codebooks, frames]."""
    shape = num_codebooks or model.config.num_quantizers, num_frames
    return np.random.default_rng(0).integers(0, model.config.codebook_size, shape, np.int32)


def encode_in_chunks(model: Mimi, audio: np.ndarray, num_quantizers: int | None = None) -> np.ndarray:
    """Encode a clip in two pieces whose lengths have nothing to do with that of a chunk."""
    chunks = encode_chunks(model, np.split(audio, [audio.shape[1] // 3], axis=1), num_quantizers)
    return np.concatenate([codes for codes, _ in chunks], axis=1)


def decode_in_chunks(model: Mimi, codes: np.ndarray) -> np.ndarray:
    return np.concatenate(list(decode_chunks(model, np.split(codes, [1], axis=1))), axis=1)


def encode_whole(model: Mimi, audio: np.ndarray, num_quantizers: int | None = None) -> np.ndarray:
    """Encode a clip padded to one length, so that all lengths share a program.

    The mask makes it exact, as the tests of `encode` show.
    """
    num_samples = audio.shape[1]
    padded = np.pad(audio, [(0, 0), (0, LONGEST - num_samples)])
    out = mimi_jax.encode(model, padded[None], np.arange(LONGEST)[None] < num_samples, num_quantizers)
    return np.asarray(out.audio_codes[0])[:, : model.encoded_length(num_samples)]


@pytest.mark.parametrize("num_samples", LENGTHS)
def test_codes_are_those_of_the_whole_clip(num_samples: int):
    model = load_fixture("base").model
    audio = noise(num_samples)
    codes = encode_in_chunks(model, audio)
    assert codes.dtype == np.int32
    np.testing.assert_array_equal(codes, encode_whole(model, audio))


@pytest.mark.parametrize("num_frames", [1, CHUNK_FRAMES, CHUNK_FRAMES + 1, 2 * CHUNK_FRAMES + 7])
def test_audio_is_that_of_the_whole_clip(num_frames: int):
    model = load_fixture("base").model
    codes = random_codes(model, 2 * CHUNK_FRAMES + 7)
    whole = np.asarray(mimi_jax.decode(model, codes[None]).audio_values[0])
    audio = decode_in_chunks(model, codes[:, :num_frames])
    assert audio.dtype == np.float32
    assert relative_error(audio, whole[:, : num_frames * 16]) < 1e-6


@pytest.mark.parametrize(("name", "channels"), [("stereo", 2), ("noncausal", 1)])
def test_other_models(name: str, channels: int):
    model = load_fixture(name).model
    audio = noise(LONGEST, channels)
    codes = encode_in_chunks(model, audio)
    np.testing.assert_array_equal(codes, mimi_jax.encode(model, audio[None]).audio_codes[0])
    decoded = decode_in_chunks(model, codes)
    assert decoded.shape == (channels, codes.shape[1] * model.config.frame_size)
    whole = np.asarray(mimi_jax.decode(model, codes[None]).audio_values[0])
    assert relative_error(decoded, whole) < 1e-6


def test_fewer_codebooks():
    model = load_fixture("base").model
    audio = noise(CHUNK + 1)
    codes = encode_in_chunks(model, audio, 2)
    np.testing.assert_array_equal(codes, encode_in_chunks(model, audio)[:2])
    whole = np.asarray(mimi_jax.decode(model, codes[None]).audio_values[0])
    assert relative_error(decode_in_chunks(model, codes), whole) < 1e-6


def test_ten_minutes_and_one_sample_are_the_same_program(monkeypatch: pytest.MonkeyPatch):
    config = MimiConfig(
        sampling_rate=2400,
        upsampling_ratios=(6, 4, 4),
        num_filters=2,
        hidden_size=8,
        num_hidden_layers=1,
        intermediate_size=8,
        num_attention_heads=2,
        num_key_value_heads=2,
        codebook_size=8,
        codebook_dim=4,
        vector_quantization_hidden_dimension=4,
        num_quantizers=2,
        upsample_groups=8,
    )
    model = random_module(lambda rngs: Mimi(config, rngs=rngs))
    traced = []
    for method in ("_encode_latents", "_decode_latents"):
        original = getattr(Mimi, method)

        def count(self, *args, method=method, original=original, **kwargs):
            traced.append(method)
            return original(self, *args, **kwargs)

        monkeypatch.setattr(Mimi, method, count)
    audio = np.resize(noise(2400), (1, 600 * 2400))
    codes = encode_in_chunks(model, audio)
    assert codes.shape == (2, 7500)
    assert decode_in_chunks(model, codes).shape == audio.shape
    assert encode_in_chunks(model, audio[:, :1], 2).shape == (2, 1)
    assert traced == ["_encode_latents", "_decode_latents"]


@pytest.mark.parametrize("piece", [1, 333, CHUNK, 2 * CHUNK + 1])
def test_pieces_of_any_length_make_chunks_of_one_length(piece: int):
    model = load_fixture("base").model
    audio = noise(LONGEST)
    pieces = [audio[:, start : start + piece] for start in range(0, LONGEST, piece)]
    codes, lengths = zip(*encode_chunks(model, pieces), strict=True)
    assert lengths == (CHUNK, CHUNK, 107)
    assert [part.shape[1] for part in codes] == [CHUNK_FRAMES, CHUNK_FRAMES, 7]
    codes = np.concatenate(codes, axis=1)
    np.testing.assert_array_equal(codes, encode_whole(model, audio))
    decoded = list(decode_chunks(model, [codes[:, start : start + piece] for start in range(0, 107, piece)]))
    assert [part.shape[1] for part in decoded] == [CHUNK, CHUNK, 7 * 16]


def test_a_model_that_cannot_stream_gets_the_whole_clip():
    model = load_fixture("noncausal").model
    ((codes, length),) = encode_chunks(model, np.split(noise(LONGEST), [100, 200], axis=1))
    assert length == LONGEST
    (audio,) = decode_chunks(model, np.split(codes, [1], axis=1))
    assert audio.shape[1] == codes.shape[1] * model.config.frame_size


@pytest.mark.parametrize("name", ["base", "noncausal"])
def test_an_empty_clip_is_refused(name: str):
    model = load_fixture(name).model
    for pieces in ([], [noise(0)]):
        with pytest.raises(ValueError, match="the clip is empty"):
            list(encode_chunks(model, pieces))
    for pieces in ([], [np.zeros((4, 0), int)]):
        with pytest.raises(ValueError, match="the clip is empty"):
            list(decode_chunks(model, pieces))


@pytest.mark.parametrize(
    ("audio", "num_quantizers", "error"),
    [
        (noise(16)[0], None, r"a piece of a clip must be \[channels, samples\], got \[16\]"),
        (noise(0), None, "the clip is empty"),
        (noise(16, 2), None, r"audio must be \[batch, channels=1, samples > 0\]"),
        (np.zeros((1, 16), np.int16), None, "audio must be floating point"),
        (noise(16), 0, "num_quantizers must be an integer from 1 to 4"),
        (noise(16), 5, "num_quantizers must be an integer from 1 to 4"),
    ],
)
def test_bad_audio(audio: np.ndarray, num_quantizers: int | None, error: str):
    with pytest.raises(ValueError, match=error):
        list(encode_chunks(load_fixture("base").model, [audio], num_quantizers))


@pytest.mark.parametrize(
    ("codes", "error"),
    [
        (
            np.zeros((4, 3)),
            r"codes must be integers .* or \[codebooks, frames\], got float64 \[4, 3\]",
        ),
        (np.zeros(4, int), r"codes must be integers .* got int64 \[4\]"),
        (np.zeros((4, 0), int), "the clip is empty"),
        (np.zeros((5, 3), int), "num_quantizers must be an integer from 1 to 4"),
        (np.full((4, 3), 16), r"codes must lie in \[0, 16\), got 16 to 16"),
        (np.full((4, 3), -1), r"codes must lie in \[0, 16\), got -1 to -1"),
    ],
)
def test_bad_codes(codes: np.ndarray, error: str, monkeypatch: pytest.MonkeyPatch):
    def compute(*_):
        raise AssertionError("the codes should have been refused before any computation")

    monkeypatch.setattr("mimi_jax.streams.chunks.decode_step", compute)
    with pytest.raises(ValueError, match=error):
        list(decode_chunks(load_fixture("base").model, [codes]))


FRAMES = range(61, 181, 3)
BUCKETS = len({mimi_jax.bucket_length(frames, 1) for frames in FRAMES})
SMALL = 5  # programs for constants and casts


# A stream has one program for all lengths in each direction, and one for its fresh state.
@pytest.mark.parametrize(
    ("name", "most"), [("base", 4), pytest.param("noncausal", 2 * BUCKETS + SMALL, marks=pytest.mark.slow)]
)
def test_40_lengths_do_not_compile_40_times(name: str, most: int):
    model = load_fixture(name).model
    frame_size = model.config.frame_size
    audio = noise(FRAMES[-1] * frame_size)
    jax.clear_caches()
    with count_compilations() as compiled:
        for frames in FRAMES:
            codes = encode_in_chunks(model, audio[:, : frames * frame_size - frames % 7])
            assert codes.shape[1] == frames
            assert decode_in_chunks(model, codes).shape == (1, frames * frame_size)
    assert 2 <= len(compiled) <= most


def test_40_batches_do_not_compile_40_times():
    model, audio = load_fixture("base").model, noise(FRAMES[-1] * 16)
    jax.clear_caches()
    with count_compilations() as compiled:
        for frames in FRAMES:
            clips = [audio[:, : 16 * frames], audio[:, : 8 * frames]]
            mimi_jax.encode(model, *mimi_jax.pad_batch(clips, frame_size=16))
    assert 2 <= len(compiled) <= BUCKETS + SMALL
