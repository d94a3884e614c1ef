"""The output of a job: a folder of Parquet files, each of which appears whole or not at all.

    manifest.json                what the codes are: the model's identity and configuration, settings, totals
    plan.parquet                 the shards of the job and the clips in them; see `mimi_jax.tokenization.plan`
    totals.json                  the totals of each shard, as its file has them; a run reads only new files
    codes/00003-of-00120.parquet the clips of a shard, in the order of the input
    errors/00003-of-00120.parquet its clips that could not be encoded, with the reasons; only if there are any
    work/                        locks, and files that are not complete yet

A shard is done once its file of codes exists. Errors are written before codes, so that a job that is killed
between the two repeats the shard and loses nothing. pyarrow is imported by the functions that need it.
"""

import contextlib
import functools
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mimi_jax.files.atomic import atomic_path, file_lock
from mimi_jax.files.changes import describe_changes

FORMAT = "mimi_jax.tokens"
VERSION = 1
PLAN = "plan.parquet"
# All that the folder may contain.
NAMES = {"manifest.json", PLAN, "totals.json", "codes", "errors", "work"}
ROW_GROUP = 64  # clips that are read and decompressed together, even if only one is wanted
LIBRARIES = ("mimi_jax", "jax", "flax", "numpy", "pyarrow", "soundfile", "soxr")  # recorded in the manifest


class Totals(NamedTuple):
    """Counts of one shard, or of several."""

    clips: int = 0  # that have codes
    errors: int = 0  # clips without codes
    samples: int = 0
    frames: int = 0
    left_out: Counter[str] = Counter()  # noqa: RUF012 - never changed; files that are no clips, by suffix

    def __add__(self, other: "Totals") -> "Totals":  # type: ignore[override]
        return Totals(
            self.clips + other.clips,
            self.errors + other.errors,
            self.samples + other.samples,
            self.frames + other.frames,
            self.left_out + other.left_out,
        )

    @classmethod
    def from_json(cls, text: str | bytes) -> "Totals":
        """Read what `json.dumps` made of totals."""
        return cls.from_fields(*json.loads(text))

    @classmethod
    def from_fields(
        cls, clips: int, errors: int, samples: int, frames: int, *left_out: dict[str, int]
    ) -> "Totals":
        """Totals of the fields that JSON has of them. Older outputs have only the numbers."""
        return cls(clips, errors, samples, frames, Counter(*left_out))

    def hours(self, sampling_rate: int) -> float:
        """Hours of audio, at a sampling rate in Hz."""
        return self.samples / sampling_rate / 3600


class TokenizedClip(NamedTuple):
    """A clip and its codes."""

    id: str
    source: str  # the folder, pattern or file that the clip was found in
    num_samples: int
    codes: np.ndarray  # uint16 [num_quantizers, num_frames]


class Failure(NamedTuple):
    """A clip that could not be encoded."""

    id: str
    source: str
    reason: str


@functools.cache
def code_schema() -> Any:
    """The columns of a file of codes."""
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
    """The output folder of a job. An earlier run may have begun it, and other processes may be writing to it.

    Args:
        folder: created if it does not exist.
        settings: everything that decides the codes and how they are split into files, in types that JSON has.
            `num_shards` and `sampling_rate` are among them.
        config: the configuration of the model, for the manifest.

    Raises:
        ValueError: the folder holds codes made with other settings, or files of something else.
    """

    def __init__(self, folder: Path, settings: dict[str, Any], config: dict[str, Any]):
        self.folder, self.settings, self.config = folder, settings, config
        self.num_shards: int = settings["num_shards"]
        self.manifest = folder / "manifest.json"
        self._work = folder / "work"
        prepare(folder)
        with file_lock(self._work / "manifest.lock"):  # another process may start at the same moment
            if self.manifest.exists():
                self._check_settings(json.loads(self.manifest.read_text())["settings"])
            else:
                self._write_manifest(Totals(), 0)

    def _check_settings(self, recorded: dict[str, Any]) -> None:
        if changes := describe_changes(recorded, self.settings):
            raise ValueError(
                f"{self.folder} holds codes made with other settings: {changes}; use the same settings"
                " or name another folder"
            )

    def name(self, shard: int) -> str:
        """The file name of a shard. Names sort as the numbers do."""
        width = max(5, len(str(self.num_shards)))
        return f"{shard:0{width}}-of-{self.num_shards:0{width}}.parquet"

    def is_done(self, shard: int) -> bool:
        return (self.folder / "codes" / self.name(shard)).exists()

    def done(self) -> set[str]:
        """The names of all shards that are done."""
        return self._names("codes")

    def _names(self, folder: str) -> set[str]:
        """The names of the files of shards in a subfolder."""
        _, _, suffix = self.name(0).partition("-of-")
        return {name for name in os.listdir(self.folder / folder) if name.endswith(f"-of-{suffix}")}

    def plan(self) -> bytes:
        """The plan, for `mimi_jax.tokenization.plan.Plan`."""
        return (self.folder / PLAN).read_bytes()

    def keep_plan(self, data: bytes) -> None:
        """Write the plan for the other processes and for later runs."""
        with atomic_path(self.folder / PLAN, self._work) as temporary:
            temporary.write_bytes(data)

    @contextlib.contextmanager
    def claim(self, shard: int, wait: bool = False) -> Iterator[bool]:
        """Reserve a shard for this process until the block ends, or until the process ends in any way.

        Args:
            shard: its number.
            wait: if another process has reserved the shard, wait until it is finished or dead.

        Yields:
            Whether this process is to do the shard: it is not done yet, and no other process has reserved it.
        """
        with file_lock(self._work / f"{shard:05}.lock", wait) as is_mine:
            yield is_mine and not self.is_done(shard)

    def write(
        self,
        shard: int,
        clips: Sequence[TokenizedClip],
        failures: Sequence[Failure],
        left_out: Counter[str],
    ) -> Totals:
        """Write a shard, which is then done, and return its totals."""
        import pyarrow as pa

        frames = sum(clip.codes.shape[1] for clip in clips)
        totals = Totals(len(clips), len(failures), sum(clip.num_samples for clip in clips), frames, left_out)
        errors = self.folder / "errors" / self.name(shard)
        if failures:
            columns = dict(zip(Failure._fields, map(list, zip(*failures, strict=True)), strict=True))
            self._write_tables([pa.table(columns)], errors)
        else:
            errors.unlink(missing_ok=True)
        metadata = {"format": FORMAT, "settings": json.dumps(self.settings), "totals": json.dumps(totals)}
        groups = [clips[first : first + ROW_GROUP] for first in range(0, max(len(clips), 1), ROW_GROUP)]
        tables = (_table(group).replace_schema_metadata(metadata) for group in groups)
        self._write_tables(tables, self.folder / "codes" / self.name(shard))
        return totals

    def _write_tables(self, tables: Iterable[Any], path: Path) -> None:
        """Write a file in which each table is a row group."""
        import pyarrow.parquet as pq

        # In `work`, since readers of the folder `codes` would take an incomplete file beside it for a shard.
        with atomic_path(path, self._work) as temporary, contextlib.ExitStack() as stack:
            writer = None
            for table in tables:
                if writer is None:
                    writer = pq.ParquetWriter(temporary, table.schema, compression="zstd")
                    stack.enter_context(writer)
                writer.write_table(table)

    def finish(self) -> tuple[Totals, int]:
        """Update the manifest at the end of a run.

        Returns:
            The totals of all shards that are done, and how many those are.
        """
        done: set[str] = set()
        totals = Totals()
        # Where files cannot be locked, another process may write its last shard while this one counts. It
        # may even write the manifest just before this one does.
        is_counted = False
        while not is_counted:
            with self._counting():
                done = self.done()
                totals = self._count(done)
                recorded = json.loads(self.manifest.read_text())["shards_done"]
                if len(done) >= recorded:  # otherwise another process has counted more since
                    self._write_manifest(totals, len(done))
            is_counted = done == self.done()
        if len(done) == self.num_shards:
            for leftover in self._work.glob("*.parquet"):  # of processes that were killed
                leftover.unlink(missing_ok=True)
        return totals, len(done)

    def _counting(self) -> contextlib.AbstractContextManager[object]:
        """While this lock is held, no other process changes the manifest and totals.json."""
        return file_lock(self._work / "manifest.lock")

    def _count(self, done: set[str]) -> Totals:
        """The totals of some shards together. The files are read of those that totals.json does not have."""
        known = self._known()
        totals = {name: known.get(name) or self._totals(name) for name in sorted(done)}
        if totals.keys() != known.keys():
            self._write_known(totals)
        return sum(totals.values(), Totals())

    def _known(self) -> dict[str, Totals]:
        """What totals.json has, by the names of the shards."""
        path = self.folder / "totals.json"
        known = json.loads(path.read_text()) if path.exists() else {}
        return {name: Totals.from_fields(*fields) for name, fields in known.items()}

    def _write_known(self, totals: dict[str, Totals]) -> None:
        with atomic_path(self.folder / "totals.json", self._work) as temporary:
            temporary.write_text(json.dumps(totals) + "\n")

    def start(self, shards: Iterable[int], retry_errors: bool) -> set[str]:
        """Begin a run.

        Args:
            shards: the numbers of those that the run is to do.
            retry_errors: delete the files of those among them that have errors, so that they are done again.

        Returns:
            The names of all shards that are done.
        """
        with self._counting():
            if failed := self._names("errors") & set(map(self.name, shards)) if retry_errors else set():
                for name in failed:
                    (self.folder / "codes" / name).unlink(missing_ok=True)
                    (self.folder / "errors" / name).unlink(missing_ok=True)
                self._write_manifest(Totals(), 0)  # `finish` writes the true totals
            done, known = self.done(), self._known()
            if known.keys() - done:  # a shard whose file was deleted may get other totals
                self._write_known({name: totals for name, totals in known.items() if name in done})
        return done

    def totals(self, shard: int) -> Totals:
        """The totals of a shard that is done."""
        return self._totals(self.name(shard))

    def _totals(self, name: str) -> Totals:
        import pyarrow.parquet as pq

        return Totals.from_json(pq.read_schema(self.folder / "codes" / name).metadata[b"totals"])

    def _write_manifest(self, totals: Totals, num_done: int) -> None:
        from importlib.metadata import version

        hours = totals.hours(self.settings["sampling_rate"])
        fields = {
            "format": FORMAT,
            "version": VERSION,
            "complete": num_done == self.num_shards,
            "shards_done": num_done,
            "totals": {**totals._asdict(), "hours": round(hours, 4)},
            "settings": self.settings,
            "config": self.config,
            "libraries": {name: version(name) for name in LIBRARIES},
        }
        with atomic_path(self.manifest, self._work) as temporary:
            temporary.write_text(json.dumps(fields, indent=2) + "\n")


def _table(clips: Sequence[TokenizedClip]) -> Any:
    """Clips as a table of `code_schema`."""
    import pyarrow as pa

    offsets = np.cumsum([0, *(clip.codes.size for clip in clips)])
    flat = np.concatenate([np.zeros(0, np.uint16), *(clip.codes.ravel() for clip in clips)])
    columns = [
        [clip.id for clip in clips],
        [clip.source for clip in clips],
        [clip.num_samples for clip in clips],
        [clip.codes.shape[1] for clip in clips],
        [len(clip.codes) for clip in clips],
        pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(flat)),
    ]
    arrays = [pa.array(column, field.type) for column, field in zip(columns, code_schema(), strict=True)]
    return pa.table(arrays, schema=code_schema())


def prepare(folder: Path) -> None:
    """Create an output folder, unless an earlier run has begun it.

    Raises:
        ValueError: the folder holds files of something else.
    """
    if not _is_output(folder):
        raise ValueError(f"{folder} holds files that `mimi-jax tokenize` did not write; name another folder")
    for name in ("codes", "errors", "work"):
        (folder / name).mkdir(parents=True, exist_ok=True)


@contextlib.contextmanager
def planning(folder: Path, is_first: bool) -> Iterator[bytes | None]:
    """Let one process at a time plan the job of a folder, which is created if it does not exist.

    Args:
        folder: of the output.
        is_first: this process will plan even if there is a plan. Otherwise it need not wait if there is one.

    Yields:
        The plan, if there is one; else None.
    """
    prepare(folder)
    path = folder / PLAN
    with contextlib.ExitStack() as stack:
        if is_first or not path.exists():
            stack.enter_context(file_lock(folder / "work" / "plan.lock"))
        yield path.read_bytes() if path.exists() else None


def _is_output(folder: Path) -> bool:
    """Whether a folder is the output of a job, or is empty or missing and may become one."""
    if not folder.is_dir():
        return not folder.exists()
    if {path.name for path in folder.iterdir()} - NAMES:
        return False
    manifest = folder / "manifest.json"
    try:
        return not manifest.exists() or json.loads(manifest.read_text())["format"] == FORMAT
    except (ValueError, KeyError, TypeError):
        return False
