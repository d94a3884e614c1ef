"""Files of packed rows: Parquet for most loaders, ArrayRecord for Grain, and rows by number from both.

pyarrow and array_record are imported by the functions that need them.
"""

import itertools
import json
import os
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors.numpy import load, save

from mimi_jax.files.corpus import expand_home

ROW_GROUP = 16  # rows of a Parquet file that are read and decompressed together, even if only one is wanted


class PackedRow(NamedTuple):
    """Clips after each other, in a row of fixed length."""

    codes: np.ndarray  # uint16 [num_quantizers, length], 0 after the last clip
    segment_ids: np.ndarray  # int32 [length], 1 for the frames of the first clip, 2, ...; 0 after the last
    positions: np.ndarray  # int32 [length], the number of a frame in its clip
    ids: tuple[str, ...]  # of the clips: segment n is clip ids[n - 1], or a part of it


class PackedSource:
    """The rows of a folder by number, as a data source for Grain.

        dataset = grain.MapDataset.source(PackedSource("packed")).shuffle(seed=0).batch(16)

    From Parquet files, 16 rows are read for one. From ArrayRecord files, each row is read alone.

    Args:
        folder: the output of `pack`, or the folder of one source in it.

    Raises:
        FileNotFoundError: the folder has no packed rows.
    """

    def __init__(self, folder: str | os.PathLike[str]):
        place = Path(expand_home(folder))
        files = {format: sorted(place.rglob(f"*.{format}")) for format in WRITERS}
        if not any(files.values()) or not _are_rows(files["parquet"][:1]):
            raise FileNotFoundError(f"{folder} must be an output of `mimi-jax pack`, but has no packed rows")
        self._rows = _ParquetRows(files["parquet"]) if files["parquet"] else _Records(files["arrayrecord"])
        self._name = f"PackedSource({sum(map(len, files.values()))} files, {len(self)} rows)"

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> PackedRow:
        if not 0 <= index < len(self):
            raise IndexError(f"index must lie in [0, {len(self)}), the number of rows, got {index}")
        return self._rows.read(int(index))

    def __repr__(self) -> str:  # Grain compares it when it resumes from a checkpoint
        return self._name


def _are_rows(paths: Sequence[Path]) -> bool:
    """Whether Parquet files hold packed rows, and not codes or a plan."""
    import pyarrow.parquet as pq

    return all(set(PackedRow._fields) <= set(pq.read_schema(path).names) for path in paths)


class _ParquetRows:
    def __init__(self, paths: Sequence[Path]):
        import pyarrow.parquet as pq

        self._groups: list[tuple[Path, int]] = []
        counts: list[int] = []
        for path in paths:
            metadata = pq.read_metadata(path)
            for group in range(metadata.num_row_groups):
                self._groups.append((path, group))
                counts.append(metadata.row_group(group).num_rows)
        self._starts = [0, *itertools.accumulate(counts)]
        self._last: tuple[int, list[PackedRow]] = (-1, [])  # the group that was read last

    def __len__(self) -> int:
        return self._starts[-1]

    def read(self, index: int) -> PackedRow:
        import pyarrow.parquet as pq

        number = bisect_right(self._starts, index) - 1
        known, rows = self._last  # once, since Grain reads in several threads
        if known != number:
            path, group = self._groups[number]
            with pq.ParquetFile(path) as file:
                rows = _rows(file.read_row_group(group))
            self._last = number, rows
        return rows[index - self._starts[number]]


class _Records:
    def __init__(self, paths: Sequence[Path]):
        from array_record.python.array_record_data_source import ArrayRecordDataSource

        self._source = ArrayRecordDataSource([str(path) for path in paths])

    def __len__(self) -> int:
        return len(self._source)

    def read(self, index: int) -> PackedRow:
        arrays = load(self._source[index])
        ids = json.loads(arrays.pop("ids").tobytes())
        return PackedRow(**arrays, ids=tuple(ids))


def _write_parquet(path: Path, rows: Iterator[PackedRow]) -> None:
    import pyarrow.parquet as pq

    tables = map(_table, iter(lambda: list(itertools.islice(rows, ROW_GROUP)), []))
    first = next(tables)
    with pq.ParquetWriter(path, first.schema, compression="zstd") as writer:
        for table in itertools.chain([first], tables):
            writer.write_table(table)


def _write_records(path: Path, rows: Iterator[PackedRow]) -> None:
    from array_record.python.array_record_module import ArrayRecordWriter

    writer = ArrayRecordWriter(str(path), "group_size:1")  # records that are compressed together
    try:
        for row in rows:
            ids = np.frombuffer(json.dumps(row.ids).encode(), np.uint8)
            writer.write(save({**row._asdict(), "ids": ids}))
    finally:
        writer.close()


WRITERS = {"parquet": _write_parquet, "arrayrecord": _write_records}


def write_rows(path: Path, rows: Iterable[PackedRow]) -> None:
    """Write one or more rows, in the format that the suffix of the path names."""
    WRITERS[path.suffix[1:]](path, iter(rows))


def _table(rows: Sequence[PackedRow]) -> Any:
    import pyarrow as pa

    def fixed(arrays: Sequence[np.ndarray]) -> Any:
        stacked = np.stack(arrays)
        values = pa.array(stacked.ravel())
        for size in reversed(stacked.shape[1:]):
            values = pa.FixedSizeListArray.from_arrays(values, size)
        return values

    codes, segment_ids, positions, ids = zip(*rows, strict=True)
    columns = [fixed(codes), fixed(segment_ids), fixed(positions), pa.array(ids, pa.list_(pa.string()))]
    return pa.table(columns, names=list(PackedRow._fields))


def _rows(table: Any) -> list[PackedRow]:
    count = len(table)
    flat = [table[name].combine_chunks() for name in ("codes", "segment_ids", "positions")]
    codes, segment_ids, positions = flat[0].flatten().flatten(), flat[1].flatten(), flat[2].flatten()
    length = len(positions) // count
    columns = (
        codes.to_numpy().reshape(count, -1, length),
        segment_ids.to_numpy().reshape(count, length),
        positions.to_numpy().reshape(count, length),
        map(tuple, table["ids"].to_pylist()),
    )
    return list(itertools.starmap(PackedRow, zip(*columns, strict=True)))
