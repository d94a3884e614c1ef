"""Remote files that are read in blocks, some of them before they are needed."""

import collections
import contextlib
import io
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import BinaryIO, NamedTuple

from mimi_jax.config import ceil_div
from mimi_jax.files.containers.spans import SeekableFile
from mimi_jax.files.remote import attempt, complete, details, is_remote, resolve


class Blocks(NamedTuple):
    """How a remote file is read."""

    size: int  # bytes of a block
    ahead: int  # blocks that are asked for before they are needed
    kept: int  # blocks in memory


ARCHIVE = Blocks(4 << 20, ahead=4, kept=12)  # from front to back; Parquet at several places in turn
CLIP = Blocks(1 << 20, ahead=4, kept=6)  # from front to back, beside many others
CROP = Blocks(1 << 18, ahead=0, kept=6)  # a few places


@contextlib.contextmanager
def open_binary(path: str | os.PathLike[str], blocks: Blocks) -> Iterator[BinaryIO]:
    """Open a local file, or one with a URL, to read it.

    Args:
        path: of the file.
        blocks: how a remote file is read.

    Raises:
        FileNotFoundError: there is no such file.
        ConnectionError: while it is read, or at the end of the `with` block: a remote file cannot be
            reached, or was replaced.
    """
    if not is_remote(path):
        with open(path, "rb") as file:
            yield file
        return
    file = _RemoteFile(path, blocks)
    try:
        yield io.BufferedReader(file)
        if blocks.ahead:
            file.check_unchanged()
    finally:
        file.close()


class _RemoteFile(SeekableFile):
    """A remote file, of which the last few blocks that were read are in memory."""

    def __init__(self, url: str, blocks: Blocks):
        # First what `close` needs: Python calls it also if what follows raises.
        self._pool, self._stop = ThreadPoolExecutor(blocks.ahead + 1), threading.Event()
        self._url, self._blocks = url, blocks
        self._filesystem, self._path = resolve(url)
        # To look at a file, the Hub lists its folder. That is too much for each crop, so a cache may answer.
        self._details = details(url, cached=not blocks.ahead)
        self._size = self._details["size"]
        if self._size is None:
            raise ValueError(f"the server of {url} does not say how large the file is; download it first")
        self._fetch_range = self._opened_range() if blocks.ahead else self._cat_range
        self._kept: collections.OrderedDict[int, Future[bytes]] = collections.OrderedDict()

    def _opened_range(self) -> Callable[[int, int], bytes]:
        """What reads a range of the version that is opened now, where the service has versions."""
        import fsspec.spec

        opened = attempt(self._url, lambda: self._filesystem.open(self._path, "rb", cache_type="none"))
        # Other files, such as those of file://, have one position for all threads.
        is_safe = isinstance(opened, fsspec.spec.AbstractBufferedFile)
        return opened._fetch_range if is_safe else self._cat_range

    def _cat_range(self, start: int, end: int) -> bytes:
        return self._filesystem.cat_file(self._path, start=start, end=end)

    def check_unchanged(self) -> None:
        if details(self._url) != self._details:
            raise ConnectionError(f"{self._url} was replaced while it was read")

    def readinto(self, buffer) -> int:
        view = memoryview(buffer).cast("B")
        count = 0
        while count < len(view) and self._position < self._size:
            number, offset = divmod(self._position, self._blocks.size)
            part = memoryview(self._block(number))[offset : offset + len(view) - count]
            view[count : count + len(part)] = part
            count += len(part)
            self._position += len(part)
        return count

    def _block(self, number: int) -> bytes:
        """A block. The next ones are asked for if the file is read on from there."""
        is_sequential = not self._kept or number - 1 in self._kept
        last = ceil_div(self._size, self._blocks.size) - 1
        for wanted in range(number, min(number + self._blocks.ahead * is_sequential, last) + 1):
            if wanted not in self._kept:
                self._kept[wanted] = self._pool.submit(self._fetch, wanted)
            self._kept.move_to_end(wanted)  # before those that were read
        while len(self._kept) > self._blocks.kept:
            self._kept.popitem(last=False)[1].cancel()
        return self._kept[number].result()

    def _fetch(self, number: int) -> bytes:
        start = number * self._blocks.size
        end = min(start + self._blocks.size, self._size)
        return attempt(self._url, lambda: complete(self._fetch_range(start, end), end - start), self._stop)

    def close(self) -> None:
        if not self.closed:
            self._stop.set()
            self._pool.shutdown(wait=False, cancel_futures=True)
        super().close()
