"""Ogg files: a chain of pages, each with a checksum. The last page of a stream is marked.

libsndfile plays what is left of a file that was cut short, leaves out damaged pages, and plays only the first
of several streams. So all pages are checked first.
"""

import zlib
from collections.abc import Iterator
from typing import BinaryIO

from mimi_jax.files.containers.spans import Container, is_padding, part_of, read_at

HEADER = 27  # bytes of a page, before the lengths of its segments
FIRST, LAST = 2, 4  # flags of a page
BLOCK = 1 << 20  # bytes that are read at once
MAX_PAGE = HEADER + 255 + 255 * 255  # bytes
MIRRORED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))


def open_ogg(file: BinaryIO, start: int, end: int) -> Container:
    position, flags, serial, number, last = start, 0, b"", 0, 0
    for page in _pages(file, start, end):
        granule = int.from_bytes(page[6:14], "little", signed=True)  # where the page ends in the audio
        if position == start:
            serial, number = page[14:18], int.from_bytes(page[18:22], "little")
        elif page[14:18] != serial or page[5] & FIRST:
            raise ValueError("has several streams in one file; convert it to WAV or FLAC")
        elif int.from_bytes(page[18:22], "little") != number:
            raise ValueError(f"is damaged: a page is missing before byte {position}")
        if 0 <= granule < last:
            raise ValueError(f"is damaged: the page at byte {position} goes back in time")
        last = max(granule, last)
        position, flags, number = position + len(page), page[5], number + 1
        if flags & LAST:
            break
    if not flags & LAST:
        raise ValueError(f"is cut short: it ends at {end} bytes, before the page that is marked as the last")
    if not is_padding(file, position, end):
        raise ValueError(
            f"goes on for {end - position} bytes after the end of its stream: there are several streams in"
            " one file; convert it to WAV or FLAC"
        )
    return Container(part_of(file, start, end))


def _pages(file: BinaryIO, position: int, end: int) -> Iterator[bytes]:
    block, at = b"", 0  # what was read, and where the next page begins in it
    while position < end:
        if len(block) - at < min(MAX_PAGE, end - position):
            block, at = read_at(file, position, min(BLOCK, end - position)), 0
        page = _page(block, at, position)
        yield page
        position, at = position + len(page), at + len(page)


def _page(block: bytes, at: int, position: int) -> bytes:
    """The page that begins at `at` in a block, and at `position` in the file."""
    header = block[at : at + HEADER]
    if not header.startswith(b"OggS"[: len(header)]):
        raise ValueError(f"is damaged: there is no page at byte {position}")
    lengths = block[at + HEADER : at + HEADER + header[-1]]  # the last byte of a header is their number
    page = block[at : at + HEADER + len(lengths) + sum(lengths)]
    if len(header) < HEADER or len(lengths) < header[-1] or len(page) < HEADER + len(lengths) + sum(lengths):
        raise ValueError(f"is cut short: it ends inside the page at byte {position}")
    if checksum(page) != page[22:26]:
        raise ValueError(f"is damaged: the checksum of the page at byte {position} is wrong")
    return page


def checksum(page: bytes) -> bytes:
    """The checksum of a page, as the page has it: a CRC with zlib's polynomial, but of mirrored bits."""
    mirrored = (page[:22] + bytes(4) + page[26:]).translate(MIRRORED)
    crc = zlib.crc32(mirrored, 0xFFFFFFFF) ^ 0xFFFFFFFF
    return crc.to_bytes(4, "big").translate(MIRRORED)
