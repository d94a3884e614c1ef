"""Files with a URL: in a bucket, on the Hugging Face Hub, or anywhere else that fsspec knows.

A path with `://` in it is a URL; every other path is local. Credentials are those that the library of each
service finds by itself. fsspec is imported by the functions that need it.

A request that fails is made again, after longer and longer delays. A file that is read in blocks thus goes on
where it stopped. What came is compared with the size of the file: a shorter answer is a failed request.
"""

import collections
import contextlib
import functools
import io
import os
import random
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, BinaryIO, NamedTuple, TypeGuard, TypeVar

from mimi_jax.config import ceil_div

DELAYS = (0.5, 1.0, 2.0, 4.0, 8.0)  # seconds before the second attempt, the third, and so on
LARGE_BLOCK = 4 << 20  # bytes that are asked for at once, in a file that is read from front to back
SMALL_BLOCK = 1 << 18  # in a file of which little is read
AHEAD = 4  # large blocks that are asked for before they are needed
KEPT = 12  # blocks in memory: a Parquet file is read in several places by turns

Answer = TypeVar("Answer")


class Listed(NamedTuple):
    """A file or a folder in a listing."""

    url: str
    size: int | None  # bytes; None for a folder


def is_remote(path: str | os.PathLike[str]) -> TypeGuard[str]:
    """Whether a path is a URL."""
    return isinstance(path, str) and "://" in path


def join(folder: str, name: str) -> str:
    """The path or URL of a file, whose name may be a path or URL itself."""
    if is_remote(name) or not is_remote(folder) or os.path.isabs(name):
        return name if is_remote(name) else os.path.join(folder, name)
    return f"{folder.rstrip('/')}/{name}"


def resolve(url: str) -> tuple[Any, str]:
    """The fsspec file system of a URL, and the path in it. fsspec keeps one file system in each process.

    Raises:
        ImportError: fsspec, or the library of the service, is not installed.
        ValueError: no service has such URLs.
    """
    try:
        import fsspec

        return fsspec.core.url_to_fs(url)
    except ImportError as error:
        raise ImportError(f"{url} cannot be read: {error}; run pip install 'mimi_jax[remote]'") from error
    except ValueError as error:
        raise ValueError(f"{url} is not a URL that fsspec knows: {error}") from error


def attempt(url: str, call: Callable[[], Answer], stop: threading.Event | None = None) -> Answer:
    """Make a request, and again if it fails.

    Args:
        url: for errors.
        call: makes the request.
        stop: ends the delays when it is set.

    Raises:
        FileNotFoundError: there is no such file.
        ConnectionError: the request failed each time, or is not allowed. It may work in another run.
    """
    stop = stop or threading.Event()
    for delay in (*DELAYS, None):
        try:
            return call()
        except FileNotFoundError as error:
            raise FileNotFoundError(f"there is no file {url}") from error
        except Exception as error:  # the errors of the services have no common class
            if delay is None or _is_final(error) or stop.wait(delay * random.uniform(0.5, 1)):
                reason = " ".join(str(error).split()) or type(error).__name__
                raise ConnectionError(f"{url} cannot be reached: {reason}") from error
    raise AssertionError("not reached")


def _is_final(error: Exception) -> bool:
    """Whether the next attempt would fail in the same way: by rights, or since the file was replaced."""
    name = type(error).__name__
    return isinstance(error, PermissionError) or "Credentials" in name or name == "FileExpired"


def list_files(url: str) -> Iterator[Listed]:
    """Yield the files at any depth in a folder, sorted within each subfolder. One subfolder is in memory."""
    filesystem, path = resolve(url)
    for entry in _listed(filesystem, path):
        if entry["type"] == "directory":
            found = attempt(url, functools.partial(filesystem.find, entry["name"], detail=True))
            filesystem.invalidate_cache()
            entries = [found[name] for name in sorted(found)]
        else:
            entries = [entry]
        for file in entries:
            if not file["name"].endswith("/"):  # a mark that some programs make for an empty folder
                yield Listed(filesystem.unstrip_protocol(file["name"]), file["size"] or 0)


def _listed(filesystem: Any, path: str) -> list[dict[str, Any]]:
    filesystem.invalidate_cache()
    entries = attempt(path, functools.partial(filesystem.ls, path, detail=True))
    return sorted((entry for entry in entries if entry["name"].strip("/") != path), key=lambda e: e["name"])


def names_in(url: str) -> set[str]:
    """The names in a folder; none if there is no such folder. They are never from a cache."""
    filesystem, path = resolve(url)
    try:
        return {entry["name"].rstrip("/").rsplit("/", 1)[-1] for entry in _listed(filesystem, path)}
    except FileNotFoundError:
        return set()


def find(url: str) -> tuple[list[Listed], bool]:
    """What is under a URL, or matches it as a pattern such as "s3://bucket/**/*.flac".

    Returns:
        The files and folders, sorted, and whether the URL is a pattern.

    Raises:
        FileNotFoundError: there is nothing.
        ConnectionError: the service cannot be reached.
    """
    filesystem, path = resolve(url)
    is_pattern = False
    try:
        found = {path: _info(filesystem, path, url)}
    except FileNotFoundError:
        is_pattern = any(letter in path for letter in "*?[")
        found = attempt(url, functools.partial(filesystem.glob, path, detail=True)) if is_pattern else {}
        if not found:
            raise FileNotFoundError(f"there is no folder or file {url}, and nothing matches it") from None
    sizes = {name: None if found[name]["type"] == "directory" else found[name]["size"] for name in found}
    return [Listed(filesystem.unstrip_protocol(name), sizes[name]) for name in sorted(sizes)], is_pattern


def is_folder(url: str) -> bool:
    """Whether a URL is that of a folder.

    Raises:
        FileNotFoundError: there is nothing.
        ConnectionError: the service cannot be reached.
    """
    return _info(*resolve(url), url)["type"] == "directory"


def exists(url: str) -> bool:
    """Whether there is a file or folder."""
    filesystem, path = resolve(url)
    try:
        _info(filesystem, path, url)
    except FileNotFoundError:
        return False
    return True


def read_whole(url: str, size: int | None = None) -> bytes:
    """Read a file at once.

    Args:
        url: of the file.
        size: in bytes, if a listing told.

    Raises:
        FileNotFoundError: there is no such file.
        ConnectionError: it cannot be read, or has another size.
    """
    filesystem, path = resolve(url)
    num_bytes: int = _info(filesystem, path, url)["size"] if size is None else size
    if num_bytes == 0:
        return b""
    return attempt(url, lambda: _complete(filesystem.cat_file(path, start=0, end=num_bytes), num_bytes))


def _info(filesystem: Any, path: str, url: str) -> dict[str, Any]:
    """What the service says about a file or folder, never from a cache."""
    filesystem.invalidate_cache(path)
    return attempt(url, functools.partial(filesystem.info, path))


def _complete(data: bytes, size: int) -> bytes:
    if len(data) != size:
        raise OSError(f"{len(data)} of {size} bytes came")
    return data


def write_whole(url: str, data: bytes) -> None:
    """Write a file, which appears whole or not at all. Small ones are one request."""
    filesystem, path = resolve(url)
    attempt(url, functools.partial(filesystem.pipe_file, path, data))


def delete(url: str) -> None:
    """Delete a file, if it exists."""
    filesystem, path = resolve(url)
    with contextlib.suppress(FileNotFoundError):
        attempt(url, functools.partial(filesystem.rm_file, path))


def abort_uploads(url: str) -> None:
    """Abort uploads in parts to a folder, which killed processes began. S3 would keep the parts forever."""
    filesystem, path = resolve(url)
    if not hasattr(filesystem, "list_multipart_uploads"):
        return
    bucket, prefix, _ = filesystem.split_path(path.rstrip("/") + "/")
    for upload in attempt(url, functools.partial(filesystem.list_multipart_uploads, bucket)):
        if upload["Key"].startswith(prefix):
            abort = functools.partial(filesystem.abort_mpu, bucket, upload["Key"], upload["UploadId"])
            with contextlib.suppress(FileNotFoundError):  # it was finished or aborted meanwhile
                attempt(url, abort)


@contextlib.contextmanager
def open_binary(path: str | os.PathLike[str], ahead: bool = True) -> Iterator[BinaryIO]:
    """Open a local file, or one with a URL, to read it.

    Args:
        path: of the file.
        ahead: ask for blocks of a remote file before they are needed, since it is read from front to back.
            Otherwise, little of it is read.

    Raises:
        FileNotFoundError: there is no such file.
        ConnectionError: while it is read, or at the end of the `with` block: a remote file cannot be
            reached, or was replaced.
    """
    if not is_remote(path):
        with open(path, "rb") as file:
            yield file
        return
    blocks = _Blocks(path, ahead)
    try:
        yield io.BufferedReader(blocks)
        if ahead:
            blocks.check_unchanged()
    finally:
        blocks.close()


class _Blocks(io.RawIOBase):
    """A remote file, of which the last few blocks that were read are in memory."""

    def __init__(self, url: str, ahead: bool):
        self._url, self._position = url, 0
        self._filesystem, self._path = resolve(url)
        if ahead:
            self._info = _info(self._filesystem, self._path, url)
        else:  # the Hub asks for a whole listing, so that the one that is in memory is better
            self._info = attempt(url, functools.partial(self._filesystem.info, self._path))
        self._size: int = self._info["size"]
        self._block, self._ahead = (LARGE_BLOCK, AHEAD) if ahead else (SMALL_BLOCK, 0)
        self._fetch_range = self._opened_range() if ahead else self._cat_range
        self._blocks: collections.OrderedDict[int, Future[bytes]] = collections.OrderedDict()
        self._pool, self._stop = ThreadPoolExecutor(self._ahead + 1), threading.Event()

    def _opened_range(self) -> Callable[[int, int], bytes]:
        """What reads a range of the version that is opened now, where the service has versions."""
        opened = attempt(self._url, lambda: self._filesystem.open(self._path, "rb", cache_type="none"))
        return getattr(opened, "_fetch_range", self._cat_range)

    def _cat_range(self, start: int, end: int) -> bytes:
        return self._filesystem.cat_file(self._path, start=start, end=end)

    def check_unchanged(self) -> None:
        if _info(self._filesystem, self._path, self._url) != self._info:
            raise ConnectionError(f"{self._url} was replaced while it was read")

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

    def readinto(self, buffer) -> int:
        view = memoryview(buffer).cast("B")
        count = 0
        while count < len(view) and self._position < self._size:
            number, offset = divmod(self._position, self._block)
            part = memoryview(self._read(number))[offset : offset + len(view) - count]
            view[count : count + len(part)] = part
            count += len(part)
            self._position += len(part)
        return count

    def _read(self, number: int) -> bytes:
        """A block. The next ones are asked for if the file is read on from there."""
        is_sequential = not self._blocks or number - 1 in self._blocks
        last = min(number + (self._ahead if is_sequential else 0), ceil_div(self._size, self._block) - 1)
        for wanted in range(number, last + 1):
            if wanted not in self._blocks:
                self._blocks[wanted] = self._pool.submit(self._fetch, wanted)
        self._blocks.move_to_end(number)
        while len(self._blocks) > KEPT:
            self._blocks.popitem(last=False)[1].cancel()
        return self._blocks[number].result()

    def _fetch(self, number: int) -> bytes:
        start = number * self._block
        end = min(start + self._block, self._size)
        return attempt(self._url, lambda: _complete(self._fetch_range(start, end), end - start), self._stop)

    def close(self) -> None:
        if not self.closed:
            self._stop.set()
            self._pool.shutdown(wait=False, cancel_futures=True)
        super().close()
