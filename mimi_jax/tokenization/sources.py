"""The kinds of files that can be tokenized, and how the clips in each kind are listed.

To add a kind, write a function that yields the clips of one file, and add it to `KINDS` at the end. Nothing
is decompressed here: a clip is the place of its audio file, and the workers read it.
"""

import contextlib
import functools
import os
import stat
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, NamedTuple

from mimi_jax.files.blocks import ARCHIVE, CROP, open_binary
from mimi_jax.files.containers.spans import read_at
from mimi_jax.files.corpus import (
    AUDIO_SUFFIXES,
    UNREADABLE_SUFFIXES,
    as_utf8,
    is_transient,
    printable,
    read_entries,
)
from mimi_jax.files.remote import is_remote, join
from mimi_jax.tokenization.settings import DEFAULTS

# Archives that are left out of folders, and refused if the user names them: nothing can be found in them.
COMPRESSED = (
    *(".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tzst", ".tar.lz4", ".tar.z"),
    *(".zip", ".7z", ".rar"),
)
# What a compressed archive begins with, whatever its name is.
COMPRESSIONS = {
    b"\x1f\x8b": "gzip",
    b"\x1f\x9d": "compress",
    b"BZh": "bzip2",
    b"\xfd7zXZ\0": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\x04\x22\x4d\x18": "lz4",
    b"PK\x03\x04": "zip",
    b"7z\xbc\xaf": "7z",
    b"Rar!": "rar",
}
CLIP_SUFFIXES = frozenset((*AUDIO_SUFFIXES, *UNREADABLE_SUFFIXES))
MANY_FILES = 1024  # of a manifest, whose sizes are remembered
LARGE_FILE = 1 << 23  # bytes; a larger one is read piece by piece, also if it is in a bucket
ROWS_AT_ONCE = 16  # of a Parquet file, whose rows hold whole audio files
TAR_BLOCK = 512  # bytes; the unit of the tar format
TAR_CONTINUED = b"M"  # the type of a member that began in another volume


class Item(NamedTuple):
    """Where the audio file of a clip is, or why there is none."""

    id: str
    path: str = ""  # or URL of the audio file, or of the archive that contains it
    offset: int = 0  # bytes; where the audio file begins in the archive
    size: int | None = None  # bytes; None for all of the file
    data: bytes | None = None  # the audio file itself, if it has no path
    start: float = 0.0  # seconds
    end: float | None = None  # seconds; None for the end of the audio file
    problem: str = ""
    is_transient: bool = False  # of the problem: a second try may succeed

    @property
    def num_bytes(self) -> int:
        return len(self.data) if self.data is not None else self.size or 0


class File(NamedTuple):
    """A file that holds clips."""

    path: str  # absolute, or a URL
    name: str  # that the user knows it by
    size: int | None = None  # bytes, if a listing told
    audio_column: str = DEFAULTS.audio_column  # where a Parquet file has its audio


class Kind(NamedTuple):
    """What is done with files of one kind."""

    # Yields the clips of a file. It counts what is no clip in an archive, by suffix.
    read: Callable[[File, Counter[str]], Iterator[Item]]
    # Whether the file becomes one shard, and is not read before its turn. Otherwise its clips are listed at
    # once.
    is_archive: bool = False
    # Whether such files are found in folders. Otherwise the user must name them.
    is_found: bool = True


def kind_of(path: str) -> Kind:
    """The kind of a file, by its suffix. A file with an unknown suffix is taken for audio."""
    return KINDS.get(os.path.splitext(path)[1].lower(), AUDIO_FILE)


def proper_suffix(suffix: str) -> str:
    """A suffix in lower case, or "other" if it names no kind of files, such as "" or ".001"."""
    letters = suffix[1:]
    is_proper = letters.isascii() and letters.isalnum() and not letters.isdigit() and len(letters) < 10
    return suffix if is_proper else "other"


def _read_audio_file(file: File, _: Counter[str]) -> Iterator[Item]:
    yield _audio_file(file.name, file.path, file.size)


def _audio_file(identity: str, path: str, size: int | None = None) -> Item:
    """A clip in a file of its own. Whether there is a remote one is found out when it is read."""
    if size is None and not is_remote(path):
        size = size_of(path)
        if size is None:
            return Item(identity, path, problem=f"there is no file {printable(path)}")
    return Item(identity, path, size=size, problem=_unreadable(path))


def size_of(path: str) -> int | None:
    """The size of a local file in bytes; None if there is none, or if it is something else."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):  # ValueError: a name that no file can have
        return None
    return status.st_size if stat.S_ISREG(status.st_mode) else None


def _unreadable(name: str) -> str:
    """Why a file of this name cannot be read; "" if it can."""
    suffix = os.path.splitext(name)[1].lower()
    if suffix not in UNREADABLE_SUFFIXES:
        return ""
    return f"{suffix} files cannot be read; convert this one to WAV or FLAC"


def _read_manifest(file: File, _: Counter[str]) -> Iterator[Item]:
    """The clips of a JSONL manifest; see `mimi_jax.files.corpus`."""

    @functools.lru_cache(MANY_FILES)
    def whole(path: str) -> Item:  # many clips of a manifest may be in one file
        return _audio_file("", path if is_remote(path) else os.path.abspath(path))

    for entry in read_entries(file.path):
        start, end = entry.start, entry.end
        until = "" if end is None else f"{end:g}"
        stretch = f"@{start:g}-{until}" if start or until else ""
        identity, clip = _identity(entry.id, entry.name + stretch), whole(entry.path)
        yield Item(identity, clip.path, size=clip.size, start=start, end=end, problem=clip.problem)


def _read_tar(file: File, left_out: Counter[str]) -> Iterator[Item]:
    """The audio files of a WebDataset shard. If it is broken: those before the damage, then the damage."""
    end, reason, is_lost = 0, "", False
    try:
        with open_binary(file.path, ARCHIVE) as opened, tarfile.open(fileobj=opened, mode="r:") as archive:
            size = opened.seek(0, os.SEEK_END)
            while (member := archive.next()) is not None:
                archive.members.clear()  # pyright: ignore - a list that would grow with the archive
                if archive.offset <= end:
                    raise ValueError("a size is negative")
                end = archive.offset
                suffix = os.path.splitext(member.name)[1].lower()
                is_clip = suffix in CLIP_SUFFIXES and not member.isdir()
                is_cut = _stored_end(member) > size
                if is_clip:
                    yield _with_data(_member(file.path, member, is_cut), opened)
                elif not member.isdir():
                    left_out[proper_suffix(suffix)] += 1
                if is_cut:
                    reason = "" if is_clip else f"the archive is cut short inside {_identity(member.name)}"
                    break
            else:
                reason = _end_of_tar(opened, end, size)
    except Exception as error:  # a hostile header can cause errors of any kind
        reason = f"the archive cannot be read after byte {end}: {type(error).__name__}: {error}"
        is_lost = is_transient(error)
        if not end and not is_lost and (compression := _compression(file.path)):
            reason = f"it is a {compression} file, which cannot be searched; unpack it"
    if reason:
        yield Item("", file.path, problem=reason, is_transient=is_lost)


def _with_data(item: Item, archive: BinaryIO) -> Item:
    """A member of a remote archive, with its bytes: the archive is read from front to back anyway."""
    if item.problem or not is_remote(item.path) or item.num_bytes > LARGE_FILE:
        return item
    return item._replace(offset=0, data=read_at(archive, item.offset, item.num_bytes))


def _stored_end(member: tarfile.TarInfo) -> int:
    """The byte after the last of a member. A sparse one is stored without the holes that its size counts."""
    holes: list[tuple[int, int]] | None = member.sparse  # pyright: ignore - not in the stubs
    return member.offset_data + (member.size if holes is None else sum(size for _, size in holes))


def _member(path: str, member: tarfile.TarInfo, is_cut: bool) -> Item:
    name, problem = _identity(member.name), _unreadable(member.name)
    if member.islnk() or member.issym():
        problem = "it is a link inside the archive; store the file itself in the archive"
    elif member.type == TAR_CONTINUED:
        problem = "it began in another volume of the archive; store whole files in each archive"
    elif not member.isfile():
        problem = "it is not a file"
    elif member.issparse():
        problem = "it is stored as a sparse file; make the archive without the option --sparse (-S)"
    elif is_cut:
        problem = "the archive is cut short inside this file"
    if problem:
        return Item(name, path, problem=problem)
    return Item(name, path, member.offset_data, member.size)


def _compression(path: str) -> str:
    """How a file is compressed; "" if it is not, or cannot be read."""
    try:
        with open_binary(path, CROP) as file:
            start = file.read(max(map(len, COMPRESSIONS)))
    except OSError:
        return ""
    return next((name for magic, name in COMPRESSIONS.items() if start.startswith(magic)), "")


def _end_of_tar(file: BinaryIO, end: int, size: int) -> str:
    """What is wrong after the last member, which ends at byte `end`; "" if only zeros follow."""
    zeros = read_at(file, end, TAR_BLOCK)
    if not zeros or zeros.strip(b"\0"):
        return f"the archive has no end mark: it is cut short, or damaged after byte {min(end, size)}"
    while block := file.read(1 << 20):
        if block.strip(b"\0"):
            return f"the archive ends at byte {end}, but more data follows, such as a second archive"
    return ""


def _read_parquet(file: File, _: Counter[str]) -> Iterator[Item]:
    """The rows of a Parquet file, whose audio is bytes, a path, or both as Hugging Face datasets write it."""
    import pyarrow.parquet as pq

    row = 0
    # pyarrow reads a path faster than an open file.
    opening = open_binary(file.path, ARCHIVE) if is_remote(file.path) else contextlib.nullcontext(file.path)
    try:
        with opening as source, pq.ParquetFile(source, buffer_size=1 << 20, pre_buffer=False) as table:
            names = table.schema_arrow.names
            if file.audio_column not in names:
                raise ValueError(
                    f"it needs a column {file.audio_column} of {{bytes, path}}, got {', '.join(names)}; set"
                    " audio_column (--audio-column) to the name of the column that has the audio"
                )
            columns = [name for name in ("id", file.audio_column) if name in names]
            for batch in table.iter_batches(ROWS_AT_ONCE, columns=columns):
                for entry in _entries(batch):
                    if isinstance(entry, UnicodeDecodeError):
                        yield Item(_identity(row), problem=f"its id or path is not UTF-8: {entry}")
                    else:
                        yield _row(file.path, row, entry.get("id"), entry[file.audio_column])
                    row += 1
    except Exception as error:  # a damaged file can cause errors of any kind
        reason = f"the file cannot be read from row {row} on: {error}"
        yield Item("", file.path, problem=reason, is_transient=is_transient(error))


def _entries(batch: Any) -> Iterator[dict[str, Any] | UnicodeDecodeError]:
    """The rows of a batch. What is not UTF-8 costs its row alone."""
    try:
        yield from batch.to_pylist()
    except UnicodeDecodeError:
        for number in range(len(batch)):
            try:
                yield from batch.slice(number, 1).to_pylist()
            except UnicodeDecodeError as error:
                yield error


def _row(path: str, row: int, identity: Any, audio: Any) -> Item:
    if isinstance(audio, str):
        audio = {"path": audio}
    elif not isinstance(audio, dict):
        audio = {"bytes": audio}
    data, name = audio.get("bytes"), audio.get("path")
    identity = _identity(identity, name, row)
    if isinstance(data, bytes):
        return Item(identity, data=data)
    if isinstance(name, str):
        return _audio_file(identity, join(os.path.dirname(path), name))
    return Item(identity, problem="the row has no audio: it has neither bytes nor the path of a file")


def _identity(*candidates: Any) -> str:
    """The first candidate that is not None, as text that can be written in UTF-8."""
    return as_utf8(next(candidate for candidate in candidates if candidate is not None))


AUDIO_FILE = Kind(_read_audio_file)
KINDS = {
    **dict.fromkeys(CLIP_SUFFIXES, AUDIO_FILE),
    **dict.fromkeys((".jsonl", ".json"), Kind(_read_manifest, is_found=False)),
    ".tar": Kind(_read_tar, is_archive=True),
    ".parquet": Kind(_read_parquet, is_archive=True),
}
