"""Clips of unequal length packed into rows of equal length, for the training of language models.

    manifest.json                    length, format, counts, and the settings of the codes
    rows/00000.parquet               rows, ROWS_PER_FILE in each file; or 00000.arrayrecord
    000-librispeech/00000.parquet    with `split_by_source`: a folder for each source in place of `rows`

A clip stays whole if it fits into a row; a longer one is cut. Each clip goes into the open row that it fills
best. Only OPEN_ROWS rows are open, so memory does not grow with the corpus, and clips stay near their
neighbours. The same codes give the same rows. The folder appears when it is complete, or not at all.
"""

import itertools
import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mimi_jax.files.atomic import atomic_path
from mimi_jax.files.corpus import expand_home
from mimi_jax.tokenization.dataset import read_codes, read_manifest
from mimi_jax.tokenization.packed import WRITERS, PackedRow, write_rows
from mimi_jax.tokenization.records import TokenizedClip

FORMAT = "mimi_jax.packed"
OPEN_ROWS = 64
ROWS_PER_FILE = 1024


class Packed(NamedTuple):
    """Counts of what was packed."""

    clips: int
    frames: int
    rows: int
    length: int  # of a row, in frames

    @property
    def filled(self) -> float:
        """The share of the rows that holds codes; the rest is padding."""
        return self.frames / max(self.rows * self.length, 1)


class _Piece(NamedTuple):
    """A clip, or a part of one that is longer than a row."""

    id: str
    start: int  # frame of the clip
    codes: np.ndarray  # [num_quantizers, frames]


def pack(
    tokens: str | os.PathLike[str],
    output: str | os.PathLike[str],
    length: int,
    *,
    split_by_source: bool = False,
    format: str = "parquet",
) -> Packed:
    """Pack the clips of a finished job into rows of fixed length.

    Args:
        tokens: the output of `tokenize`.
        output: folder to make.
        length: of a row, in frames (12.5 a second).
        split_by_source: make a folder for each source, the `source` of a clip; no row has clips of two.
        format: "parquet", or "arrayrecord" for Grain (needs `mimi_jax[arrayrecord]`). A record of the latter
            is a safetensors file of the arrays of `PackedRow`, with `ids` as the bytes of a JSON list.

    Returns:
        How many clips, frames and rows there are.

    Raises:
        FileNotFoundError: `tokens` is not an output of `tokenize`, or `output` has no parent folder.
        FileExistsError: `output` exists.
        ValueError: the job is not finished, or an argument is not one of those described.
    """
    if length < 1 or format not in WRITERS:
        raise ValueError(
            f"length must be positive, and format one of {', '.join(WRITERS)}, got {length} and {format!r}"
        )
    manifest, folder = read_manifest(tokens), Path(expand_home(output))
    if not manifest["complete"]:
        raise ValueError(f"{tokens} is not complete; run `mimi-jax tokenize` again with the same arguments")
    if folder.exists():
        raise FileExistsError(f"{folder} exists; name another folder, or remove it first")
    groups: list[dict[str, Any]] = []
    with atomic_path(folder) as temporary:
        temporary.mkdir()
        for source, clips in _by_source(read_codes(tokens), split_by_source):
            name = "rows" if source is None else f"{len(groups):03}-{_slug(source)}"
            (temporary / name).mkdir()
            counts = _write(temporary / name, pack_rows(clips, length), length, format)
            groups.append({"folder": name, "source": source, **counts._asdict()})
        if not groups or not groups[0]["rows"]:
            raise ValueError(f"{tokens} has no clips; the reasons are in its folder errors")
        counts = (sum(group[name] for group in groups) for name in ("clips", "frames", "rows"))
        total = Packed(*counts, length=length)
        fields = {
            "format": FORMAT,
            "files": format,
            **total._asdict(),
            "groups": groups,
            "tokens": {name: manifest[name] for name in ("settings", "config")},
        }
        (temporary / "manifest.json").write_text(json.dumps(fields, indent=2) + "\n")
    return total


def pack_rows(clips: Iterable[TokenizedClip], length: int) -> Iterator[PackedRow]:
    """Pack clips into rows, with no more than OPEN_ROWS rows in memory.

    Args:
        clips: with codes [num_quantizers, frames] of the same number of quantizers.
        length: of a row, in frames.

    Yields:
        Rows, each when it is full or when it is the fullest of too many open ones; the others at the end.
    """
    rows: list[list[_Piece]] = []
    room: list[int] = []  # in frames, of each open row
    for piece in _pieces(clips, length):
        frames = piece.codes.shape[1]
        fitting = [(left, number) for number, left in enumerate(room) if left >= frames]
        if not fitting and len(rows) == OPEN_ROWS:
            fullest = room.index(min(room))
            room.pop(fullest)
            yield _row(rows.pop(fullest), length)
        if fitting:
            _, best = min(fitting)
        else:
            best = len(rows)
            rows.append([])
            room.append(length)
        rows[best].append(piece)
        room[best] -= frames
        if not room[best]:
            room.pop(best)
            yield _row(rows.pop(best), length)
    for row in rows:
        yield _row(row, length)


def _pieces(clips: Iterable[TokenizedClip], length: int) -> Iterator[_Piece]:
    for clip in clips:
        for start in range(0, clip.codes.shape[1], length):
            yield _Piece(clip.id, start, clip.codes[:, start : start + length])


def _row(pieces: list[_Piece], length: int) -> PackedRow:
    codes = np.zeros((len(pieces[0].codes), length), np.uint16)
    segment_ids, positions = np.zeros(length, np.int32), np.zeros(length, np.int32)
    first = 0
    for number, piece in enumerate(pieces, 1):
        frames = piece.codes.shape[1]
        place = slice(first, first + frames)
        codes[:, place], segment_ids[place] = piece.codes, number
        positions[place] = np.arange(piece.start, piece.start + frames)
        first += frames
    return PackedRow(codes, segment_ids, positions, tuple(piece.id for piece in pieces))


def _by_source(
    clips: Iterable[TokenizedClip], split: bool
) -> Iterator[tuple[str | None, Iterable[TokenizedClip]]]:
    """The clips of each source, which come after each other; or all of them, without a source."""
    if split:
        return itertools.groupby(clips, lambda clip: clip.source)
    return iter([(None, clips)])


def _slug(source: str) -> str:
    """The last part of a source, in characters that every file system takes."""
    name = re.sub(r"[^\w.-]+", "-", source.rstrip("/").rpartition("/")[2])
    return name.strip("-.")[:60] or "source"


def _write(folder: Path, rows: Iterable[PackedRow], length: int, format: str) -> Packed:
    """Write files of ROWS_PER_FILE rows, and count what is in them."""
    total = Packed(0, 0, 0, length)

    def counted() -> Iterator[PackedRow]:
        nonlocal total
        for row in rows:
            is_real = row.segment_ids > 0
            begun = np.sum(is_real & (row.positions == 0))  # clips; a part of one begins later
            total = Packed(
                total.clips + int(begun), total.frames + int(is_real.sum()), total.rows + 1, length
            )
            yield row

    remaining = counted()
    for number, first in enumerate(remaining):
        some = itertools.chain([first], itertools.islice(remaining, ROWS_PER_FILE - 1))
        write_rows(folder / f"{number:05}.{format}", some)
    return total
