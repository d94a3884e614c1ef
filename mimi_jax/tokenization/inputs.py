"""Find what there is to tokenize, in folders and patterns, and divide it into shards.

A shard is what becomes one file of codes. No audio is read here, and an archive is opened only when its turn
comes, so a million files are listed in the time that it takes to walk through their folders.
"""

import glob
import hashlib
import itertools
import os
from array import array
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from mimi_jax.files import remote
from mimi_jax.files.corpus import expand_home, find_files, printable
from mimi_jax.files.remote import is_remote
from mimi_jax.tokenization.fetching import fetched
from mimi_jax.tokenization.settings import DEFAULTS
from mimi_jax.tokenization.sources import COMPRESSED, KINDS, File, Item, kind_of, proper_suffix, size_of

NAMED_KINDS = 10  # kinds of files that are left out and named in a message
NEWEST = 1 << 16  # ids that are kept in a set, before they are sorted into an array


class Shard(NamedTuple):
    """Clips that become one file of codes."""

    index: int
    source: str  # as the user named it: a folder, a pattern or a file
    items: Iterable[Item] | None  # None for an archive, whose items are read when its turn comes
    path: str  # of the archive
    num_bytes: int
    audio_column: str  # where a Parquet file has its audio
    left_out: Counter[str]  # see `find_shards`

    def read(self, left_out: Counter[str]) -> Iterator[Item]:
        """Yield the clips. No two of them have the same id.

        Args:
            left_out: is updated with those files that are left out of the job, and that this shard counts.
        """
        left_out.update(self.left_out)
        if self.items is not None:
            return fetched(self.items)
        return _distinct(self._read_archive(left_out))

    def _read_archive(self, left_out: Counter[str]) -> Iterator[Item]:
        own: Counter[str] = Counter()
        is_empty = True
        for item in kind_of(self.path).read(
            File(self.path, self.source, self.num_bytes, self.audio_column), own
        ):
            is_empty = False
            yield item
        if is_empty:
            yield Item("", self.path, problem=f"the file has no clips{_only(own)}")
        left_out.update(own)


def check_sources(sources: Iterable[str | os.PathLike[str]]) -> None:
    """Check that there is something under the name of each source.

    Raises:
        FileNotFoundError: a source is missing, or a pattern matches nothing.
    """
    for source in map(expand_home, sources):
        if is_remote(source):
            if not remote.is_pattern(source):
                remote.find(source)
        elif not os.path.lexists(source) and not any(glob.iglob(source, recursive=True)):
            raise FileNotFoundError(f"there is no folder or file {printable(source)}, and nothing matches it")


def find_shards(
    sources: Sequence[str | os.PathLike[str]],
    clips_per_shard: int = DEFAULTS.clips_per_shard,
    without: str | os.PathLike[str] | None = None,
    audio_column: str = DEFAULTS.audio_column,
) -> Iterator[Shard]:
    """List the shards of some sources, always in the same order. Only one at a time is kept in memory.

    The first shard of a source counts the files in its folders that are left out since they are no clips: by
    suffix, and compressed archives by name. It has counted them all when the source is listed to its end.
    Each archive counts its own.

    Args:
        sources: any of these:
            - folders, in which audio files, .tar and .parquet files are found at any depth
            - patterns such as "data/*.flac"
            - audio files
            - WebDataset shards (.tar)
            - Parquet files with a column of audio: bytes, paths, or {bytes, path}
            - manifests (.jsonl, .json), described in `mimi_jax.files.corpus`

            `~` at the start stands for the home folder. Each may also be a URL, such as "s3://bucket/data".
        clips_per_shard: of clips that are files of their own. An archive is always one shard.
        without: a folder to leave out, since the output is written there.
        audio_column: the name of the column in Parquet files.

    Raises:
        FileNotFoundError: a source is missing, or a pattern matches nothing.
        ValueError: a source has nothing to tokenize or is a compressed archive, a manifest is broken, or a
            file is named twice.
        OSError: a folder cannot be read, or a service cannot be reached (ConnectionError).
    """
    if clips_per_shard < 1:
        raise ValueError(f"clips_per_shard must be positive, got {clips_per_shard}")
    check_sources(sources)
    numbers = itertools.count()
    named: set[str] = set()
    if without is not None:
        without = remote.canonical(without) if is_remote(without) else os.path.realpath(without)
    for source in map(expand_home, sources):
        archives: list[File] = []
        left_out: Counter[str] = Counter()
        counts = iter([left_out])  # for the first shard; the others count nothing
        items = _distinct(_listed(_files(source, without, left_out, named), archives))
        while some := tuple(itertools.islice(items, clips_per_shard)):
            num_bytes, counted = sum(item.num_bytes for item in some), next(counts, Counter())
            yield Shard(next(numbers), printable(source), some, "", num_bytes, audio_column, counted)
        for file in archives:
            size, counted = file.size or 0, next(counts, Counter())
            yield Shard(next(numbers), file.name, None, file.path, size, audio_column, counted)
        if next(counts, None) is not None:
            raise ValueError(
                f"{printable(source)} has nothing to tokenize: no clips, .tar or .parquet"
                f" files{_only(left_out)}; name manifests themselves, and unpack compressed archives"
            )


def _listed(files: Iterable[File], archives: list[File]) -> Iterator[Item]:
    """Yield the clips that are files of their own, and append the archives."""
    for file in files:
        kind = kind_of(file.path)
        if not is_remote(file.path):
            file = file._replace(size=size_of(file.path))
            if file.size is None:  # a pipe would be waited for without end
                problem = "it is not a file, or it is a link to a file that is missing"
                yield Item(file.name, problem=problem)
                continue
        if kind.is_archive:
            archives.append(file)
        else:
            yield from kind.read(file, Counter())


def in_words(left_out: Counter[str]) -> str:
    """What was left out, such as "12 .txt, 3 .json"; "" if nothing was."""
    named = left_out.most_common(NAMED_KINDS)
    words = [f"{count:,} {kind}" for kind, count in named]
    if rest := left_out.total() - sum(count for _, count in named):
        words.append(f"{rest:,} more")
    return ", ".join(words)


def _only(left_out: Counter[str]) -> str:
    return f", only {in_words(left_out)}" if left_out else ""


class _Place(NamedTuple):
    """What a source names, or a pattern matches."""

    path: str  # absolute, or a URL
    name: str  # as the user wrote it, or as the pattern matches it
    is_folder: bool
    size: int | None = None  # bytes, if a listing told


def _files(source: str, without: str | None, left_out: Counter[str], named: set[str]) -> Iterator[File]:
    """Yield the files of a source.

    Args:
        source: a folder, a pattern or a file.
        without: a folder to leave out, as `_is_output` takes it.
        left_out: counts the files that are left out.
        named: the absolute paths of the files and folders that were named before. Those of the source are
            added, so that a file is refused which is also in one of them.
    """
    places, is_pattern = _places(source)
    for place in _outermost(places):
        if is_pattern and _is_output(place.path, without):
            continue
        files: Iterable[File] = ()
        if place.is_folder:
            files = _in_folder(place, without, left_out, is_pattern)
        elif not place.path.lower().endswith(COMPRESSED):
            files = [File(place.path, printable(place.name), place.size)]
        elif not is_pattern:
            raise ValueError(
                f"{printable(source)} is a compressed archive, which cannot be searched; unpack it to .tar"
            )
        else:
            left_out[printable(place.name)] += 1
        for file in files:
            if named and _is_named(file.path, named):
                raise ValueError(f"{file.name} is named twice; name each input once")
            yield file
        named.add(place.path)


def _places(source: str) -> tuple[Iterable[_Place], bool]:
    """What is under a name, sorted, and whether the name is a pattern."""
    if is_remote(source):
        found, is_pattern = remote.find(source)
        return (_Place(file.url, file.url, file.is_folder, file.size) for file in found), is_pattern
    is_pattern = not os.path.lexists(source)
    # With two `**`, glob finds the same file in several ways.
    paths = sorted(set(glob.glob(source, recursive=True))) if is_pattern else [source]
    return (_Place(os.path.abspath(path), path, os.path.isdir(path)) for path in paths), is_pattern


def _is_named(path: str, named: set[str]) -> bool:
    """Whether a file was found under one of the names: it has this name, or is of a kind found in folders."""
    if path in named:
        return True
    suffix = os.path.splitext(path)[1].lower()
    return suffix in KINDS and KINDS[suffix].is_found and _is_inside(path, named)


def _is_inside(path: str, folders: set[str]) -> bool:
    """Whether a path lies in one of the folders, at any depth."""
    folder = os.path.dirname(path)
    while folder not in folders and folder != os.path.dirname(folder):
        folder = os.path.dirname(folder)
    return folder in folders


def _is_output(path: str, output: str | None) -> bool:
    """Whether a file lies in the folder of the output, which is a real path, or a URL as listings have it."""
    return output is not None and _is_inside(path if is_remote(path) else os.path.realpath(path), {output})


def _outermost(places: Iterable[_Place]) -> Iterator[_Place]:
    """Leave out what lies in a folder that is among the sorted places: `**` matches both."""
    folders: set[str] = set()
    for place in places:
        if not _is_inside(place.path, folders):
            yield place
        if place.is_folder:
            folders.add(place.path)


def _in_folder(
    folder: _Place, without: str | None, left_out: Counter[str], is_pattern: bool
) -> Iterator[File]:
    """Yield the files in a folder that hold clips, and count the others."""
    beginning = len(os.path.join(folder.path, ""))
    for path, size in _listing(folder.path, without):
        name = path[beginning:]
        suffix = os.path.splitext(path)[1].lower()
        if suffix in KINDS and KINDS[suffix].is_found:
            yield File(path, printable(os.path.join(folder.name, name) if is_pattern else name), size)
        elif path.lower().endswith(COMPRESSED):
            left_out[printable(name)] += 1
        else:
            left_out[proper_suffix(suffix)] += 1


def _listing(folder: str, without: str | None) -> Iterator[tuple[str, int | None]]:
    """Yield the paths of the files at any depth in a folder, and their sizes if the listing has them."""
    if is_remote(folder):
        for file in remote.list_files(folder):
            if not _is_output(file.url, without):
                yield file.url, file.size
    else:
        yield from ((path, None) for path in find_files(folder, without=without))


def _distinct(items: Iterable[Item]) -> Iterator[Item]:
    """Append #2 to the id of the second clip with the same id, #3 to the third, and so on."""
    seen, counts = _Hashes(), dict[str, int]()  # of ids that were seen twice
    for item in items:
        name, count = item.id, counts.get(item.id, 1)
        while not seen.add(name):
            counts[item.id] = count = count + 1
            name = f"{item.id}#{count}"
        yield item if name == item.id else item._replace(id=name)


class _Hashes:
    """Hashes of the ids that were seen, at 8 bytes each.

    Two ids of a million have the same hash once in 30 million corpora. One of them gets a #2 that it would
    not need, and they are still distinct.
    """

    def __init__(self) -> None:
        self._newest: set[int] = set()
        self._older: list[array[int]] = []  # sorted; each is at least twice as long as the next

    def add(self, name: str) -> bool:
        """Remember an id. Returns whether it is new."""
        digest = hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8).digest()
        key = int.from_bytes(digest, "little")
        if key in self._newest or any(_contains(keys, key) for keys in self._older):
            return False
        self._newest.add(key)
        if len(self._newest) == NEWEST:
            keys = np.sort(np.fromiter(self._newest, np.uint64))
            self._newest.clear()
            while self._older and len(self._older[-1]) < 2 * len(keys):
                keys = np.sort(np.concatenate([np.frombuffer(self._older.pop(), np.uint64), keys]))
            self._older.append(array("Q", keys.tobytes()))
        return True


def _contains(keys: "array[int]", key: int) -> bool:
    """Whether a key is among sorted ones."""
    place = bisect_left(keys, key)
    return place < len(keys) and keys[place] == key
