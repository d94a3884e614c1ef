"""Find what there is to tokenize, in folders and patterns, and divide it into shards.

A shard is what becomes one file of codes. No audio is read here, and an archive is opened only when its turn
comes, so a million files are listed in the time that it takes to walk through their folders.
"""

import glob
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from mimi_jax.files.corpus import find_files, printable
from mimi_jax.tokenization.sources import COMPRESSED, KINDS, Item, kind_of


class Shard(NamedTuple):
    """Clips that become one file of codes."""

    index: int
    source: str  # as the user named it: a folder, a pattern or a file
    items: tuple[Item, ...] | None  # None for an archive, whose items are read when its turn comes
    path: str  # of the archive
    num_bytes: int

    def read(self) -> Iterator[Item]:
        """Yield the clips. No two of them have the same id."""
        if self.items is not None:
            return iter(self.items)
        return _distinct(kind_of(self.path).read(self.path, self.source))


def find_shards(
    sources: Sequence[str | os.PathLike[str]],
    clips_per_shard: int = 1000,
    without: str | os.PathLike[str] | None = None,
) -> list[Shard]:
    """List the shards of some sources, always in the same order.

    Args:
        sources: any of these:
            - folders, in which audio files, .tar and .parquet files are found at any depth
            - patterns such as "data/*.flac"
            - audio files
            - WebDataset shards (.tar)
            - Parquet files with a column `audio` of {bytes, path}
            - manifests (.jsonl), described in `mimi_jax.files.corpus`
        clips_per_shard: of clips that are files of their own. An archive is always one shard.
        without: a folder to leave out, since the output is written there.

    Raises:
        FileNotFoundError: a source is missing, or a pattern matches nothing.
        ValueError: a source has nothing to tokenize, a manifest is broken, or a file is named twice.
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
            if _is_archive(name, path):
                archives.append((name, path))
            else:
                items.extend(_items(name, path))
        if not items and not archives:
            raise ValueError(
                f"{printable(source)} has nothing to tokenize: no {', '.join(_found_suffixes())} files (a"
                " manifest must be named itself)"
            )
        items = list(_distinct(items))
        for first in range(0, len(items), clips_per_shard):
            some = tuple(items[first : first + clips_per_shard])
            num_bytes = sum(item.num_bytes for item in some)
            shards.append(Shard(len(shards), printable(source), some, "", num_bytes))
        for name, path in archives:
            shards.append(Shard(len(shards), name, None, path, os.path.getsize(path)))
    return shards


def fingerprint(shards: Sequence[Shard]) -> str:
    """A hash that is the same for the same clips in the same shards, wherever the files are."""
    digest = hashlib.sha256()
    for shard in shards:
        archive = None if shard.items is not None else [os.path.basename(shard.source), shard.num_bytes]
        digest.update(json.dumps(archive).encode())
        for item in shard.items or ():
            digest.update(json.dumps([item.id, item.start, item.end]).encode())
    return digest.hexdigest()[:16]


def _files(source: str, without: str | os.PathLike[str] | None) -> Iterator[tuple[str, str]]:
    """Yield the names and absolute paths of the files of a source."""
    suffixes = (*_found_suffixes(), *COMPRESSED)
    if os.path.isdir(source):
        for path in find_files(source, suffixes, without):
            yield printable(os.path.relpath(path, source)), os.path.abspath(path)
        return
    paths = [source] if os.path.lexists(source) else sorted(glob.glob(source, recursive=True))
    if not paths:
        raise FileNotFoundError(f"there is no folder or file {printable(source)}, and nothing matches it")
    for path in paths:
        for file in find_files(path, suffixes, without) if os.path.isdir(path) else [path]:
            yield printable(file), os.path.abspath(file)


def _found_suffixes() -> list[str]:
    return [suffix for suffix, kind in KINDS.items() if kind.is_found]


def _is_archive(name: str, path: str) -> bool:
    if path.lower().endswith(COMPRESSED):
        raise ValueError(f"{name} is a compressed archive, which cannot be searched; unpack it to .tar")
    return os.path.isfile(path) and kind_of(path).is_archive


def _items(name: str, path: str) -> Iterable[Item]:
    if not os.path.isfile(path):  # a link to nothing, or a pipe, which would be waited for without end
        return [Item(name, problem="it is not a file, or it is a link to a file that is missing")]
    return kind_of(path).read(path, name)


def _distinct(items: Iterable[Item]) -> Iterator[Item]:
    """Append #2 to the id of the second clip with the same id, #3 to the third, and so on."""
    seen: set[str] = set()
    for item in items:
        name, count = item.id, 1
        while name in seen:
            count += 1
            name = f"{item.id}#{count}"
        seen.add(name)
        yield item._replace(id=name)
