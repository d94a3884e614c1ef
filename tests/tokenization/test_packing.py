"""Rows have one length and hold every frame once, clips stay whole where they fit, and all appear or none."""

import hashlib
import pickle
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mimi_jax.tokenization import PackedRow, PackedSource, pack, packing
from mimi_jax.tokenization.output import Output
from mimi_jax.tokenization.packed import ROW_GROUP
from mimi_jax.tokenization.packing import OPEN_ROWS, pack_rows
from mimi_jax.tokenization.records import TokenizedClip

FORMATS = pytest.mark.parametrize("format", ["parquet", "arrayrecord"])


def make_clips(lengths: Iterable[int], source: str = "s", quantizers: int = 3) -> list[TokenizedClip]:
    """Clips whose codes are random, by their number."""
    return [
        TokenizedClip(
            f"{source}/é{number}",
            source,
            1920 * frames,
            np.random.default_rng(number).integers(0, 2048, (quantizers, frames)).astype(np.uint16),
        )
        for number, frames in enumerate(lengths)
    ]


def write_tokens(folder: Path, shards: list[list[TokenizedClip]], planned: int | None = None) -> Path:
    """A folder as `tokenize` leaves it, complete unless more shards are planned."""
    settings = {"num_shards": planned or len(shards), "sampling_rate": 24_000, "num_quantizers": 3}
    output = Output(folder, settings, {"model_type": "mimi"})
    for number, clips in enumerate(shards):
        output.write(number, clips, [], Counter())
    output.finish()
    return folder


def unpack(rows: Iterable[PackedRow]) -> dict[str, np.ndarray]:
    """The codes of the clips, put together again; every frame must be there once."""
    frames: dict[str, dict[int, np.ndarray]] = {}
    for row in rows:
        assert set(row.segment_ids) <= set(range(len(row.ids) + 1))
        for column, segment, position in zip(row.codes.T, row.segment_ids, row.positions, strict=True):
            if segment:
                clip = frames.setdefault(row.ids[segment - 1], {})
                assert int(position) not in clip
                clip[int(position)] = column
            else:
                assert position == 0 and not column.any()
    for clip in frames.values():
        assert set(clip) == set(range(len(clip)))
    return {name: np.stack([clip[n] for n in range(len(clip))], 1) for name, clip in frames.items()}


def assert_same(rows: Iterable[PackedRow], clips: list[TokenizedClip]):
    found = unpack(rows)
    assert found.keys() == {clip.id for clip in clips}
    for clip in clips:
        np.testing.assert_array_equal(found[clip.id], clip.codes)


def read(folder: Path) -> list[PackedRow]:
    source = PackedSource(folder)
    return [source[number] for number in range(len(source))]


def lengths(seed: int, count: int, longest: int) -> list[int]:
    return np.random.default_rng(seed).integers(1, longest + 1, count).tolist()


@given(st.lists(st.integers(1, 40), max_size=30), st.integers(1, 20))
def test_rows_hold_every_frame_once(frames: list[int], length: int):
    clips = make_clips(frames)
    rows = list(pack_rows(clips, length))
    assert all(row.codes.shape == (3, length) and row.codes.dtype == np.uint16 for row in rows)
    assert_same(rows, clips)
    pieces = Counter(name for row in rows for name in row.ids)
    assert all(pieces[clip.id] == -(-clip.codes.shape[1] // length) for clip in clips)


def test_a_clip_goes_into_the_row_that_it_fills_best():
    rows = list(pack_rows(make_clips([6, 7, 3, 4]), 10))
    assert [row.ids for row in rows] == [("s/é1", "s/é2"), ("s/é0", "s/é3")]
    assert rows[0].segment_ids.tolist() == [1] * 7 + [2] * 3
    assert rows[0].positions.tolist() == [*range(7), *range(3)]


def test_few_rows_are_open_at_a_time():
    taken = 0

    def clips():
        nonlocal taken
        for taken, clip in enumerate(make_clips([6] * 200), 1):  # noqa: B007 - two never fit into a row
            yield clip

    for number, _ in zip(range(200 - OPEN_ROWS), pack_rows(clips(), 10), strict=False):
        assert taken == number + 1 + OPEN_ROWS


def test_rows_of_many_clips_are_almost_full():
    frames = lengths(0, 3000, 250)
    rows = list(pack_rows(make_clips(frames, quantizers=1), 1000))
    assert sum(frames) / (1000 * len(rows)) > 0.98


@FORMATS
def test_what_is_packed_can_be_read_by_number(tmp_path: Path, format: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(packing, "ROWS_PER_FILE", 2 * ROW_GROUP + 1)
    clips = make_clips(lengths(1, 300, 60))
    tokens = write_tokens(tmp_path / "tokens", [clips[:130], [], clips[130:]])
    packed = pack(tokens, tmp_path / "packed", 64, format=format)
    frames = sum(clip.codes.shape[1] for clip in clips)
    assert packed[:2] == (300, frames) and packed.filled == frames / (64 * packed.rows)
    source = pickle.loads(pickle.dumps(PackedSource(tmp_path / "packed")))
    assert len(source) == packed.rows > 2 * (2 * ROW_GROUP + 1)
    order = np.random.default_rng(0).permutation(len(source))
    rows = [source[index] for index in order]
    assert all(row.codes.shape == (3, 64) and row.codes.dtype == np.uint16 for row in rows)
    assert all(row.positions.dtype == row.segment_ids.dtype == np.int32 for row in rows)
    assert_same(rows, clips)
    expected = list(pack_rows(clips, 64))
    for index, row in zip(order, rows, strict=True):
        assert row.ids == expected[index].ids
        np.testing.assert_array_equal(row.codes, expected[index].codes)
    for index in (-1, len(source)):
        with pytest.raises(IndexError, match=r"index must lie in \[0, "):
            source[index]


@FORMATS
def test_the_same_codes_give_the_same_bytes(tmp_path: Path, format: str):
    tokens = write_tokens(tmp_path / "tokens", [make_clips(lengths(2, 100, 60))])
    sums = []
    for name in ("one", "two"):
        pack(tokens, tmp_path / name, 64, format=format)
        files = sorted(path for path in (tmp_path / name).rglob("*") if path.is_file())
        sums.append([(f.name, hashlib.sha256(f.read_bytes()).hexdigest()) for f in files])
    assert len(sums[0]) == 2 and sums[0] == sums[1]


@FORMATS
def test_each_source_has_a_folder(tmp_path: Path, format: str):
    one, two = make_clips([5, 6, 7], "/data/one.tar"), make_clips([8, 9], "../two/")
    tokens = write_tokens(tmp_path / "tokens", [one[:2], one[2:], two])
    packed = pack(tokens, tmp_path / "packed", 16, split_by_source=True, format=format)
    assert packed.clips == 5
    names = sorted(path.name for path in (tmp_path / "packed").iterdir())
    assert names == ["000-one.tar", "001-two", "manifest.json"]
    assert_same(read(tmp_path / "packed" / "000-one.tar"), one)
    assert_same(read(tmp_path / "packed" / "001-two"), two)
    assert_same(read(tmp_path / "packed"), one + two)


def test_parquet_files_have_the_documented_columns(tmp_path: Path):
    pack(write_tokens(tmp_path / "tokens", [make_clips([5, 6])]), tmp_path / "packed", 16)
    table = pq.read_table(tmp_path / "packed" / "rows" / "00000.parquet")
    assert [(field.name, str(field.type)) for field in table.schema] == [
        ("codes", "fixed_size_list<element: fixed_size_list<element: uint16>[16]>[3]"),
        ("segment_ids", "fixed_size_list<element: int32>[16]"),
        ("positions", "fixed_size_list<element: int32>[16]"),
        ("ids", "list<element: string>"),
    ]
    assert table["ids"].to_pylist() == [["s/é0", "s/é1"]]


@FORMATS
def test_grain_shuffles_and_batches(tmp_path: Path, format: str):
    grain = pytest.importorskip("grain")
    clips = make_clips(lengths(3, 50, 30))
    pack(write_tokens(tmp_path / "tokens", [clips]), tmp_path / "packed", 32, format=format)
    dataset = grain.MapDataset.source(PackedSource(tmp_path / "packed")).shuffle(seed=0)
    assert_same(dataset.to_iter_dataset(), clips)
    batch = next(iter(dataset.map(lambda row: row._replace(ids=0)).batch(4)))
    assert batch.codes.shape == (4, 3, 32) and batch.segment_ids.shape == (4, 32)


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    tokens = write_tokens(tmp_path / "tokens", [make_clips([5, 6])])

    def fail(*_: object):
        raise OSError("no space left")

    monkeypatch.setattr(packing, "write_rows", fail)
    with pytest.raises(OSError, match="no space left"):
        pack(tokens, tmp_path / "packed", 16)
    assert [path.name for path in tmp_path.iterdir()] == ["tokens"]


def test_what_cannot_be_packed_is_refused(tmp_path: Path):
    tokens = write_tokens(tmp_path / "tokens", [make_clips([5])])
    partial = write_tokens(tmp_path / "partial", [make_clips([5])], planned=2)
    empty = write_tokens(tmp_path / "empty", [[]])
    for arguments, error, message in (
        ((partial, "out", 16), ValueError, "is not complete; run `mimi-jax tokenize` again"),
        ((empty, "out", 16), ValueError, "has no clips"),
        ((tmp_path, "out", 16), FileNotFoundError, "must be an output of `mimi-jax tokenize`"),
        ((tokens, "out", 0), ValueError, "length must be positive"),
        ((tokens, "tokens", 16), FileExistsError, "exists; name another folder"),
    ):
        with pytest.raises(error, match=message):
            pack(arguments[0], tmp_path / arguments[1], arguments[2])
    with pytest.raises(ValueError, match="one of parquet, arrayrecord, got 16 and 'csv'"):
        pack(tokens, tmp_path / "out", 16, format="csv")
    for folder in (tmp_path / "out", tokens):
        with pytest.raises(FileNotFoundError, match="must be an output of `mimi-jax pack`"):
            PackedSource(folder)
    assert not (tmp_path / "out").exists()
