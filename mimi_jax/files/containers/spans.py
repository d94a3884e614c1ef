"""What all containers share: a part of a file as a file of its own, and tags before and after the audio."""

import io
import os
from collections.abc import Callable
from typing import BinaryIO, NamedTuple

BUFFER_BYTES = 1 << 16
MAX_PADDING = 4096  # bytes; so many zeros may follow the audio, since some programs fill up blocks of a disk


class Container(NamedTuple):
    """An audio file as libsndfile should read it, and what its header states."""

    file: BinaryIO  # the audio alone
    num_bytes: int | None = None  # of samples that are not compressed, all channels; None if unknown
    num_samples: int | None = None  # of each channel; None if unknown
    file_to_seek: BinaryIO | None = None  # instead of `file`, to read a part that does not reach the end
    # For formats in which libsndfile cannot find a sample without reading all before it: a file that begins
    # at that sample or somewhat before, and the sample where it begins.
    begin_at: Callable[[int], tuple[BinaryIO, int]] | None = None


class SeekableFile(io.RawIOBase):
    """What files to read from have in common: a size and a position, both in bytes."""

    _size: int
    _position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        self._position = max(base + offset, 0)
        return self._position

    def tell(self) -> int:
        return self._position


class Span(SeekableFile):
    """Some bytes, and after them a range of another file, as a file of its own.

    Args:
        file: binary and seekable. It stays open when the span is closed.
        start, end: the range of bytes.
        head: bytes that stand before the range.
    """

    def __init__(self, file: BinaryIO, start: int, end: int, head: bytes = b""):
        self._file, self._head = file, head
        self._offset, self._size = start - len(head), end - start + len(head)

    def readinto(self, buffer) -> int:
        view = memoryview(buffer).cast("B")
        if self._position < len(self._head):
            data = self._head[self._position : self._position + len(view)]
            count = len(data)
            view[:count] = data
        else:
            self._file.seek(self._offset + self._position)
            count = self._file.readinto(view[: max(self._size - self._position, 0)])  # pyright: ignore
        self._position += count
        return count


def part_of(file: BinaryIO, start: int, end: int, head: bytes = b"") -> BinaryIO:
    """A `Span` with a buffer, or the file itself if that is the same.

    The file stays open when the part is closed.
    """
    if start == 0 and not head and end == file.seek(0, os.SEEK_END):
        return file
    return io.BufferedReader(Span(file, start, end, head), BUFFER_BYTES)


def read_at(file: BinaryIO, position: int, size: int) -> bytes:
    """The bytes at a position, or fewer at the end of the file."""
    file.seek(position)
    return file.read(size)


def skip_tags(file: BinaryIO, start: int) -> int:
    """Where the tags end that begin at `start`, if there are any. They may claim to go on after the file."""
    while size := _tag_size(read_at(file, start, 32)):
        start += size
    return start


def _tag_size(head: bytes) -> int:
    """The size of the tag that begins with these bytes; 0 if none does."""
    if head[:3] == b"ID3" and len(head) >= 10 and max(head[6:10]) < 0x80:  # ID3v2: a size in 4 x 7 bits
        size = head[6] << 21 | head[7] << 14 | head[8] << 7 | head[9]
        return 10 + size + (10 if head[5] & 0x10 else 0)
    if head[:8] == b"APETAGEX" and len(head) == 32 and head[23] & 0x20:  # APEv2, at its header
        return 32 + int.from_bytes(head[12:16], "little")
    if head[:3] == b"TAG":  # ID3v1
        return 128
    return 0


def trim_tags(file: BinaryIO, start: int, end: int) -> int:
    """Where the tags begin that end at `end`, if there are any. `start` is where the audio begins."""
    while size := _size_of_last_tag(file, start, end):
        end -= size
    return end


def _size_of_last_tag(file: BinaryIO, start: int, end: int) -> int:
    tail = read_at(file, max(end - 160, start), min(160, end - start))
    size = 0
    if tail[-128:-125] == b"TAG":  # ID3v1
        size = 128
    elif tail[-32:-24] == b"APETAGEX":  # APEv1 and APEv2, at the footer
        size = int.from_bytes(tail[-20:-16], "little") + (32 if tail[-9] & 0x80 else 0)
    elif tail[-9:] == b"LYRICS200" and tail[-15:-9].isdigit():  # Lyrics3v2
        size = int(tail[-15:-9]) + 15
    elif tail[-10:-7] == b"3DI" and max(tail[-4:]) < 0x80:  # ID3v2 with a footer
        size = 20 + (tail[-4] << 21 | tail[-3] << 14 | tail[-2] << 7 | tail[-1])
    return size if size <= end - start else 0


def is_padding(file: BinaryIO, start: int, end: int) -> bool:
    """Whether nothing but tags, and a few zeros before them, stands between two positions."""
    end = trim_tags(file, start, end)
    return end - start <= MAX_PADDING and not read_at(file, start, end - start).strip(b"\0")
