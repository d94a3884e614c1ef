"""Where codes go: a folder of Parquet files, each of which appears whole or not at all.

    manifest.json                what the codes are: the model's identity and configuration, settings, totals
    codes/00003-of-00120.parquet the clips of a shard, in the order of the input
    errors/00003-of-00120.parquet its clips that could not be coded, with the reason, where there are any
    work/                        locks, and files that are not whole yet

A shard whose codes are there is done. Errors are written before codes, so that a kill between the two repeats
the shard and loses nothing. pyarrow is imported by the functions that need it.
"""

import contextlib
import functools
import json
import os
import secrets
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mimi_jax.files.atomic import file_lock

FORMAT = "mimi_jax.tokens"
VERSION = 1
OWN = {"manifest.json", "codes", "errors", "work"}
ROW_GROUP = 64  # clips: what a random access reads and decompresses


class Totals(NamedTuple):
    """Of a shard, or of all."""

    clips: int = 0
    errors: int = 0
    samples: int = 0
    frames: int = 0

    def __add__(self, other: "Totals") -> "Totals":  # type: ignore[override]
        return Totals(*(a + b for a, b in zip(self, other, strict=True)))


class Row(NamedTuple):
    id: str
    source: str
    num_samples: int
    codes: np.ndarray  # uint16 [num_quantizers, num_frames]


class Failure(NamedTuple):
    id: str
    source: str
    reason: str


@functools.cache
def code_schema() -> Any:
    import pyarrow as pa

    return pa.schema(
        [
            ("id", pa.string()),
            ("source", pa.string()),
            ("num_samples", pa.int64()),
            ("num_frames", pa.int32()),
            ("num_quantizers", pa.int32()),
            ("codes", pa.list_(pa.uint16())),
        ]
    )


class Output:
    """The folder of a job, which may have been begun before, and may be written by others at the same time.

    Args:
        folder: made where there is none.
        settings: what decides the codes and where they stand, as JSON has it. `num_shards` is among them.
        config: the model's, for the manifest.

    Raises:
        ValueError: the folder holds the codes of another job, or files that are none.
    """

    def __init__(self, folder: Path, settings: dict[str, Any], config: dict[str, Any]):
        self.folder, self.settings, self.config = folder, settings, config
        self.num_shards: int = settings["num_shards"]
        self.manifest = folder / "manifest.json"
        self._work = folder / "work"
        if not _is_own(folder):
            raise ValueError(f"{folder} holds files, but not those of a tokenization; name another folder")
        for path in (folder / "codes", folder / "errors", self._work):
            path.mkdir(parents=True, exist_ok=True)
        with file_lock(self._work / "manifest.lock"):  # another process may begin at the same moment
            if self.manifest.exists():
                check_same(folder, json.loads(self.manifest.read_text())["settings"], settings)
            else:
                self._write_manifest(Totals(), 0)

    def name(self, shard: int) -> str:
        width = max(5, len(str(self.num_shards)))  # so that names sort as numbers do
        return f"{shard:0{width}}-of-{self.num_shards:0{width}}.parquet"

    def is_done(self, shard: int) -> bool:
        return (self.folder / "codes" / self.name(shard)).exists()

    @contextlib.contextmanager
    def claim(self, shard: int, wait: bool = False) -> Iterator[bool]:
        """Whether the shard is this process' to do: nobody else is at it, and it is not done.

        The claim ends with the block, or with the process, however it ends.

        Args:
            wait: for whoever is at it to finish, or to die.
        """
        with file_lock(self._work / f"{shard:05}.lock", wait) as is_mine:
            yield is_mine and not self.is_done(shard)

    def write(self, shard: int, rows: Sequence[Row], failures: Sequence[Failure]) -> Totals:
        """Write a shard, which is done then."""
        import pyarrow as pa

        frames = sum(row.codes.shape[1] for row in rows)
        totals = Totals(len(rows), len(failures), sum(row.num_samples for row in rows), frames)
        errors = self.folder / "errors" / self.name(shard)
        if failures:
            columns = dict(zip(Failure._fields, map(list, zip(*failures, strict=True)), strict=True))
            self._write_tables([pa.table(columns)], errors)
        else:
            errors.unlink(missing_ok=True)
        metadata = {"format": FORMAT, "settings": json.dumps(self.settings), "totals": json.dumps(totals)}
        groups = [rows[first : first + ROW_GROUP] for first in range(0, max(len(rows), 1), ROW_GROUP)]
        tables = (_table(group).replace_schema_metadata(metadata) for group in groups)
        self._write_tables(tables, self.folder / "codes" / self.name(shard))
        return totals

    def _write_tables(self, tables: Iterable[Any], path: Path) -> None:
        """Each a row group of one file."""
        import pyarrow.parquet as pq

        def write(temporary: Path) -> None:
            with contextlib.ExitStack() as stack:
                writer = None
                for table in tables:
                    if writer is None:
                        writer = pq.ParquetWriter(temporary, table.schema, compression="zstd")
                        stack.enter_context(writer)
                    writer.write_table(table)

        self._replace(path, write)

    def _replace(self, path: Path, write: Callable[[Path], object]) -> None:
        """Write a file, whole or not at all. Not beside it, where readers would take a part of it for all."""
        temporary = self._work / f"{secrets.token_hex(4)}-{path.name}"
        try:
            write(temporary)
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise

    def finish(self) -> tuple[Totals, int]:
        """Bring the manifest up to date; returns the totals of all shards that are done, and their number."""
        done = [shard for shard in range(self.num_shards) if self.is_done(shard)]
        totals = sum((self.totals(shard) for shard in done), Totals())
        with file_lock(self._work / "manifest.lock"):
            if (
                len(done) >= json.loads(self.manifest.read_text())["shards_done"]
            ):  # else others have seen more
                self._write_manifest(totals, len(done))
        if len(done) == self.num_shards:
            for rest in self._work.glob("*.parquet"):  # of processes that were killed
                rest.unlink(missing_ok=True)
        return totals, len(done)

    def forget_errors(self, shards: Iterable[int]) -> None:
        """Undo those of some shards that have errors, so that they are done again."""
        for name in map(self.name, shards):
            if (self.folder / "errors" / name).exists():
                (self.folder / "codes" / name).unlink(missing_ok=True)
                (self.folder / "errors" / name).unlink(missing_ok=True)
        with file_lock(self._work / "manifest.lock"):
            self._write_manifest(Totals(), 0)  # of which `finish` makes the true ones

    def totals(self, shard: int) -> Totals:
        """Of a shard that is done."""
        import pyarrow.parquet as pq

        metadata = pq.read_schema(self.folder / "codes" / self.name(shard)).metadata
        return Totals(*json.loads(metadata[b"totals"]))

    def _write_manifest(self, totals: Totals, num_done: int) -> None:
        fields = {
            "format": FORMAT,
            "version": VERSION,
            "complete": num_done == self.num_shards,
            "shards_done": num_done,
            "totals": {**totals._asdict(), "hours": round(self._hours(totals), 4)},
            "settings": self.settings,
            "config": self.config,
            "libraries": _versions(),
        }
        self._replace(self.manifest, lambda path: path.write_text(json.dumps(fields, indent=2) + "\n"))

    def _hours(self, totals: Totals) -> float:
        return totals.samples / self.settings["sampling_rate"] / 3600


def _table(rows: Sequence[Row]) -> Any:
    import pyarrow as pa

    offsets = np.cumsum([0, *(row.codes.size for row in rows)])
    flat = np.concatenate([np.zeros(0, np.uint16), *(row.codes.ravel() for row in rows)])
    columns = [
        [row.id for row in rows],
        [row.source for row in rows],
        [row.num_samples for row in rows],
        [row.codes.shape[1] for row in rows],
        [len(row.codes) for row in rows],
        pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(flat)),
    ]
    arrays = [pa.array(column, field.type) for column, field in zip(columns, code_schema(), strict=True)]
    return pa.table(arrays, schema=code_schema())


def _is_own(folder: Path) -> bool:
    """Whether a folder is a tokenization's, or nobody's yet."""
    if not folder.is_dir():
        return not folder.exists()
    if {path.name for path in folder.iterdir()} - OWN:
        return False
    manifest = folder / "manifest.json"
    try:
        return not manifest.exists() or json.loads(manifest.read_text())["format"] == FORMAT
    except (ValueError, KeyError, TypeError):
        return False


def check_same(folder: Path, old: dict[str, Any], new: dict[str, Any]) -> None:
    """Refuse to mix codes of two kinds."""
    changes = [
        f"{name} was {old.get(name)!r} and is {new.get(name)!r}"
        for name in old | new
        if old.get(name) != new.get(name)
    ]
    if changes:
        raise ValueError(
            f"{folder} holds codes of other settings: {'; '.join(changes)}. Name another folder, or the same"
            " settings"
        )


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {
        name: version(name) for name in ("mimi_jax", "jax", "flax", "numpy", "pyarrow", "soundfile", "soxr")
    }
