"""Reading tokenized clips: one after the other, or by number for Grain."""

import collections
import fnmatch
import itertools
import json
import os
from bisect import bisect_right
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from mimi_jax.files.blocks import CLIP, CROP
from mimi_jax.files.folders import LocalFolder, RemoteFolder, open_folder
from mimi_jax.files.remote import AT_ONCE
from mimi_jax.tokenization.records import FORMAT, TokenizedClip

CACHED_GROUPS = 16  # decompressed row groups that are kept in memory


def read_manifest(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Read what is known of the codes in a folder.

    Args:
        folder: the output of `tokenize`, a path or a URL such as "s3://bucket/tokens".

    Returns:
        The fields of manifest.json, among them `settings`, `config` (of the model), `totals` and `complete`.

    Raises:
        FileNotFoundError: the folder has no manifest, or is not an output of `tokenize`.
    """
    expected = f"{folder} must be an output of `mimi-jax tokenize`, but"
    try:
        manifest = json.loads(open_folder(folder).read("manifest.json"))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{expected} has no manifest.json") from error
    if (format := manifest.get("format")) != FORMAT:
        raise FileNotFoundError(f"{expected} its manifest.json is of {format}")
    return manifest


def read_codes(
    folder: str | os.PathLike[str], process_index: int = 0, process_count: int = 1
) -> Iterator[TokenizedClip]:
    """Read the clips of a folder in the order of the input, with no more than 64 clips in memory.

    Args:
        folder: the output of `tokenize`, a path or a URL. Shards that are not finished yet are left out.
        process_index, process_count: read only every `process_count`-th of the shards that are finished,
            starting with number `process_index`.

    Yields:
        One clip at a time.

    Raises:
        FileNotFoundError: the folder is not an output of `tokenize`.
    """
    import pyarrow.parquet as pq

    opened, names = _files(folder)
    for name in names[process_index::process_count]:
        with opened.opened(name, CLIP) as source, pq.ParquetFile(source) as file:
            for group in range(file.num_row_groups):
                yield from _clips(file.read_row_group(group))


class CodeSource:
    """The clips of a folder by number, as a data source for Grain.

        dataset = grain.MapDataset.source(CodeSource("tokens")).shuffle(seed=0).batch(16)

    To read one clip, its whole row group of 64 clips is read. The last few row groups are kept in memory.

    Args:
        folder: the output of `tokenize`, a path or a URL. Shards that are not finished yet are left out.

    Raises:
        FileNotFoundError: the folder is not an output of `tokenize`.
    """

    def __init__(self, folder: str | os.PathLike[str]):
        self._folder, self._names = _files(folder)
        counts: list[int] = []
        self._groups: list[tuple[int, int]] = []  # number of a file, and of a row group in it
        with ThreadPoolExecutor(AT_ONCE) as pool:
            for number, metadata in enumerate(pool.map(self._footer, self._names)):
                for group in range(metadata.num_row_groups):
                    if rows := metadata.row_group(group).num_rows:
                        counts.append(rows)
                        self._groups.append((number, group))
        self._starts = [0, *itertools.accumulate(counts)]
        self._cache: collections.OrderedDict[int, list[TokenizedClip]] = collections.OrderedDict()

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: int) -> TokenizedClip:
        if not 0 <= index < len(self):
            raise IndexError(f"index must lie in [0, {len(self)}), the number of clips, got {index}")
        number = bisect_right(self._starts, index) - 1
        return self._read(number)[index - self._starts[number]]

    def __repr__(self) -> str:  # Grain compares it when it resumes from a checkpoint
        return f"CodeSource({len(self._names)} files, {len(self)} clips)"

    def _footer(self, name: str) -> Any:
        import pyarrow.parquet as pq

        with self._folder.opened(name, CROP) as source:
            return pq.read_metadata(source)

    def _read(self, number: int) -> list[TokenizedClip]:
        import pyarrow.parquet as pq

        if (clips := self._cache.pop(number, None)) is None:
            file, group = self._groups[number]
            with self._folder.opened(self._names[file], CROP) as source, pq.ParquetFile(source) as opened:
                clips = list(_clips(opened.read_row_group(group)))
        self._cache[number] = clips
        if len(self._cache) > CACHED_GROUPS:
            self._cache.popitem(last=False)
        return clips


def _files(folder: str | os.PathLike[str]) -> tuple[LocalFolder | RemoteFolder, list[str]]:
    """The folder, and the names of its files of codes in the order of the shards."""
    read_manifest(folder)
    opened = open_folder(folder)
    names = fnmatch.filter(opened.names("codes"), "*-of-*.parquet")
    return opened, [f"codes/{name}" for name in sorted(names)]


def _clips(table: Any) -> Iterator[TokenizedClip]:
    names = ("id", "source", "num_samples", "num_quantizers")
    columns = [table[name].to_pylist() for name in names]
    lists = table["codes"].combine_chunks()
    flat, offsets = lists.values.to_numpy(), lists.offsets.to_numpy()
    rows = zip(*columns, offsets[:-1], offsets[1:], strict=True)
    for name, source, num_samples, quantizers, first, last in rows:
        yield TokenizedClip(name, source, num_samples, flat[first:last].reshape(quantizers, -1))
