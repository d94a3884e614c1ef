"""The kinds of files that can be tokenized, and how the clips in each kind are listed.

To add a kind, write a function that yields the clips of one file, and add it to `KINDS` at the end. Nothing
is decompressed here: a clip is the place of its audio file, and the workers read it.
"""

import os
import tarfile
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from mimi_jax.files.corpus import AUDIO_SUFFIXES, read_entries

COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")  # refused: nothing can be found in them
ROWS_AT_ONCE = 16  # of a Parquet file, whose rows hold whole audio files
TAR_BLOCK = 512  # bytes; the unit of the tar format


class Item(NamedTuple):
    """Where the audio file of a clip is, or why there is none."""

    id: str
    path: str = ""  # of the audio file, or of the archive that contains it
    offset: int = 0  # bytes; where the audio file begins in the archive
    size: int | None = None  # bytes; None for all of the file
    data: bytes | None = None  # the audio file itself, if it has no path
    start: float = 0.0  # seconds
    end: float | None = None  # seconds; None for the end of the audio file
    problem: str = ""

    @property
    def num_bytes(self) -> int:
        return len(self.data) if self.data is not None else self.size or 0


class Kind(NamedTuple):
    """What is done with files of one kind."""

    # Yields the clips of a file, given its absolute path and the name that the user knows it by.
    read: Callable[[str, str], Iterator[Item]]
    # Whether the file becomes one shard, and is not read before its turn. Otherwise its clips are listed at
    # once.
    is_archive: bool = False
    # Whether such files are found in folders. Otherwise the user must name them.
    is_found: bool = True


def kind_of(path: str) -> Kind:
    """The kind of a file, by its suffix. A file with an unknown suffix is taken for audio."""
    return KINDS.get(os.path.splitext(path)[1].lower(), AUDIO_FILE)


def _read_audio_file(path: str, name: str) -> Iterator[Item]:
    yield Item(name, path, size=os.path.getsize(path))


def _read_manifest(path: str, _: str) -> Iterator[Item]:
    """The clips of a JSONL manifest; see `mimi_jax.files.corpus`."""
    for entry in read_entries(path):
        audio, start, end = os.path.abspath(entry.path), entry.start, entry.end
        until = "" if end is None else f"{end:g}"
        stretch = f"@{start:g}-{until}" if start or until else ""
        size = os.path.getsize(audio) if os.path.isfile(audio) else None
        problem = "there is no such file" if size is None else ""
        identity = _identity(entry.id, entry.name + stretch)
        yield Item(identity, audio, size=size, start=start, end=end, problem=problem)


def _read_tar(path: str, _: str) -> Iterator[Item]:
    """The audio files of a WebDataset shard. If it is broken: those before the damage, then the damage."""
    end, size = 0, os.path.getsize(path)
    try:
        with tarfile.open(path, "r:") as archive:
            while (member := archive.next()) is not None:
                archive.members.clear()  # pyright: ignore - a list that would grow with the archive
                if archive.offset <= end:
                    raise ValueError("a size is negative")
                end = archive.offset
                if os.path.splitext(member.name)[1].lower() in AUDIO_SUFFIXES and not member.isdir():
                    yield _member(path, member, size)
                if member.offset_data + member.size > size:
                    return
        reason = _end_of_tar(path, end, size)
    except Exception as error:  # a hostile header can cause errors of any kind
        reason = f"the archive cannot be read after byte {end}: {type(error).__name__}: {error}"
    if reason:
        yield Item("", path, problem=reason)


def _member(path: str, member: tarfile.TarInfo, size: int) -> Item:
    name = _identity(member.name)
    if not member.isfile():
        reason = "it is a link inside the archive, or is not a file; store the file itself in the archive"
        return Item(name, path, problem=reason)
    if member.offset_data + member.size > size:
        return Item(name, path, problem="the archive is cut short inside this file")
    return Item(name, path, member.offset_data, member.size)


def _end_of_tar(path: str, end: int, size: int) -> str:
    """What is wrong after the last member, which ends at byte `end`; "" if only zeros follow."""
    with open(path, "rb") as file:
        file.seek(end)
        zeros = file.read(TAR_BLOCK)
        if not zeros or zeros.strip(b"\0"):
            return f"the archive has no end mark: it is cut short, or damaged after byte {min(end, size)}"
        while block := file.read(1 << 20):
            if block.strip(b"\0"):
                return f"the archive ends at byte {end}, but more data follows, such as a second archive"
    return ""


def _read_parquet(path: str, _: str) -> Iterator[Item]:
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
    except Exception as error:  # a damaged file can cause errors of any kind
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
    return Item(identity, problem="the row has no audio: it has neither bytes nor the path of a file")


def _identity(*candidates: Any) -> str:
    """The first candidate that is not None, as text that can be written in UTF-8."""
    found = next(candidate for candidate in candidates if candidate is not None)
    return str(found).encode("utf-8", "backslashreplace").decode()


AUDIO_FILE = Kind(_read_audio_file)
KINDS = {
    **dict.fromkeys(AUDIO_SUFFIXES, AUDIO_FILE),
    ".jsonl": Kind(_read_manifest, is_found=False),
    ".tar": Kind(_read_tar, is_archive=True),
    ".parquet": Kind(_read_parquet, is_archive=True),
}
