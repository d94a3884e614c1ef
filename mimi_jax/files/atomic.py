"""Files and folders that appear whole or not at all, and locks between processes."""

import fcntl
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_path(path: str | os.PathLike[str], folder: str | os.PathLike[str] | None = None) -> Iterator[Path]:
    """Give a temporary path to write to, and rename what was written there to `path` when the block ends.

        with atomic_path("codes.bin") as temporary:
            temporary.write_bytes(data)

    The block may write a file or make a folder. If it raises, even KeyboardInterrupt, what it wrote is
    removed and `path` stays as it was. Readers see the old file or the new one, never a part of it. A folder
    that replaces another is missing for a moment, between two renames. If `path` is a symbolic link, the link
    stays and its target is replaced.

    Args:
        path: of the file or folder to write; "~" is the home folder. Its parent folder must exist. A file
            replaces a file, and a folder replaces a folder **with everything in it**.
        folder: where the temporary path is, on the same file system; None for the folder of `path`.

    Yields:
        A path in that folder at which nothing exists, with the suffix of `path`.

    Raises:
        FileNotFoundError: the parent folder does not exist.
        PermissionError: the parent folder is not writable.
        IsADirectoryError, NotADirectoryError: a file would replace a folder, or a folder a file.
        OSError: `path` is a device, a pipe or a socket, which a rename would replace.
    """
    path = Path(os.path.expanduser(path))
    target = Path(os.path.realpath(path))
    _check_place(path, target)
    name = f".tmp-{secrets.token_hex(8)}{path.suffix}"
    temporary = (target.parent if folder is None else Path(folder)) / name
    try:
        yield temporary
        if target.exists():
            _check_same_kind(path, is_folder=temporary.is_dir())
        _flush(temporary)
        _move(temporary, target)
    except BaseException:
        _remove(temporary)
        raise


@contextmanager
def file_lock(path: str | os.PathLike[str], wait: bool = True) -> Iterator[bool]:
    """Lock a file for this process until the block ends, or until the process ends in any way.

    The file is created, and is not removed. On a file system without locks, every process gets the lock.

    Args:
        path: of the lock file.
        wait: wait until no other process has the lock.

    Yields:
        Whether this process has the lock. It is False only without `wait`, if another process has it.
    """
    with open(path, "wb") as file:
        has_it = True
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            has_it = False
        except OSError:
            pass
        yield has_it


def _check_place(path: Path, target: Path) -> None:
    folder = target.parent
    if not folder.is_dir():
        raise FileNotFoundError(f"cannot write {path}: there is no folder {folder}; make it first")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(f"cannot write {path}: the folder {folder} is not writable")
    if target.exists() and not target.is_file() and not target.is_dir():
        raise OSError(f"cannot write {path}: it is a device, pipe or socket; name a file")


def _check_same_kind(path: Path, is_folder: bool) -> None:
    if path.is_dir() and not is_folder:
        raise IsADirectoryError(f"cannot write the file {path}: there is a folder of this name; name a file")
    if not path.is_dir() and is_folder:
        raise NotADirectoryError(f"cannot write the folder {path}: there is a file of this name; remove it")


def _flush(path: Path) -> None:
    """Wait until the data is on the disk. Otherwise a power cut could keep the new name and lose the data."""
    for file in path.rglob("*") if path.is_dir() else [path]:
        if file.is_file():
            with file.open("rb") as stream:
                os.fsync(stream.fileno())


def _move(temporary: Path, target: Path) -> None:
    if not target.is_dir():
        os.replace(temporary, target)
        return
    # A rename cannot replace a folder that is not empty, so the old one is moved away first.
    old = temporary.with_name(f"{temporary.name}.old")
    try:
        os.replace(target, old)
        os.replace(temporary, target)
    except BaseException:
        if old.exists() and not target.exists():
            os.replace(old, target)
        raise
    shutil.rmtree(old)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
