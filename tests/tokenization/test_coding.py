"""Clips that are coded together, short or long, get the codes that they get alone."""

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import pytest

from mimi_jax.tokenization.coding import FLUSH_BATCHES, Coder
from mimi_jax.tokenization.job import counted_compilations
from mimi_jax.tokenization.sources import Item
from mimi_jax.tokenization.workers import Piece
from tests.models import load_fixture
from tests.tokenization.corpora import RATE, codes_alone, noise_clip

CHUNK = 5  # frames
FRAME = 16  # samples of a frame of the tiny models


class FakeStream:
    """A clip in pieces that are here already; one of them may be an error."""

    def __init__(self, number: int, pieces: list[np.ndarray | Exception]):
        self.key, self.item = number, Item(str(number))
        self._pieces = pieces

    def next(self) -> Piece:
        piece = self._pieces.pop(0)
        if isinstance(piece, Exception):
            raise piece
        return Piece(piece, is_last=not self._pieces)


def in_pieces(audio: np.ndarray, size: int) -> list[Any]:
    return [audio[:, first : first + size] for first in range(0, audio.shape[1], size)]


def ignore(_: int) -> None:
    pass


def run(coder: Coder, streams: list[FakeStream]) -> dict[int, Any]:
    results = list(coder.run(iter(streams), ignore))  # type: ignore[arg-type]
    assert len({result.reader.key for result in results}) == len(results) == len(streams)
    return {result.reader.key: result for result in results}


LENGTHS = [1, 15, 16, 17, 79, 80, 81, 160, 999, 1, 2000, 80, 80, 16, 999, 160, 999]


@pytest.mark.parametrize(
    ("fixture", "num_devices"), [("base", 1), ("base", 8), ("stereo", 8), ("replicate", 1)]
)
def test_codes_are_those_of_each_clip_alone(fixture: str, num_devices: int):
    model = load_fixture(fixture).model
    channels = model.config.audio_channels
    frame_size = model.config.frame_size
    lengths = [length * frame_size // FRAME or 1 for length in LENGTHS]
    clips = [noise_clip(length, seed, channels) for seed, length in enumerate(lengths)]
    streams = [FakeStream(n, in_pieces(clip, 83 * (n % 3 + 1))) for n, clip in enumerate(clips)]
    quantizers = model.config.num_quantizers
    coder = Coder(model, 8, CHUNK, quantizers, jax.local_devices()[:num_devices])
    results = run(coder, streams)
    for number, clip in enumerate(clips):
        result = results[number]
        np.testing.assert_array_equal(result.codes, codes_alone(model, clip))
        assert result.codes.dtype == np.uint16
        assert result.num_samples == clip.shape[1]


def test_fewer_codebooks_are_the_first_ones():
    model, clip = load_fixture("base").model, noise_clip(500)
    result = run(Coder(model, 2, CHUNK, 3, jax.devices()[:1]), [FakeStream(0, [clip])])[0]
    np.testing.assert_array_equal(result.codes, codes_alone(model, clip)[:3])


def test_a_clip_that_breaks_off_leaves_no_trace():
    model = load_fixture("base").model
    clips = [noise_clip(length, seed) for seed, length in enumerate([900, 400, 800, 300, 700])]
    streams = [FakeStream(n, in_pieces(clip, 100)) for n, clip in enumerate(clips)]
    streams[0] = FakeStream(0, [clips[0][:, :200], ValueError("damaged")])
    streams[3] = FakeStream(3, [ValueError("empty")])
    results = run(Coder(model, 2, CHUNK, 4, jax.devices()[:1]), streams)
    assert [(results[n].codes is None, results[n].problem) for n in range(5)] == [
        (True, "damaged"),
        (False, ""),
        (False, ""),
        (True, "empty"),
        (False, ""),
    ]
    for number in (1, 2, 4):
        np.testing.assert_array_equal(results[number].codes, codes_alone(model, clips[number], 4))


def test_clips_of_many_lengths_are_few_programs():
    model = load_fixture("base").model
    clips = [noise_clip(1 + 480 * n, seed=n) for n in range(200)]  # 4 seconds
    with counted_compilations() as compiled:
        coder = Coder(model, 3, CHUNK, 4, jax.devices()[:1])
        results = run(coder, [FakeStream(n, [clip]) for n, clip in enumerate(clips)])
    assert len(compiled) == 9  # four an octave, from 1 second on
    for number in range(0, 200, 50):
        np.testing.assert_array_equal(results[number].codes, codes_alone(model, clips[number], 4))


def test_a_batch_of_longer_clips_has_fewer_rows(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("mimi_jax.tokenization.coding.BATCH_SECONDS", 4)
    model = load_fixture("base").model
    coder = Coder(model, 8, CHUNK, 4, jax.devices()[:2])
    assert [coder._num_rows(seconds * RATE) for seconds in (1, 2, 3, 4, 5)] == [8, 4, 2, 2, 2]
    clips = [noise_clip(seconds * RATE, seed=seconds) for seconds in (1, 3, 2, 1, 3, 4)]
    results = run(coder, [FakeStream(n, [clip]) for n, clip in enumerate(clips)])
    for number, clip in enumerate(clips):
        np.testing.assert_array_equal(results[number].codes, codes_alone(model, clip, 4))


@pytest.mark.parametrize(("num_devices", "expected"), [(1, [16, 4, 1]), (2, [16, 4])])
def test_the_last_long_clips_are_not_coded_beside_empty_rows(num_devices: int, expected: list[int]):
    model = load_fixture("base").model
    clips = [noise_clip(length, seed) for seed, length in enumerate([3000, 500, 600, 5000, 700])]
    coder, sizes = Coder(model, 16, CHUNK, 4, jax.devices()[:num_devices]), []
    encode_chunks = coder._encode_chunks

    def spy() -> Iterator[Any]:
        sizes.append(len(coder._rows))
        return encode_chunks()

    coder._encode_chunks = spy  # type: ignore[method-assign]
    results = run(coder, [FakeStream(n, in_pieces(clip, 100)) for n, clip in enumerate(clips)])
    assert sorted(sizes, reverse=True) == sizes
    assert sorted(set(sizes), reverse=True) == expected
    for number, clip in enumerate(clips):
        np.testing.assert_array_equal(results[number].codes, codes_alone(model, clip, 4))
    with counted_compilations() as compiled:
        run(coder, [FakeStream(n, in_pieces(clip, 100)) for n, clip in enumerate(clips)])
    assert len(compiled) == 0


def test_a_run_that_was_broken_off_leaves_no_trace():
    model = load_fixture("base").model
    clips = [noise_clip(length, seed) for seed, length in enumerate([9000, 700, 3000, 8000, 500, 600])]
    coder = Coder(model, 4, CHUNK, 4, jax.devices()[:1])
    streams = [FakeStream(n, in_pieces(clip, 100)) for n, clip in enumerate(clips)]
    broken_off = coder.run(iter(streams), ignore)  # type: ignore[arg-type]
    assert [next(broken_off).reader.key for _ in range(5)][-1] == 3  # of the last one, alone in few rows
    results = run(coder, [FakeStream(n, in_pieces(clip, 100)) for n, clip in enumerate(clips)])
    for number, clip in enumerate(clips):
        np.testing.assert_array_equal(results[number].codes, codes_alone(model, clip, 4))


def test_a_clip_of_a_rare_length_does_not_wait_forever():
    rare, count = noise_clip(2 * RATE), 0
    streams: list[Any] = [
        FakeStream(n, [rare if n == 1 else noise_clip(FRAME)]) for n in range(3 * FLUSH_BATCHES * 2)
    ]
    streams[2] = FakeStream(2, in_pieces(noise_clip(3 * CHUNK * FRAME), 100))
    for count, result in enumerate(
        Coder(load_fixture("base").model, 2, CHUNK, 4, jax.devices()[:1]).run(iter(streams), ignore), 1
    ):
        if result.reader.key in (1, 2):
            assert count <= FLUSH_BATCHES * 2
    assert count == len(streams)


def test_streams_are_not_taken_long_before_their_turn():
    taken = 0

    def streams() -> Iterator[Any]:
        nonlocal taken
        for number in range(100):
            taken += 1
            yield FakeStream(number, [noise_clip(FRAME)])

    results = Coder(load_fixture("base").model, 4, CHUNK, 4, jax.devices()[:1]).run(streams(), ignore)
    for count, _ in enumerate(results, 1):
        assert taken <= count + 4 * 5  # waiting, in flight and ahead
    assert taken == 100


@pytest.mark.parametrize(
    ("batch_size", "quantizers", "error"),
    [
        (3, 4, "batch_size must be a multiple of the 2 devices, got 3"),
        (2, 99, "num_quantizers"),
    ],
)
def test_what_does_not_fit_is_refused(batch_size: int, quantizers: int, error: str):
    with pytest.raises(ValueError, match=error):
        Coder(load_fixture("base").model, batch_size, CHUNK, quantizers, jax.devices()[:2])
