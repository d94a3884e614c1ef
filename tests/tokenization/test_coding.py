"""Clips that are encoded together, short or long, get the codes that they get alone."""

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import pytest

from mimi_jax import Mimi
from mimi_jax.tokenization.coding import FLUSH_BATCHES, Coder
from mimi_jax.tokenization.job import counted_compilations
from mimi_jax.tokenization.programs import Programs
from mimi_jax.tokenization.sources import Item
from mimi_jax.tokenization.workers import ClipError, Piece
from tests.models import load_fixture
from tests.tokenization.corpora import RATE, codes_alone, noise_clip

CHUNK = 5  # frames
FRAME = 16  # samples of a frame of the tiny models


class FakeReader:
    """Stands for a `ClipReader` whose pieces are already there. One of them may be an error."""

    def __init__(self, number: int, pieces: list[np.ndarray | Exception]):
        self.key, self.item = number, Item(str(number))
        self._pieces = pieces

    def next(self) -> Piece:
        piece = self._pieces.pop(0)
        if isinstance(piece, Exception):
            raise piece
        return Piece(piece, is_last=not self._pieces)


def make_coder(model: Mimi, batch_size: int, num_quantizers: int, devices: list[Any]) -> Coder:
    return Coder(Programs(model, num_quantizers, devices), batch_size, CHUNK)


def in_pieces(audio: np.ndarray, size: int) -> list[Any]:
    return [audio[:, first : first + size] for first in range(0, audio.shape[1], size)]


def ignore(_: int) -> None:
    pass


def run(coder: Coder, readers: list[FakeReader]) -> dict[int, Any]:
    results = list(coder.run(iter(readers), ignore))  # type: ignore[arg-type]
    assert len({result.reader.key for result in results}) == len(results) == len(readers)
    return {result.reader.key: result for result in results}


LENGTHS = [1, 15, 16, 17, 79, 80, 81, 160, 999, 1, 2000, 80, 80, 16, 999, 160, 999]


@pytest.mark.parametrize(
    ("fixture", "num_devices"),
    [
        ("base", 8),
        ("replicate", 1),
        pytest.param("base", 1, marks=pytest.mark.slow),
        pytest.param("stereo", 8, marks=pytest.mark.slow),
    ],
)
def test_each_clip_gets_the_codes_that_it_gets_alone(fixture: str, num_devices: int):
    model = load_fixture(fixture).model
    channels = model.config.audio_channels
    frame_size = model.config.frame_size
    lengths = [length * frame_size // FRAME or 1 for length in LENGTHS]
    clips = [noise_clip(length, seed, channels) for seed, length in enumerate(lengths)]
    readers = [FakeReader(n, in_pieces(clip, 83 * (n % 3 + 1))) for n, clip in enumerate(clips)]
    quantizers = model.config.num_quantizers
    with jax.transfer_guard("disallow"):
        coder = make_coder(model, 8, quantizers, jax.devices()[:num_devices])
        results = run(coder, readers)
    for number, clip in enumerate(clips):
        result = results[number]
        np.testing.assert_array_equal(result.codes, codes_alone(model, clip))
        assert result.codes.dtype == np.uint16
        assert result.num_samples == clip.shape[1]


def test_fewer_codebooks_are_the_first_ones():
    model, clip = load_fixture("base").model, noise_clip(500)
    result = run(make_coder(model, 2, 3, jax.devices()[:1]), [FakeReader(0, [clip])])[0]
    np.testing.assert_array_equal(result.codes, codes_alone(model, clip)[:3])


def test_a_clip_that_fails_in_the_middle_does_not_affect_others():
    model = load_fixture("base").model
    clips = [noise_clip(length, seed) for seed, length in enumerate([900, 400, 800, 300, 700])]
    streams = [FakeReader(n, in_pieces(clip, 100)) for n, clip in enumerate(clips)]
    streams[0] = FakeReader(0, [clips[0][:, :200], ClipError("damaged", is_transient=True)])
    streams[3] = FakeReader(3, [ClipError("empty", is_transient=False)])
    results = run(make_coder(model, 2, 4, jax.devices()[:1]), streams)
    assert [(results[n].codes is None, results[n].problem) for n in range(5)] == [
        (True, "damaged"),
        (False, ""),
        (False, ""),
        (True, "empty"),
        (False, ""),
    ]
    for number in (1, 2, 4):
        np.testing.assert_array_equal(results[number].codes, codes_alone(model, clips[number], 4))


def test_clips_of_many_lengths_need_few_programs():
    model = load_fixture("base").model
    clips = [noise_clip(1 + 960 * n, seed=n) for n in range(50)]  # 2 seconds
    with counted_compilations() as compiled:
        coder = make_coder(model, 3, 4, jax.devices()[:1])
        results = run(coder, [FakeReader(n, [clip]) for n, clip in enumerate(clips)])
    assert len(compiled) == 5  # four lengths for each doubling, from 1 second on
    for number in (0, 25, 49):
        np.testing.assert_array_equal(results[number].codes, codes_alone(model, clips[number], 4))


def test_a_batch_of_longer_clips_has_fewer_rows(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("mimi_jax.tokenization.coding.BATCH_SECONDS", 4)
    model = load_fixture("base").model
    coder = make_coder(model, 8, 4, jax.devices()[:2])
    assert [coder._num_rows(seconds * RATE) for seconds in (1, 2, 3, 4, 5)] == [8, 4, 2, 2, 2]
    clips = [noise_clip(seconds * RATE, seed=seconds) for seconds in (1, 3, 2, 1, 3, 4)]
    results = run(coder, [FakeReader(n, [clip]) for n, clip in enumerate(clips)])
    for number, clip in enumerate(clips):
        np.testing.assert_array_equal(results[number].codes, codes_alone(model, clip, 4))


@pytest.mark.parametrize(("num_devices", "expected"), [(1, [16, 4, 1]), (2, [16, 4])])
def test_the_batch_shrinks_with_the_number_of_long_clips(num_devices: int, expected: list[int]):
    model = load_fixture("base").model
    clips = [noise_clip(length, seed) for seed, length in enumerate([3000, 500, 600, 5000, 700])]
    coder, sizes = make_coder(model, 16, 4, jax.devices()[:num_devices]), []
    encode_chunks = coder._encode_chunks

    def spy() -> Iterator[Any]:
        sizes.append(len(coder._rows))
        return encode_chunks()

    coder._encode_chunks = spy  # type: ignore[method-assign]
    results = run(coder, [FakeReader(n, in_pieces(clip, 100)) for n, clip in enumerate(clips)])
    assert sorted(sizes, reverse=True) == sizes
    assert sorted(set(sizes), reverse=True) == expected
    for number, clip in enumerate(clips):
        np.testing.assert_array_equal(results[number].codes, codes_alone(model, clip, 4))
    with counted_compilations() as compiled:
        run(coder, [FakeReader(n, in_pieces(clip, 100)) for n, clip in enumerate(clips)])
    assert len(compiled) == 0


def test_a_run_that_was_stopped_does_not_affect_the_next():
    model = load_fixture("base").model
    clips = [noise_clip(length, seed) for seed, length in enumerate([9000, 700, 3000, 8000, 500, 600])]
    coder = make_coder(model, 4, 4, jax.devices()[:1])
    streams = [FakeReader(n, in_pieces(clip, 100)) for n, clip in enumerate(clips)]
    stopped = coder.run(iter(streams), ignore)  # type: ignore[arg-type]
    assert [next(stopped).reader.key for _ in range(5)][-1] == 3  # the last clip, alone in a small batch
    results = run(coder, [FakeReader(n, in_pieces(clip, 100)) for n, clip in enumerate(clips)])
    for number, clip in enumerate(clips):
        np.testing.assert_array_equal(results[number].codes, codes_alone(model, clip, 4))


def test_a_clip_of_a_rare_length_is_encoded_after_a_while():
    rare, count = noise_clip(2 * RATE), 0
    streams: list[Any] = [
        FakeReader(n, [rare if n == 1 else noise_clip(FRAME)]) for n in range(3 * FLUSH_BATCHES * 2)
    ]
    streams[2] = FakeReader(2, in_pieces(noise_clip(3 * CHUNK * FRAME), 100))
    for count, result in enumerate(
        make_coder(load_fixture("base").model, 2, 4, jax.devices()[:1]).run(iter(streams), ignore), 1
    ):
        if result.reader.key in (1, 2):
            assert count <= FLUSH_BATCHES * 2
    assert count == len(streams)


def test_two_batches_are_in_flight_while_the_next_is_put_together(monkeypatch: pytest.MonkeyPatch):
    coder, events = make_coder(load_fixture("base").model, 2, 4, jax.devices()[:1]), []
    for name in ("encode", "fetch"):
        method = getattr(coder._programs, name)
        monkeypatch.setattr(
            coder._programs, name, lambda *args, n=name, m=method: events.append(n) or m(*args)
        )
    run(coder, [FakeReader(n, [noise_clip(FRAME)]) for n in range(10)])
    assert events == ["encode"] * 2 + ["encode", "fetch"] * 3 + ["fetch"] * 2


def test_only_clips_that_waited_long_are_encoded_in_batches_that_are_not_full():
    """If all were, the device would wait until there are enough new ones."""
    coder, sizes = make_coder(load_fixture("base").model, 2, 4, jax.devices()[:1]), []
    encode_whole = coder._encode_whole
    coder._encode_whole = lambda clips: sizes.append(len(clips)) or encode_whole(clips)  # type: ignore
    period = FLUSH_BATCHES  # half of the clips that the wait takes
    lengths = [2 * RATE if n in (0, 3 * period - 2) else FRAME for n in range(4 * period)]
    run(coder, [FakeReader(n, [noise_clip(length)]) for n, length in enumerate(lengths)])
    assert [index for index, size in enumerate(sizes) if size == 1] == [period - 1, len(sizes) - 1]


def test_clips_are_not_opened_long_before_their_turn():
    taken = 0

    def streams() -> Iterator[Any]:
        nonlocal taken
        for number in range(100):
            taken += 1
            yield FakeReader(number, [noise_clip(FRAME)])

    results = make_coder(load_fixture("base").model, 4, 4, jax.devices()[:1]).run(streams(), ignore)
    for count, _ in enumerate(results, 1):
        assert taken <= count + 4 * 5  # those that wait, that are being encoded, and that were taken ahead
    assert taken == 100


@pytest.mark.parametrize(
    ("batch_size", "quantizers", "error"),
    [
        (3, 4, "batch_size must be a multiple of the 2 devices, got 3"),
        (2, 99, "num_quantizers"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(batch_size: int, quantizers: int, error: str):
    with pytest.raises(ValueError, match=error):
        make_coder(load_fixture("base").model, batch_size, quantizers, jax.devices()[:2])
