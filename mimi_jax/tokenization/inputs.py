"""What there is to tokenize: folders, globs, tar archives, Parquet files and manifests, as shards of clips.

A shard is what becomes one file of codes. Nothing is decoded here, and of archives nothing is read before
their
turn: a list of a million files is made in the time that it takes to list them.
"""

import glob
import hashlib
import json
import os
import tarfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mimi_jax.audio import FORMATS

AUDIO = (*FORMATS, ".aif", ".aiff")
ROWS_AT_ONCE = 16  # of a Parquet file, whose rows hold whole files
TAR_BLOCK = 512  # bytes


class Item(NamedTuple):
    """Where the file of a clip is, or why there is none."""

    id: str
    path: str = ""  # of the file, or of the archive around it
    offset: int = 0  # in the archive
    size: int | None = None  # bytes; None for the whole file
    data: bytes | None = None  # the file itself, where no path leads to it
    start: float = 0.0  # seconds
    end: float | None = None
    problem: str = ""

    @property
    def num_bytes(self) -> int:
        return len(self.data) if self.data is not None else self.size or 0


class Shard(NamedTuple):
    """Clips that become one file of codes."""

    index: int
    source: str  # as it was named: a folder, a pattern or a file
    items: tuple[Item, ...] | None  # None for an archive, whose items are read in their turn
    path: str
    num_bytes: int

    def read(self) -> Iterator[Item]:
        """The clips, each with an id of its own: of equal ones, the second ends in #2."""
        counts: dict[str, int] = {}
        items = _ARCHIVES[Path(self.path).suffix.lower()](self.path) if self.items is None else self.items
        for item in items:
            counts[item.id] = count = counts.get(item.id, 0) + 1
            yield item if count == 1 else item._replace(id=f"{item.id}#{count}")


def find_shards(sources: Sequence[str | os.PathLike[str]], clips_per_shard: int = 1000) -> list[Shard]:
    """List the shards of some inputs, always in the same order.

    Args:
        sources: folders, in which audio, .tar and .parquet files are found at any depth; patterns such as
            "data/*.flac"; audio files; WebDataset shards (.tar); Parquet files with a column `audio` of
            {bytes, path}; and manifests (.jsonl) of objects {path, id, start, end}, paths beside them, times
            in seconds, all but the path optional.
        clips_per_shard: of what lies in files of its own. An archive is one shard.

    Raises:
        FileNotFoundError: a source is missing, or a pattern matches nothing.
        ValueError: a folder without any of these, a broken manifest, or the same archive twice.
    """
    if clips_per_shard < 1:
        raise ValueError(f"clips_per_shard must be positive, got {clips_per_shard}")
    shards: list[Shard] = []
    for source in [os.fspath(source) for source in sources]:
        items, archives = _expand(source)
        for first in range(0, len(items), clips_per_shard):
            some = tuple(items[first : first + clips_per_shard])
            shards.append(Shard(len(shards), _text(source), some, "", sum(item.num_bytes for item in some)))
        for path in archives:
            shards.append(Shard(len(shards), _text(path), None, path, os.path.getsize(path)))
    archives = [os.path.realpath(shard.path) for shard in shards if shard.path]
    if len(set(archives)) < len(archives):
        twice = next(path for path in archives if archives.count(path) > 1)
        raise ValueError(f"{_text(twice)} is named twice; name each input once")
    return shards


def fingerprint(shards: Sequence[Shard]) -> str:
    """The same for the same clips in the same shards, wherever the files lie."""
    digest = hashlib.sha256()
    for shard in shards:
        name = os.path.basename(shard.path)
        digest.update(json.dumps([name, shard.num_bytes if shard.items is None else 0]).encode())
        for item in shard.items or ():
            digest.update(json.dumps([item.id, item.size, item.start, item.end]).encode())
    return digest.hexdigest()[:16]


def _expand(source: str) -> tuple[list[Item], list[str]]:
    """Audio files and archives of one source."""
    if os.path.isdir(source):
        files = [(_text(os.path.relpath(path, source)), path) for path in _walk(source)]
        if not files:
            kinds = ", ".join((*AUDIO, *_ARCHIVES))
            raise ValueError(
                f"{_text(source)} has no files to tokenize ({kinds}); manifests are named themselves"
            )
    elif os.path.isfile(source):
        files = [(_text(source), source)]
    else:
        files = [
            (_text(path), path) for path in sorted(glob.glob(source, recursive=True)) if os.path.isfile(path)
        ]
        if not files:
            raise FileNotFoundError(f"{_text(source)}: there is no such folder or file, and no match")
    items: list[Item] = []
    archives: list[str] = []
    for name, path in files:
        suffix = os.path.splitext(path)[1].lower()
        if suffix in _ARCHIVES:
            archives.append(path)
        elif suffix == ".jsonl":
            items += _manifest(path)
        elif path.lower().endswith((".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")):
            raise ValueError(
                f"{name} is a compressed archive, in which nothing can be found; unpack it to .tar"
            )
        else:
            items.append(Item(name, path, size=os.path.getsize(path)))
    return items, archives


def _walk(folder: str) -> Iterator[str]:
    for root, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted(names):
            if os.path.splitext(name)[1].lower() in (*AUDIO, *_ARCHIVES):
                yield os.path.join(root, name)


def _text(path: str) -> str:
    """A path that can be written in UTF-8, whatever bytes it is of."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def _manifest(path: str) -> Iterator[Item]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield _entry(path, number, line)


def _entry(path: str, number: int, line: bytes) -> Item:
    place = f"{_text(path)}, line {number}"
    try:
        entry: Any = json.loads(line)
    except ValueError:
        entry = None
    if not isinstance(entry, dict) or not isinstance(entry.get("path"), str):
        raise ValueError(f"{place}: must be a JSON object with a path, got {line[:80]!r}")
    for name in ("start", "end"):
        if entry.get(name) is not None and type(entry[name]) not in (int, float):
            raise ValueError(f"{place}: {name} must be seconds, got {entry[name]!r}")
    start, end = float(entry.get("start") or 0), entry.get("end")
    if not 0 <= start < (float("inf") if end is None else end):
        raise ValueError(f"{place}: start must lie before end, got {start} and {end}")
    stretch = f"@{start:g}-{'' if end is None else format(end, 'g')}" if start or end is not None else ""
    audio = os.path.join(os.path.dirname(path), entry["path"])
    size = os.path.getsize(audio) if os.path.isfile(audio) else None
    problem = "" if size is not None else "there is no such file"
    name = str(entry.get("id", entry["path"] + stretch))
    return Item(name, audio, size=size, start=start, end=end, problem=problem)


def _read_tar(path: str) -> Iterator[Item]:
    """The audio files of a WebDataset shard; of a broken one, those before the damage, and the damage."""
    end, size = 0, os.path.getsize(path)
    try:
        with tarfile.open(path, "r:") as archive:
            while (member := archive.next()) is not None:
                archive.members.clear()  # pyright: ignore - which would otherwise grow
                end = member.offset_data + -(-member.size // TAR_BLOCK) * TAR_BLOCK
                if not member.isfile() or os.path.splitext(member.name)[1].lower() not in AUDIO:
                    continue
                item = Item(_text(member.name), path, member.offset_data, member.size)
                if member.offset_data + member.size > size:
                    yield item._replace(problem="the archive is cut short inside this file")
                    return
                yield item
        with open(path, "rb") as file:
            file.seek(end)
            if end <= size and file.read(TAR_BLOCK).strip(b"\0") == b"" and file.tell() > end:
                return
        reason = f"the archive has no end: it is cut short, or damaged after byte {min(end, size)}"
    except (tarfile.TarError, OSError, ValueError) as error:
        reason = f"the archive cannot be read after byte {end}: {error}"
    yield Item("", path, problem=reason)


def _read_parquet(path: str) -> Iterator[Item]:
    """The rows of a Parquet file in the layout of Hugging Face datasets."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    row = 0
    try:
        with pq.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False) as file:
            names = file.schema_arrow.names
            if "audio" not in names:
                raise ValueError(f"it needs a column audio of {{bytes, path}}, got {', '.join(names)}")
            columns = [name for name in ("id", "audio") if name in names]
            for batch in file.iter_batches(ROWS_AT_ONCE, columns=columns):
                for entry in batch.to_pylist():
                    yield _row(path, row, entry)
                    row += 1
    except (pa.ArrowException, OSError, ValueError) as error:
        yield Item("", path, problem=f"the file cannot be read from row {row} on: {error}")


def _row(path: str, row: int, entry: dict[str, Any]) -> Item:
    audio = entry["audio"] if isinstance(entry["audio"], dict) else {"bytes": entry["audio"]}
    data, name = audio.get("bytes"), audio.get("path")
    identity = str(entry.get("id") or name or row)
    if isinstance(data, bytes):
        return Item(identity, data=data)
    if isinstance(name, str):
        beside = os.path.join(os.path.dirname(path), name)
        if os.path.isfile(beside):
            return Item(identity, beside, size=os.path.getsize(beside))
    return Item(identity, problem="the row has no audio: neither bytes nor a path that leads to a file")


_ARCHIVES: dict[str, Callable[[str], Iterator[Item]]] = {".tar": _read_tar, ".parquet": _read_parquet}
