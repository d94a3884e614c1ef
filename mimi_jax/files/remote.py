"""Files with a URL: in buckets of S3 and Google Cloud Storage, and on the Hugging Face Hub.

A path with `://` in it is a URL; every other path is local. fsspec gives all services the same methods, and
may know others. Credentials are those that the library of each service finds by itself. fsspec is imported by
the functions that need it.

A request that fails is made again, after longer and longer delays. What comes is compared with the size of
the file: a shorter answer is a failed request.
"""

import contextlib
import functools
import os
import posixpath
import random
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeGuard, TypeVar

DELAYS = (0.5, 1.0, 2.0, 4.0, 8.0)  # seconds at most before the second attempt, the third, and so on

AT_ONCE = 32  # requests that are made at the same time, so that delays do not add up

Answer = TypeVar("Answer")


class Listed(NamedTuple):
    """A file or a folder in a listing."""

    url: str
    size: int | None  # bytes; None if it is not known
    is_folder: bool = False


def is_remote(path: str | os.PathLike[str]) -> TypeGuard[str]:
    """Whether a path is a URL."""
    return isinstance(path, str) and "://" in path


def join(folder: str, name: str) -> str:
    """The path or URL of a file, whose name may be a path or URL itself, or have `..` in it."""
    if is_remote(name) or not is_remote(folder) or os.path.isabs(name):
        return name if is_remote(name) else os.path.join(folder, name)
    scheme, _, path = folder.partition("://")
    return f"{scheme}://{posixpath.normpath(posixpath.join(path, name))}"


def resolve(url: str) -> tuple[Any, str]:
    """The fsspec file system of a URL, one for each bucket and process, and the path in it.

    Raises:
        ImportError: fsspec, or the library of the service, is not installed.
        ValueError: no service has such URLs.
        FileNotFoundError: the Hub has no such repository.
        ConnectionError: the Hub cannot be reached, which it is for the path alone.
    """
    scheme, _, path = url.partition("://")
    if "::" in url:
        raise ValueError(f"{url} has `::`, with which fsspec chains file systems; rename the file")
    try:
        filesystem = _filesystem(f"{scheme}://{path.split('/')[0]}", os.getpid())
    except ImportError as error:
        raise ImportError(f"{url} cannot be read: {error}; run pip install 'mimi_jax[remote]'") from error
    except ValueError as error:
        raise ValueError(f"{url} is not a URL that fsspec knows: {error}") from error
    return filesystem, attempt(url, functools.partial(filesystem._strip_protocol, url))


@functools.lru_cache(64)
def _filesystem(root: str, process: int) -> Any:
    # fsspec itself keeps one for each thread, of which some services would list everything again.
    import fsspec

    return fsspec.core.url_to_fs(root)[0]


def canonical(url: str) -> str:
    """A URL as listings have it."""
    filesystem, path = resolve(url)
    return filesystem.unstrip_protocol(path)


def attempt(url: str, call: Callable[[], Answer], stop: threading.Event | None = None) -> Answer:
    """Make a request, and again if it fails.

    Args:
        url: for errors.
        call: makes the request.
        stop: ends the delays when it is set.

    Raises:
        FileNotFoundError: there is no such file.
        ConnectionError: the request failed each time, or is not allowed. It may work in another run: rights
            that a process has only for a while are not allowed any longer when they end.
    """
    stop = stop or threading.Event()
    for delay in (*DELAYS, None):
        try:
            return call()
        except FileNotFoundError as error:
            raise FileNotFoundError(f"there is no file {url}") from error
        except (AttributeError, NotImplementedError, TypeError):  # mistakes in programs, which stay
            raise
        except Exception as error:  # the errors of the services have no common class
            if delay is None or _is_final(error) or stop.wait(delay * random.uniform(0.5, 1)):
                reason = " ".join(str(error).split()) or type(error).__name__
                raise ConnectionError(f"{url} cannot be reached: {reason}") from error
    raise AssertionError("not reached")


def _is_final(error: Exception) -> bool:
    """Whether the next attempt would fail in the same way: by rights, or since the file was replaced."""
    name = type(error).__name__
    words = "Credentials", "Expired", "Validation"
    return isinstance(error, PermissionError) or any(word in name for word in words)


def find(url: str) -> tuple[list[Listed], bool]:
    """What is under a URL, or matches it as a pattern such as "s3://bucket/**/*.flac".

    Returns:
        The files and folders, sorted, and whether the URL is a pattern.

    Raises:
        FileNotFoundError: there is nothing.
        ConnectionError: the service cannot be reached.
    """
    filesystem, path = resolve(url)
    pattern = is_pattern(url)
    try:
        found = {path: details(url)}
        pattern = False
    except FileNotFoundError:
        found = attempt(url, functools.partial(filesystem.glob, path, detail=True)) if pattern else {}
        if not found:
            raise FileNotFoundError(f"there is no folder or file {url}, and nothing matches it") from None
    return [_entry(filesystem, found[name]) for name in sorted(found)], pattern


def is_pattern(url: str) -> bool:
    """Whether a URL is a pattern, unless there is a file of this name."""
    return any(letter in url for letter in "*?[")


def list_files(url: str) -> Iterator[Listed]:
    """Yield the files at any depth in a folder, sorted within each subfolder. One subfolder is in memory."""
    filesystem, path = resolve(url)
    for entry in _list(filesystem, path):
        if entry["type"] == "directory":
            found = attempt(url, functools.partial(filesystem.find, entry["name"], detail=True))
            filesystem.invalidate_cache()
            entries = [found[name] for name in sorted(found)]
        else:
            entries = [entry]
        for file in entries:
            if not file["name"].endswith("/"):  # a mark that some programs make for an empty folder
                yield _entry(filesystem, file)


def names_in(url: str) -> set[str]:
    """The names in a folder; none if there is no such folder. They are never from a cache.

    Raises:
        NotADirectoryError: it is a file.
        ConnectionError: the service cannot be reached.
    """
    filesystem, path = resolve(url)
    try:
        entries = _list(filesystem, path)
    except FileNotFoundError:
        return set()
    if any(entry["name"] == path and entry["type"] == "file" for entry in entries):
        raise NotADirectoryError(f"{url} is a file")
    names = (entry["name"].rstrip("/") for entry in entries)
    return {name.rsplit("/", 1)[-1] for name in names if name != path}


def _list(filesystem: Any, path: str) -> list[dict[str, Any]]:
    filesystem.invalidate_cache()
    entries = attempt(path, functools.partial(filesystem.ls, path, detail=True))
    return sorted(entries, key=lambda entry: entry["name"])


def _entry(filesystem: Any, entry: dict[str, Any]) -> Listed:
    url, is_folder = filesystem.unstrip_protocol(entry["name"]), entry["type"] == "directory"
    return Listed(url, None if is_folder else entry["size"], is_folder)


def is_folder(url: str) -> bool:
    """Whether a URL is that of a folder.

    Raises:
        FileNotFoundError: there is nothing.
        ConnectionError: the service cannot be reached.
    """
    return details(url)["type"] == "directory"


def exists(url: str) -> bool:
    """Whether there is a file or folder."""
    try:
        details(url)
    except FileNotFoundError:
        return False
    return True


def file_size(url: str) -> int:
    """The size of a file in bytes.

    Raises:
        FileNotFoundError: there is no such file.
        ConnectionError: the service cannot be reached.
    """
    return details(url)["size"]


def details(url: str, cached: bool = False) -> dict[str, Any]:
    """What the service says about a file or folder, as fsspec's `info`.

    Args:
        url: of the file or folder.
        cached: a listing that is in memory may answer.

    Raises:
        FileNotFoundError: there is nothing.
        ConnectionError: the service cannot be reached.
    """
    filesystem, path = resolve(url)

    def ask() -> dict[str, Any]:
        if not cached:
            filesystem.invalidate_cache(path)  # for which the Hub is asked too
        return filesystem.info(path)

    return attempt(url, ask)


def read_whole(url: str, size: int | None = None, stop: threading.Event | None = None) -> bytes:
    """Read a file at once.

    Args:
        url: of the file.
        size: in bytes, if a listing told.
        stop: ends the delays between attempts when it is set.

    Raises:
        FileNotFoundError: there is no such file.
        ConnectionError: it cannot be read, or has another size.
    """
    filesystem, path = resolve(url)

    def read() -> bytes:
        expected = size
        if expected is None:
            filesystem.invalidate_cache(path)
            expected = filesystem.info(path)["size"]
        if expected == 0:
            return b""
        # One byte more shows whether the file has grown.
        return complete(filesystem.cat_file(path, start=0, end=expected + 1), expected)

    return attempt(url, read, stop)


def complete(data: bytes, size: int) -> bytes:
    """The data, if that is all.

    Raises:
        OSError: it has another size.
    """
    if len(data) != size:
        raise OSError(f"{len(data)} of {size} bytes came")
    return data


def write_whole(url: str, data: bytes) -> None:
    """Write a file, which appears whole or not at all. Small ones are one request.

    Raises:
        FileNotFoundError: there is no such bucket.
        ConnectionError: the service cannot be reached.
    """
    filesystem, path = resolve(url)
    try:
        attempt(url, functools.partial(filesystem.pipe_file, path, data))
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{url} cannot be written: there is no such bucket or repository; create it first"
        ) from error


def delete(url: str) -> None:
    """Delete a file, if it exists."""
    filesystem, path = resolve(url)
    with contextlib.suppress(FileNotFoundError):
        attempt(url, functools.partial(filesystem.rm_file, path))


def abort_uploads(url: str) -> None:
    """Abort uploads in parts to a folder, which killed processes began. S3 would keep the parts forever."""
    filesystem, path = resolve(url)
    if not hasattr(filesystem, "abort_mpu"):
        return
    bucket, prefix, _ = filesystem.split_path(path.rstrip("/") + "/")
    try:
        for upload in _uploads(filesystem, bucket, prefix):
            abort = functools.partial(filesystem.abort_mpu, bucket, upload["Key"], upload["UploadId"])
            with contextlib.suppress(FileNotFoundError):  # it was finished or aborted meanwhile
                attempt(url, abort)
    except ConnectionError as error:  # few are allowed to list uploads, and nothing depends on it
        warnings.warn(f"unfinished uploads may be left in {url}: {error}", stacklevel=2)


def _uploads(filesystem: Any, bucket: str, prefix: str) -> Iterator[dict[str, Any]]:
    """The uploads in parts of which the names begin with `prefix`."""
    where: dict[str, str] = {}
    while True:
        call = functools.partial(
            filesystem.call_s3, "list_multipart_uploads", Bucket=bucket, Prefix=prefix, **where
        )
        page = attempt(bucket, call)
        yield from page.get("Uploads", [])
        if not page.get("IsTruncated"):
            return
        where = {"KeyMarker": page["NextKeyMarker"], "UploadIdMarker": page["NextUploadIdMarker"]}
