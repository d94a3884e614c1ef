"""Folders of files that appear whole or not at all: on a mounted file system, or with a URL."""

import contextlib
import io
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from mimi_jax.files import remote
from mimi_jax.files.atomic import atomic_path, file_lock
from mimi_jax.files.blocks import Blocks, open_binary
from mimi_jax.files.corpus import expand_home

WORK = "work"  # the subfolder of a local folder for locks, and for files that are not complete yet


class LocalFolder:
    """A folder of a mounted file system."""

    def __init__(self, folder: str | os.PathLike[str]):
        self._folder = Path(expand_home(folder))

    def __str__(self) -> str:
        return str(self._folder)

    def make(self, *subfolders: str) -> None:
        """Create the folder with some subfolders, if they do not exist."""
        for name in (*subfolders, WORK):
            (self._folder / name).mkdir(parents=True, exist_ok=True)

    def names(self, subfolder: str = "") -> set[str]:
        """The names in the folder or a subfolder, without hidden files; none if there is no such folder.

        Raises:
            NotADirectoryError: it is a file.
        """
        path = self._folder / subfolder
        return _shown(os.listdir(path)) if path.exists() else set()

    def read(self, name: str) -> bytes:
        """Read a file.

        Raises:
            FileNotFoundError: there is no such file.
        """
        path = self._folder / name
        if not path.is_file():
            raise FileNotFoundError(f"there is no file {path}")
        return path.read_bytes()

    def opened(self, name: str, blocks: Blocks) -> contextlib.AbstractContextManager[str]:
        """Yield the path of a file: pyarrow reads it faster than an open file."""
        return contextlib.nullcontext(str(self._folder / name))

    def exists(self, name: str) -> bool:
        return (self._folder / name).exists()

    @contextlib.contextmanager
    def writing(self, name: str) -> Iterator[BinaryIO]:
        """Yield a file to write to. It appears in the folder when the block ends, and not if that raises."""
        # In `work`, since readers of a subfolder would take an incomplete file in it for a whole one.
        with atomic_path(self._folder / name, self._folder / WORK) as temporary, temporary.open("wb") as file:
            yield file

    def delete(self, name: str) -> None:
        """Delete a file, if it exists."""
        (self._folder / name).unlink(missing_ok=True)

    def lock(self, name: str, wait: bool = True) -> contextlib.AbstractContextManager[bool]:
        """Keep other processes out, as `mimi_jax.files.atomic.file_lock` does."""
        return file_lock(self._folder / WORK / f"{name}.lock", wait)

    def clean(self) -> None:
        """Delete the Parquet files that killed processes left behind. No other may be writing one."""
        for leftover in (self._folder / WORK).glob("*.parquet"):
            leftover.unlink(missing_ok=True)


class RemoteFolder:
    """A folder with a URL, such as "s3://bucket/tokens". It can be pickled: it holds no connection.

    Nothing is locked. Processes that write the same file must write the same bytes.

    Raises:
        ImportError: fsspec, or the library of the service, is not installed.
    """

    def __init__(self, url: str):
        self._url = remote.canonical(url)

    def __str__(self) -> str:
        return self._url

    def make(self, *subfolders: str) -> None:
        """Nothing: buckets have no folders, only files with names that have slashes."""

    def names(self, subfolder: str = "") -> set[str]:
        """The names in the folder or a subfolder, without hidden files; none if there is no such folder.

        Raises:
            NotADirectoryError: it is a file.
            ConnectionError: it cannot be reached.
        """
        return _shown(remote.names_in(self._file(subfolder)))

    def read(self, name: str) -> bytes:
        """Read a file.

        Raises:
            FileNotFoundError: there is no such file.
            ConnectionError: it cannot be reached.
        """
        return remote.read_whole(self._file(name))

    def opened(self, name: str, blocks: Blocks) -> contextlib.AbstractContextManager[BinaryIO]:
        """Yield a file that is open for pyarrow, and is read in these blocks."""
        return open_binary(self._file(name), blocks)

    def exists(self, name: str) -> bool:
        return remote.exists(self._file(name))

    @contextlib.contextmanager
    def writing(self, name: str) -> Iterator[BinaryIO]:
        """Yield a file to write to. It appears in the folder when the block ends, and not if that raises."""
        file = io.BytesIO()
        yield file
        remote.write_whole(self._file(name), file.getvalue())

    def delete(self, name: str) -> None:
        """Delete a file, if it exists."""
        remote.delete(self._file(name))

    def lock(self, name: str, wait: bool = True) -> contextlib.AbstractContextManager[bool]:
        """Every process gets the lock."""
        return contextlib.nullcontext(True)

    def clean(self) -> None:
        """Abort the uploads of processes that were killed. No other process may be writing."""
        remote.abort_uploads(self._url)

    def _file(self, name: str) -> str:
        return f"{self._url}/{name}".rstrip("/")


def _shown(names: Iterable[str]) -> set[str]:
    """Without hidden files, which file managers, Git and network file systems put anywhere."""
    return {name for name in names if not name.startswith(".")}


def open_folder(folder: str | os.PathLike[str]) -> LocalFolder | RemoteFolder:
    """The folder of a path or URL. Nothing is read yet."""
    return RemoteFolder(folder) if remote.is_remote(folder) else LocalFolder(folder)
