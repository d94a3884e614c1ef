"""The output of a job: a folder of Parquet files, each of which appears whole or not at all.

    manifest.json                what the codes are: the model's identity and configuration, settings, totals
    plan.parquet                 the shards of the job and the clips in them; see `mimi_jax.tokenization.plan`
    totals.json                  the totals of each shard, as its file has them; a run reads only new files
    codes/00003-of-00120.parquet the clips of a shard, in the order of the input
    errors/00003-of-00120.parquet its clips that could not be encoded, with the reasons; only if there are any
    work/                        locks, and files that are not complete yet; not in a bucket

A shard is done once its file of codes exists. Errors are written before codes, so that a job that is killed
between the two repeats the shard and loses nothing. A bucket has no locks: two processes that do the same
shard write the same bytes. pyarrow is imported by the functions that need it.
"""

import contextlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from mimi_jax.files.blocks import CROP
from mimi_jax.files.changes import describe_changes
from mimi_jax.files.folders import WORK, LocalFolder, RemoteFolder, open_folder
from mimi_jax.files.remote import AT_ONCE
from mimi_jax.tokenization.records import (
    FORMAT,
    Failure,
    TokenizedClip,
    Totals,
    table_of_clips,
    table_of_failures,
)

VERSION = 1
PLAN = "plan.parquet"
MANIFEST = "manifest.json"
TOTALS = "totals.json"
# All that the folder may contain. The last two are born with a dataset on the Hub.
NAMES = {MANIFEST, PLAN, TOTALS, "codes", "errors", WORK, "README.md"}
ROW_GROUP = 64  # clips that are read and decompressed together, even if only one is wanted
LIBRARIES = ("mimi_jax", "jax", "flax", "numpy", "pyarrow", "soundfile", "soxr")  # recorded in the manifest


class Output:
    """The output folder of a job. An earlier run may have begun it, and other processes may be writing to it.

    Args:
        folder: a path or URL. It is created if it does not exist.
        settings: everything that decides the codes and how they are split into files, in types that JSON has.
            `num_shards` and `sampling_rate` are among them.
        config: the configuration of the model, for the manifest.

    Raises:
        ValueError: the folder holds codes made with other settings, or files of something else.
    """

    def __init__(self, folder: str | os.PathLike[str], settings: dict[str, Any], config: dict[str, Any]):
        self.settings, self.config = settings, config
        self.num_shards: int = settings["num_shards"]
        self._folder = open_folder(folder)
        self._written: dict[str, Totals] = {}  # by this run; a bucket may list them later
        prepare(self._folder)
        with self._counting():  # another process may start at the same moment
            if (manifest := _read_json(self._folder, MANIFEST)) is not None:
                self._check_settings(manifest["settings"])
            else:
                self._write_manifest(Totals(), 0)

    def _check_settings(self, recorded: dict[str, Any]) -> None:
        if changes := describe_changes(recorded, self.settings):
            raise ValueError(
                f"{self._folder} holds codes made with other settings: {changes}; use the same settings"
                " or name another folder"
            )

    def name(self, shard: int) -> str:
        """The file name of a shard. Names sort as the numbers do."""
        width = max(5, len(str(self.num_shards)))
        return f"{shard:0{width}}-of-{self.num_shards:0{width}}.parquet"

    def is_done(self, shard: int) -> bool:
        return self._folder.exists(f"codes/{self.name(shard)}")

    def done(self) -> set[str]:
        """The names of all shards that are done."""
        return self._names("codes") | self._written.keys()

    def _names(self, folder: str) -> set[str]:
        """The names of the files of shards in a subfolder."""
        _, _, suffix = self.name(0).partition("-of-")
        return {name for name in self._folder.names(folder) if name.endswith(f"-of-{suffix}")}

    def plan(self) -> bytes:
        """The plan, for `mimi_jax.tokenization.plan.Plan`."""
        return self._folder.read(PLAN)

    def keep_plan(self, data: bytes) -> None:
        """Write the plan for the other processes and for later runs."""
        with self._folder.writing(PLAN) as file:
            file.write(data)

    @contextlib.contextmanager
    def claim(self, shard: int, wait: bool = False) -> Iterator[bool]:
        """Reserve a shard for this process until the block ends, or until the process ends in any way.

        Args:
            shard: its number.
            wait: if another process has reserved the shard, wait until it is finished or dead.

        Yields:
            Whether this process is to do the shard: it is not done yet, and no other process has reserved it.
        """
        with self._folder.lock(f"{shard:05}", wait) as is_mine:
            yield is_mine and not self.is_done(shard)

    def write(
        self,
        shard: int,
        clips: Sequence[TokenizedClip],
        failures: Sequence[Failure],
        left_out: Counter[str],
    ) -> Totals:
        """Write a shard, which is then done, and return its totals."""
        frames = sum(clip.codes.shape[1] for clip in clips)
        samples = sum(clip.num_samples for clip in clips)
        transient = sum(failure.is_transient for failure in failures)
        totals = Totals(len(clips), len(failures), samples, frames, left_out, transient)
        name = self.name(shard)
        if failures:
            self._write_tables([table_of_failures(failures)], f"errors/{name}")
        elif self._folder.exists(f"errors/{name}"):  # on the Hub, a deletion is a commit
            self._folder.delete(f"errors/{name}")
        metadata = {"format": FORMAT, "settings": json.dumps(self.settings), "totals": json.dumps(totals)}
        groups = [clips[first : first + ROW_GROUP] for first in range(0, max(len(clips), 1), ROW_GROUP)]
        tables = (table_of_clips(group).replace_schema_metadata(metadata) for group in groups)
        self._write_tables(tables, f"codes/{name}")
        self._written[name] = totals
        return totals

    def _write_tables(self, tables: Iterable[Any], name: str) -> None:
        """Write a file in which each table is a row group."""
        import pyarrow.parquet as pq

        with self._folder.writing(name) as file, contextlib.ExitStack() as stack:
            writer = None
            for table in tables:
                if writer is None:
                    writer = pq.ParquetWriter(file, table.schema, compression="zstd")
                    stack.enter_context(writer)
                writer.write_table(table)

    def finish(self) -> tuple[Totals, int]:
        """Update the manifest at the end of a run.

        Returns:
            The totals of all shards that are done, and how many those are.
        """
        num_done, totals = 0, Totals()
        # Where files cannot be locked, another process may write its last shard while this one counts. It
        # may even write the manifest just before this one does.
        is_counted = False
        while not is_counted:
            with self._counting():
                done = self.done()
                counted = self._count(done)
                num_done, totals = len(counted), sum(counted.values(), Totals())
                recorded = json.loads(self._folder.read(MANIFEST))["shards_done"]
                if num_done >= recorded:  # otherwise another process has counted more since
                    self._write_manifest(totals, num_done)
            is_counted = done == self.done()
        if num_done == self.num_shards:
            self._folder.clean()
        return totals, num_done

    def _counting(self) -> contextlib.AbstractContextManager[object]:
        """While this lock is held, no other process changes the manifest and totals.json."""
        return self._folder.lock("manifest")

    def _count(self, done: set[str]) -> dict[str, Totals]:
        """The totals of some shards by name. The files are read of those that totals.json does not have.

        A bucket may list a file that was deleted a moment ago. Such shards are left out.
        """
        recorded = _read_json(self._folder, TOTALS) or {}
        known = {name: Totals.from_fields(*fields) for name, fields in recorded.items()} | self._written
        unknown = sorted(done - known.keys())
        with ThreadPoolExecutor(AT_ONCE) as pool:
            found = zip(unknown, pool.map(self._totals, unknown), strict=True)
            known |= {name: totals for name, totals in found if totals is not None}
        totals = {name: known[name] for name in sorted(done & known.keys())}
        if unknown or totals.keys() != recorded.keys():
            self._write_json(TOTALS, totals)
        return totals

    def start(self, shards: Iterable[int], retry_errors: bool) -> set[str]:
        """Begin a run. Shards with transient errors are undone, so that they are done again.

        Args:
            shards: the numbers of those that the run is to do.
            retry_errors: undo all of them that have errors.

        Returns:
            The names of all shards that are done.
        """
        self._written.clear()
        with self._counting():
            counted = self._count(self.done())
            failed = {name for name, totals in counted.items() if totals.transient}
            if retry_errors:
                failed |= self._names("errors")
            if failed := failed & set(map(self.name, shards)):
                # First, so that the output never says it is complete without them. `finish` counts again.
                self._write_manifest(Totals(), 0)
                for name in failed:
                    self._folder.delete(f"codes/{name}")
                    self._folder.delete(f"errors/{name}")
                counted = self._count(counted.keys() - failed)
        return set(counted)

    def totals(self, shard: int) -> Totals:
        """The totals of a shard that is done."""
        totals = self._totals(self.name(shard))
        if totals is None:
            raise FileNotFoundError(f"{self._folder} has no file codes/{self.name(shard)}")
        return totals

    def _totals(self, name: str) -> Totals | None:
        import pyarrow.parquet as pq

        try:
            with self._folder.opened(f"codes/{name}", CROP) as file:
                return Totals.from_json(pq.read_schema(file).metadata[b"totals"])
        except FileNotFoundError:
            return None

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
        self._write_json(MANIFEST, fields, indent=2)

    def _write_json(self, name: str, fields: Any, indent: int | None = None) -> None:
        with self._folder.writing(name) as file:
            file.write(f"{json.dumps(fields, indent=indent)}\n".encode())


def prepare(folder: LocalFolder | RemoteFolder) -> None:
    """Create an output folder, unless an earlier run has begun it.

    Raises:
        ValueError: the folder holds files of something else.
    """
    if not _is_output(folder):
        raise ValueError(f"{folder} holds files that `mimi-jax tokenize` did not write; name another folder")
    folder.make("codes", "errors")


@contextlib.contextmanager
def planning(path: str | os.PathLike[str], is_first: bool) -> Iterator[bytes | None]:
    """Let one process at a time plan the job of a folder, which is created if it does not exist.

    In a bucket, several may plan at a time. They all find the same plan.

    Args:
        path: of the output, or its URL.
        is_first: this process will plan even if there is a plan. Otherwise it need not wait if there is one.

    Yields:
        The plan, if there is one; else None.
    """
    folder = open_folder(path)
    prepare(folder)
    with contextlib.ExitStack() as stack:
        if is_first or not folder.exists(PLAN):
            stack.enter_context(folder.lock("plan"))
        yield folder.read(PLAN) if folder.exists(PLAN) else None


def _is_output(folder: LocalFolder | RemoteFolder) -> bool:
    """Whether a folder is the output of a job, or is empty or missing and may become one."""
    try:
        if folder.names() - NAMES:
            return False
        manifest = _read_json(folder, MANIFEST)
        return manifest is None or manifest["format"] == FORMAT
    except (NotADirectoryError, ValueError, KeyError, TypeError):
        return False


def _read_json(folder: LocalFolder | RemoteFolder, name: str) -> Any:
    """What a JSON file has; None if there is no such file."""
    try:
        return json.loads(folder.read(name))
    except FileNotFoundError:
        return None
