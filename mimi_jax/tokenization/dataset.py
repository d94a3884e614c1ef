"""Reading what was tokenized: clip after clip, at random for Grain, or as text for byte-pair encoding."""

import collections
import itertools
import json
import os
from bisect import bisect_right
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

UNICODE_OFFSET = 0x4E00  # codec-bpe's, from the acoustic BPE of Shen et al. (arXiv 2310.14580)
SURROGATES = range(0xD800, 0xE000)  # which are no characters
CACHED_GROUPS = 16  # row groups that are kept decompressed


class TokenizedClip(NamedTuple):
    id: str
    source: str
    num_samples: int
    codes: np.ndarray  # uint16 [num_quantizers, num_frames]


def read_manifest(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """What the codes in a folder are: `settings`, `config`, `totals`, `complete`.

    Raises:
        FileNotFoundError: the folder has no manifest.
    """
    path = Path(folder) / "manifest.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} is no folder of `mimi-jax tokenize`: it has no manifest.json")
    return json.loads(path.read_text())


def read_codes(
    folder: str | os.PathLike[str], process_index: int = 0, process_count: int = 1
) -> Iterator[TokenizedClip]:
    """The clips of a folder, in the order of the input, in the memory of 64 clips.

    Args:
        folder: what `tokenize` wrote; shards that are not there yet are left out.
        process_index, process_count: to read every `process_count`-th shard.
    """
    import pyarrow.parquet as pq

    for path in _files(folder)[process_index::process_count]:
        with pq.ParquetFile(path) as file:
            for group in range(file.num_row_groups):
                yield from _clips(file.read_row_group(group))


class CodeSource:
    """The clips of a folder by number: a data source for `grain.MapDataset.source`.

        dataset = grain.MapDataset.source(CodeSource("tokens")).shuffle(seed=0).batch(16)

    A clip costs the reading of its row group, 64 clips, unless that was just read.
    """

    def __init__(self, folder: str | os.PathLike[str]):
        import pyarrow.parquet as pq

        self._paths = _files(folder)
        counts: list[int] = []
        self._groups: list[tuple[int, int]] = []  # a file, and a row group in it
        for number, path in enumerate(self._paths):
            metadata = pq.read_metadata(path)
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
            raise IndexError(f"there are {len(self)} clips, got index {index}")
        number = bisect_right(self._starts, index) - 1
        return self._read(number)[index - self._starts[number]]

    def __repr__(self) -> str:  # by which Grain tells a source when it goes on from a checkpoint
        return f"CodeSource({len(self._paths)} files, {len(self)} clips)"

    def _read(self, number: int) -> list[TokenizedClip]:
        import pyarrow.parquet as pq

        if (clips := self._cache.pop(number, None)) is None:
            file, group = self._groups[number]
            with pq.ParquetFile(self._paths[file]) as opened:
                clips = list(_clips(opened.read_row_group(group)))
        self._cache[number] = clips
        if len(self._cache) > CACHED_GROUPS:
            self._cache.popitem(last=False)
        return clips


def _files(folder: str | os.PathLike[str]) -> list[Path]:
    read_manifest(folder)
    return sorted((Path(folder) / "codes").glob("*-of-*.parquet"))


def _clips(table: Any) -> Iterator[TokenizedClip]:
    names = ("id", "source", "num_samples", "num_quantizers")
    columns = [table[name].to_pylist() for name in names]
    lists = table["codes"].combine_chunks()
    flat, offsets = lists.values.to_numpy(), lists.offsets.to_numpy()
    rows = zip(*columns, offsets[:-1], offsets[1:], strict=True)
    for name, source, num_samples, quantizers, first, last in rows:
        yield TokenizedClip(name, source, num_samples, flat[first:last].reshape(quantizers, -1))


def to_unicode(codes: np.ndarray, codebook_size: int, unicode_offset: int = UNICODE_OFFSET) -> str:
    """Codes as text, a character a code, frame after frame: what `codec-bpe` trains its tokenizers on.

    Code c of codebook k is the character unicode_offset + k * codebook_size + c.

    Args:
        codes: integers [codebooks, frames] in [0, codebook_size).
        codebook_size: codes of a codebook.
        unicode_offset: the first character; 0xE000 where codes would reach into the surrogates.

    Raises:
        ValueError: codes of another shape or range, or characters that do not exist.
    """
    codes = np.asarray(codes)
    if codes.ndim != 2 or codes.dtype.kind not in "iu":
        raise ValueError(f"codes must be integers [codebooks, frames], got {codes.dtype} {list(codes.shape)}")
    if codes.size and not (codes.min() >= 0 and codes.max() < codebook_size):
        raise ValueError(f"codes must lie in [0, {codebook_size}), got {codes.min()} to {codes.max()}")
    offsets = _offsets(len(codes), codebook_size, unicode_offset)
    return (codes + offsets).T.astype("<u4").tobytes().decode("utf-32-le")


def from_unicode(
    text: str, num_codebooks: int, codebook_size: int, unicode_offset: int = UNICODE_OFFSET
) -> np.ndarray:
    """The codes, uint16 [codebooks, frames], that `to_unicode` made a text of.

    Raises:
        ValueError: the text is not whole frames of such codes.
    """
    numbers = np.frombuffer(text.encode("utf-32-le"), "<u4").astype(np.int64)
    if len(numbers) % num_codebooks:
        raise ValueError(f"{len(numbers)} characters are no whole frames of {num_codebooks} codebooks")
    codes = numbers.reshape(-1, num_codebooks).T - _offsets(num_codebooks, codebook_size, unicode_offset)
    if codes.size and not (codes.min() >= 0 and codes.max() < codebook_size):
        raise ValueError("the text has characters of other codebooks, or of another codebook_size or offset")
    return codes.astype(np.uint16)


def _offsets(num_codebooks: int, codebook_size: int, unicode_offset: int) -> np.ndarray:
    last = unicode_offset + num_codebooks * codebook_size
    if last > 0x110000 or (unicode_offset < SURROGATES.stop and last > SURROGATES.start):
        raise ValueError(
            f"characters from {unicode_offset:#x} to {last:#x} do not all exist; begin at"
            " unicode_offset=0xE000, or keep fewer codebooks"
        )
    return unicode_offset + codebook_size * np.arange(num_codebooks)[:, None]
