"""What there is to tokenize: folders, patterns, archives, Parquet files and manifests, as shards of clips.

A shard is what becomes one file of codes. Nothing is decoded here, and archives are read in their turn: a
list of a million files is made in the time that it takes to list them.
"""

import glob
import hashlib
import json
import os
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from mimi_jax.files.audio import FORMATS

AUDIO = (*FORMATS, ".aif", ".aiff")
ROWS_AT_ONCE = 16  # of a Parquet file, whose rows hold whole files
TAR_BLOCK = 512  # bytes
COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
MAX_SECONDS = 1e9  # of a time in a manifest


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
        """The clips, each with an id of its own."""
        return iter(self.items) if self.items is not None else _distinct(_reader_of(self.path)(self.path))


def find_shards(
    sources: Sequence[str | os.PathLike[str]],
    clips_per_shard: int = 1000,
    without: str | os.PathLike[str] | None = None,
) -> list[Shard]:
    """List the shards of some inputs, always in the same order.

    Args:
        sources: folders, in which audio, .tar and .parquet files are found at any depth; patterns such as
            "data/*.flac"; audio files; WebDataset shards (.tar); Parquet files with a column `audio` of
            {bytes, path}; and manifests (.jsonl) of objects {path, id, start, end}, paths beside them, times
            in seconds, all but the path optional.
        clips_per_shard: of what lies in files of its own. An archive is one shard.
        without: a folder that is not looked into: that of the output.

    Raises:
        FileNotFoundError: a source is missing, or a pattern matches nothing.
        ValueError: a source without any of these, a broken manifest, or the same file twice.
        OSError: a folder cannot be read.
    """
    if clips_per_shard < 1:
        raise ValueError(f"clips_per_shard must be positive, got {clips_per_shard}")
    shards: list[Shard] = []
    seen: set[str] = set()
    for source in [os.fspath(source) for source in sources]:
        items: list[Item] = []
        archives: list[tuple[str, str]] = []
        for name, path in _files(source, without):
            if path in seen:
                raise ValueError(f"{name} is named twice; name each input once")
            seen.add(path)
            _sort(name, path, items, archives)
        if not items and not archives:
            kinds = ", ".join((*AUDIO, *_ARCHIVES))
            raise ValueError(
                f"{_text(source)} has nothing to tokenize ({kinds}); manifests are named themselves"
            )
        items = list(_distinct(items))
        for first in range(0, len(items), clips_per_shard):
            some = tuple(items[first : first + clips_per_shard])
            shards.append(Shard(len(shards), _text(source), some, "", sum(item.num_bytes for item in some)))
        for name, path in archives:
            shards.append(Shard(len(shards), name, None, path, os.path.getsize(path)))
    return shards


def fingerprint(shards: Sequence[Shard]) -> str:
    """The same for the same clips in the same shards, wherever the files lie."""
    digest = hashlib.sha256()
    for shard in shards:
        archive = None if shard.items is not None else [os.path.basename(shard.source), shard.num_bytes]
        digest.update(json.dumps(archive).encode())
        for item in shard.items or ():
            digest.update(json.dumps([item.id, item.start, item.end]).encode())
    return digest.hexdigest()[:16]


def _files(source: str, without: str | os.PathLike[str] | None) -> Iterator[tuple[str, str]]:
    """Names and absolute paths of what a source is of."""
    if os.path.isdir(source):
        for path in _walk(source, without):
            yield _text(os.path.relpath(path, source)), os.path.abspath(path)
        return
    paths = [source] if os.path.lexists(source) else sorted(glob.glob(source, recursive=True))
    if not paths:
        raise FileNotFoundError(f"{_text(source)}: there is no such folder or file, and no match")
    for path in paths:
        for file in _walk(path, without) if os.path.isdir(path) else [path]:
            yield _text(file), os.path.abspath(file)


def _walk(folder: str, without: str | os.PathLike[str] | None) -> Iterator[str]:
    def fail(error: OSError) -> None:  # or what cannot be read would be left out without a word
        raise error

    seen = {os.path.realpath(without)} if without is not None else set()
    for root, folders, names in os.walk(folder, onerror=fail, followlinks=True):
        real = os.path.realpath(root)
        if real in seen:  # a link that leads back
            folders.clear()
            continue
        seen.add(real)
        folders.sort()
        for name in sorted(names):
            if name.lower().endswith((*AUDIO, *_ARCHIVES, *COMPRESSED)):
                yield os.path.join(root, name)


def _sort(name: str, path: str, items: list[Item], archives: list[tuple[str, str]]) -> None:
    """Put a file where it belongs."""
    suffix = os.path.splitext(path)[1].lower()
    if path.lower().endswith(COMPRESSED):
        raise ValueError(f"{name} is a compressed archive, in which nothing can be found; unpack it to .tar")
    if not os.path.isfile(path):  # a link to nothing, or a pipe, of which one would wait for ever
        items.append(Item(name, problem="it is no file, or a link to one that is missing"))
    elif suffix in _ARCHIVES:
        archives.append((name, path))
    elif suffix == ".jsonl":
        items.extend(_manifest(path))
    else:
        items.append(Item(name, path, size=os.path.getsize(path)))


def _distinct(items: Iterable[Item]) -> Iterator[Item]:
    """Of clips with the same id, the second ends in #2."""
    seen: set[str] = set()
    for item in items:
        name, count = item.id, 1
        while name in seen:
            count += 1
            name = f"{item.id}#{count}"
        seen.add(name)
        yield item._replace(id=name)


def _text(path: str) -> str:
    """A path that can be written in UTF-8, whatever bytes it is of."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def _identity(*candidates: Any) -> str:
    """The first that there is, as a text that can be written in UTF-8."""
    found = next(candidate for candidate in candidates if candidate is not None)
    return str(found).encode("utf-8", "backslashreplace").decode()


def _manifest(path: str) -> Iterator[Item]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield _entry(path, number, line)


def _entry(path: str, number: int, line: bytes) -> Item:
    place = f"{_text(path)}, line {number}"
    try:
        entry: Any = json.loads(line)
    except (ValueError, RecursionError):
        entry = None
    if not isinstance(entry, dict) or not isinstance(entry.get("path"), str):
        raise ValueError(f"{place}: must be a JSON object with a path, got {line[:80]!r}")
    for name in ("start", "end"):
        value = entry.get(name)
        if value is not None and (type(value) not in (int, float) or not abs(value) < MAX_SECONDS):
            raise ValueError(f"{place}: {name} must be seconds, got {entry[name]!r}")
    start, end = float(entry.get("start") or 0), entry.get("end")
    if not 0 <= start < (float("inf") if end is None else end):
        raise ValueError(f"{place}: start must lie before end, got {start} and {end}")
    stretch = f"@{start:g}-{'' if end is None else format(end, 'g')}" if start or end is not None else ""
    audio = os.path.abspath(os.path.join(os.path.dirname(path), entry["path"]))
    size = os.path.getsize(audio) if os.path.isfile(audio) else None
    problem = "" if size is not None else "there is no such file"
    name = _identity(entry.get("id"), entry["path"] + stretch)
    return Item(name, audio, size=size, start=start, end=end, problem=problem)


def _read_tar(path: str) -> Iterator[Item]:
    """The audio files of a WebDataset shard; of a broken one, those before the damage, and the damage."""
    end, size = 0, os.path.getsize(path)
    try:
        with tarfile.open(path, "r:") as archive:
            while (member := archive.next()) is not None:
                archive.members.clear()  # pyright: ignore - which would otherwise grow
                if archive.offset <= end:
                    raise ValueError("a size is negative")
                end = archive.offset
                if os.path.splitext(member.name)[1].lower() in AUDIO and not member.isdir():
                    yield _member(path, member, size)
                if member.offset_data + member.size > size:
                    return
        reason = _end_of_tar(path, end, size)
    except Exception as error:  # which a hostile header can make of any kind
        reason = f"the archive cannot be read after byte {end}: {type(error).__name__}: {error}"
    if reason:
        yield Item("", path, problem=reason)


def _member(path: str, member: tarfile.TarInfo, size: int) -> Item:
    name = _identity(member.name)
    if not member.isfile():
        return Item(name, path, problem="it is a link inside the archive, or no file; write the file itself")
    if member.offset_data + member.size > size:
        return Item(name, path, problem="the archive is cut short inside this file")
    return Item(name, path, member.offset_data, member.size)


def _end_of_tar(path: str, end: int, size: int) -> str:
    """What is wrong with the end of an archive, whose last member ends at byte `end`: after it come zeros."""
    with open(path, "rb") as file:
        file.seek(end)
        zeros = file.read(TAR_BLOCK)
        if not zeros or zeros.strip(b"\0"):
            return f"the archive has no end: it is cut short, or damaged after byte {min(end, size)}"
        while block := file.read(1 << 20):
            if block.strip(b"\0"):
                return f"something follows the end of the archive at byte {end}, such as a second archive"
    return ""


def _read_parquet(path: str) -> Iterator[Item]:
    """The rows of a Parquet file in the layout of Hugging Face datasets."""
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
    except Exception as error:  # which a damaged file can make of any kind
        yield Item("", path, problem=f"the file cannot be read from row {row} on: {error}")


def _row(path: str, row: int, entry: dict[str, Any]) -> Item:
    audio = entry["audio"] if isinstance(entry["audio"], dict) else {"bytes": entry["audio"]}
    data, name = audio.get("bytes"), audio.get("path")
    identity = _identity(entry.get("id"), name, row)
    if isinstance(data, bytes):
        return Item(identity, data=data)
    if isinstance(name, str):
        beside = os.path.join(os.path.dirname(path), name)
        if os.path.isfile(beside):
            return Item(identity, beside, size=os.path.getsize(beside))
    return Item(identity, problem="the row has no audio: neither bytes nor a path that leads to a file")


def _reader_of(path: str) -> Callable[[str], Iterator[Item]]:
    return _ARCHIVES[os.path.splitext(path)[1].lower()]


_ARCHIVES: dict[str, Callable[[str], Iterator[Item]]] = {".tar": _read_tar, ".parquet": _read_parquet}
