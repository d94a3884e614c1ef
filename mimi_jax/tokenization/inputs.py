"""Find what there is to tokenize, in folders and patterns, and divide it into shards.

A shard is what becomes one file of codes. No audio is read here, and an archive is opened only when its turn
comes, so a million files are listed in the time that it takes to walk through their folders.
"""

import glob
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from mimi_jax.files.corpus import expand_home, find_files, printable
from mimi_jax.tokenization.settings import DEFAULTS
from mimi_jax.tokenization.sources import COMPRESSED, KINDS, File, Item, Kind, kind_of, proper_suffix

NAMED_KINDS = 10  # kinds of files that are left out and named in a message


class Shard(NamedTuple):
    """Clips that become one file of codes."""

    index: int
    source: str  # as the user named it: a folder, a pattern or a file
    items: tuple[Item, ...] | None  # None for an archive, whose items are read when its turn comes
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
            return iter(self.items)
        return _distinct(self._read_archive(left_out))

    def _read_archive(self, left_out: Counter[str]) -> Iterator[Item]:
        own: Counter[str] = Counter()
        is_empty = True
        for item in kind_of(self.path).read(File(self.path, self.source, self.audio_column), own):
            is_empty = False
            yield item
        if is_empty:
            yield Item("", self.path, problem=f"the file has no clips{_only(own)}")
        left_out.update(own)


def find_shards(
    sources: Sequence[str | os.PathLike[str]],
    clips_per_shard: int = 1000,
    without: str | os.PathLike[str] | None = None,
    audio_column: str = DEFAULTS.audio_column,
) -> list[Shard]:
    """List the shards of some sources, always in the same order.

    The first shard of a source counts the files in its folders that are left out since they are no clips: by
    suffix, and compressed archives by name. Each archive counts its own.

    Args:
        sources: any of these:
            - folders, in which audio files, .tar and .parquet files are found at any depth
            - patterns such as "data/*.flac"
            - audio files
            - WebDataset shards (.tar)
            - Parquet files with a column of audio: bytes, paths, or {bytes, path}
            - manifests (.jsonl, .json), described in `mimi_jax.files.corpus`

            `~` at the start stands for the home folder.
        clips_per_shard: of clips that are files of their own. An archive is always one shard.
        without: a folder to leave out, since the output is written there.
        audio_column: the name of the column in Parquet files.

    Raises:
        FileNotFoundError: a source is missing, or a pattern matches nothing.
        ValueError: a source has nothing to tokenize or is a compressed archive, a manifest is broken, or a
            file is named twice.
        OSError: a folder cannot be read.
    """
    if clips_per_shard < 1:
        raise ValueError(f"clips_per_shard must be positive, got {clips_per_shard}")
    shards: list[Shard] = []
    seen: set[str] = set()
    for source in map(expand_home, sources):
        items: list[Item] = []
        archives: list[tuple[str, str]] = []
        left_out: Counter[str] = Counter()
        for name, path in _files(source, without, left_out):
            if path in seen:
                raise ValueError(f"{name} is named twice; name each input once")
            seen.add(path)
            kind = kind_of(path)
            if kind.is_archive and os.path.isfile(path):
                archives.append((name, path))
            else:
                items.extend(_items(kind, name, path))
        if not items and not archives:
            raise ValueError(
                f"{printable(source)} has nothing to tokenize: no clips, .tar or .parquet"
                f" files{_only(left_out)}; name manifests themselves, and unpack compressed archives"
            )
        items = list(_distinct(items))
        first_of_source = len(shards)
        for first in range(0, len(items), clips_per_shard):
            some = tuple(items[first : first + clips_per_shard])
            num_bytes = sum(item.num_bytes for item in some)
            shards.append(Shard(len(shards), printable(source), some, "", num_bytes, audio_column, Counter()))
        for name, path in archives:
            size = os.path.getsize(path)
            shards.append(Shard(len(shards), name, None, path, size, audio_column, Counter()))
        shards[first_of_source].left_out.update(left_out)
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


def in_words(left_out: Counter[str]) -> str:
    """What was left out, such as "12 .txt, 3 .json"; "" if nothing was."""
    named = left_out.most_common(NAMED_KINDS)
    words = [f"{count:,} {kind}" for kind, count in named]
    if rest := left_out.total() - sum(count for _, count in named):
        words.append(f"{rest:,} more")
    return ", ".join(words)


def _only(left_out: Counter[str]) -> str:
    return f", only {in_words(left_out)}" if left_out else ""


def _files(
    source: str, without: str | os.PathLike[str] | None, left_out: Counter[str]
) -> Iterator[tuple[str, str]]:
    """Yield the names and absolute paths of the files of a source."""
    if os.path.isdir(source):
        for path in _in_folder(source, without, left_out):
            yield printable(os.path.relpath(path, source)), os.path.abspath(path)
        return
    is_named = os.path.lexists(source)
    paths = [source] if is_named else sorted(glob.glob(source, recursive=True))
    if not paths:
        raise FileNotFoundError(f"there is no folder or file {printable(source)}, and nothing matches it")
    for path in _outermost(paths):
        if os.path.isdir(path):
            files = _in_folder(path, without, left_out)
        elif not path.lower().endswith(COMPRESSED):
            files = [path]
        elif is_named:
            raise ValueError(
                f"{printable(path)} is a compressed archive, which cannot be searched; unpack it to .tar"
            )
        else:
            files = []
            left_out[printable(path)] += 1
        for file in files:
            yield printable(file), os.path.abspath(file)


def _outermost(paths: Iterable[str]) -> Iterator[str]:
    """Leave out what lies in a folder that is among the sorted paths: `**` matches both."""
    folders: set[str] = set()
    for path in paths:
        place = os.path.normpath(path)
        if os.path.dirname(place) not in folders:
            yield path
        if os.path.isdir(path):
            folders.add(place)


def _in_folder(folder: str, without: str | os.PathLike[str] | None, left_out: Counter[str]) -> Iterator[str]:
    """Yield the paths of the files in a folder that hold clips, and count the others."""
    for path in find_files(folder, without=without):
        suffix = os.path.splitext(path)[1].lower()
        if suffix in KINDS and KINDS[suffix].is_found:
            yield path
        elif path.lower().endswith(COMPRESSED):
            left_out[printable(os.path.relpath(path, folder))] += 1
        else:
            left_out[proper_suffix(suffix)] += 1


def _items(kind: Kind, name: str, path: str) -> Iterable[Item]:
    if not os.path.isfile(path):  # a link to nothing, or a pipe, which would be waited for without end
        return [Item(name, problem="it is not a file, or it is a link to a file that is missing")]
    return kind.read(File(path, name), Counter())


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
