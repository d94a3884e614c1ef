"""Reading a folder that is local or in a bucket, on the Hugging Face Hub, or anywhere else that fsspec knows.

A path with `://` in it is a URL; every other path is local. Credentials are those that the library of each
service finds by itself. fsspec is imported by the methods that need it.
"""

import os
from pathlib import Path
from typing import Any

from mimi_jax.files.corpus import expand_home


class LocalFolder:
    """A folder of a mounted file system."""

    def __init__(self, folder: str | os.PathLike[str]):
        self._folder = Path(expand_home(folder))

    @property
    def filesystem(self) -> None:
        """For pyarrow, which then opens paths by itself."""
        return None

    def path(self, name: str) -> str:
        """The path of a file in the folder, for `filesystem`."""
        return str(self._folder / name)

    def names(self, subfolder: str) -> set[str]:
        """The names in a subfolder; none if there is no such subfolder."""
        path = self._folder / subfolder
        return set(os.listdir(path)) if path.is_dir() else set()

    def read(self, name: str) -> bytes:
        """Read a file.

        Raises:
            FileNotFoundError: there is no such file.
        """
        path = self._folder / name
        if not path.is_file():
            raise FileNotFoundError(f"there is no file {path}")
        return path.read_bytes()


class RemoteFolder:
    """A folder with a URL, such as "s3://bucket/tokens". It can be pickled: it holds no connection."""

    def __init__(self, url: str):
        self._url = url.rstrip("/")

    @property
    def filesystem(self) -> Any:
        """The fsspec file system. fsspec keeps one in each process.

        Raises:
            ImportError: fsspec, or the library of the service, is not installed.
        """
        return self._resolved()[0]

    def path(self, name: str) -> str:
        """The path of a file in the folder, for `filesystem`."""
        return f"{self._resolved()[1]}/{name}"

    def _resolved(self) -> tuple[Any, str]:
        """The file system, and the path of the folder in it."""
        try:
            import fsspec

            return fsspec.core.url_to_fs(self._url)
        except ImportError as error:
            raise ImportError(
                f"{self._url} cannot be read: {error}; run pip install 'mimi_jax[remote]'"
            ) from error

    def names(self, subfolder: str) -> set[str]:
        """The names in a subfolder; none if there is no such subfolder. They are never from a cache."""
        filesystem, path = self.filesystem, self.path(subfolder)
        filesystem.invalidate_cache(path)
        try:
            return {name.rsplit("/", 1)[-1] for name in filesystem.ls(path, detail=False)}
        except FileNotFoundError:
            return set()

    def read(self, name: str) -> bytes:
        """Read a file.

        Raises:
            FileNotFoundError: there is no such file.
        """
        return self.filesystem.cat_file(self.path(name))


def open_folder(folder: str | os.PathLike[str]) -> LocalFolder | RemoteFolder:
    """The folder of a path or URL. Nothing is read yet."""
    if isinstance(folder, str) and "://" in folder:
        return RemoteFolder(folder)
    return LocalFolder(folder)
