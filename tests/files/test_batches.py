"""Clips of different lengths in one array, and the few lengths that arrays are padded to."""

from pathlib import Path

import numpy as np
import pytest

from mimi_jax.files.audio import save_audio
from mimi_jax.files.batches import bucket_length, pad_batch
from tests.files.clips import speech_like


def test_clips_are_padded_on_the_right():
    audio, padding_mask = pad_batch([np.array([0.1, 0.2]), np.array([[0.3, 0.4, 0.5]]), [0.6]])
    expected = np.array([[[0.1, 0.2, 0]], [[0.3, 0.4, 0.5]], [[0.6, 0, 0]]], np.float32)
    np.testing.assert_array_equal(audio, expected)
    assert audio.dtype == np.float32
    assert padding_mask.dtype == bool
    assert padding_mask.astype(int).tolist() == [[1, 1, 0], [1, 1, 1], [1, 0, 0]]


def test_stereo_clips_make_a_stereo_batch():
    audio, padding_mask = pad_batch(speech_like(n, channels=2) for n in (5, 9))
    assert audio.shape == (2, 2, 9)
    assert padding_mask.shape == (2, 9)


def test_jax_arrays_are_clips():
    jnp = pytest.importorskip("jax.numpy")
    audio, _ = pad_batch([jnp.ones(3, jnp.bfloat16), jnp.ones((1, 2))])
    assert audio.dtype == np.float32
    assert audio.sum() == 5


def test_clips_of_a_batch_must_have_equal_channels():
    with pytest.raises(ValueError, match=r"the same number of channels, got \[1, 2\]"):
        pad_batch([np.zeros(5), np.zeros((2, 5))])


def test_a_batch_needs_a_clip():
    with pytest.raises(ValueError, match="at least one clip, got none"):
        pad_batch([])


def test_bucket_lengths_of_integers_of_numpy():
    assert bucket_length(np.int64(30_000), 1920) == bucket_length(30_000, 1920)  # pyright: ignore[reportArgumentType]


def test_bucket_lengths_are_few_and_not_much_longer_than_the_clips():
    assert [bucket_length(n, 1) for n in (1, 2, 3, 4, 5, 8, 9, 10, 11, 16, 17, 100)] == [
        *(1, 2, 3, 4, 5, 8, 10, 10, 12, 16, 20, 112)
    ]
    assert [bucket_length(n, 1920) // 1920 for n in (1, 1920, 1921, 9 * 1920)] == [1, 1, 2, 10]
    lengths = range(24_000, 60 * 24_000 + 1, 123)
    buckets = [bucket_length(n, 1920) for n in lengths]
    assert len(set(buckets)) == 24
    assert all(n <= bucket <= 1.25 * n + 1920 for n, bucket in zip(lengths, buckets, strict=True))


def test_pad_batch_to_a_bucket():
    audio, padding_mask = pad_batch([np.ones(81), np.ones(3)], frame_size=9)
    assert audio.shape == (2, 1, 90)
    assert padding_mask.sum(axis=1).tolist() == audio.sum(axis=(1, 2)).tolist() == [81, 3]


BAD_AUDIO = [
    (np.zeros((1, 1, 10)), r"got float64 \[1, 1, 10\]"),
    (np.zeros((1, 0)), r"got float64 \[1, 0\]"),
    (np.float32(0), r"got float32 \[\]"),
    (np.zeros(10, np.int16), r"got int16 \[10\]"),
    (np.zeros(10, bool), r"got bool \[10\]"),
    (np.zeros(10, complex), r"got complex128 \[10\]"),
]


@pytest.mark.parametrize(("audio", "error"), BAD_AUDIO)
def test_other_arrays_are_refused(tmp_path: Path, audio: np.ndarray, error: str):
    for use in (lambda: pad_batch([audio]), lambda: save_audio(tmp_path / "clip.wav", audio)):
        with pytest.raises(ValueError, match=f"audio must be float .*{error}"):
            use()
