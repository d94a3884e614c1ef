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
    """A path to write to in place of `path`; what stands there becomes `path` when the block ends.

        with atomic_path("codes.bin") as temporary:
            temporary.write_bytes(data)

    The block may write a file or make a folder. If it raises, KeyboardInterrupt included, what it
    wrote is removed and `path` stays as it was. Readers see the old file or the new one, never a
    part; a folder that replaces another is missing for the moment between two renames. A symbolic
    link stays, and what it points to is replaced.

    Args:
        path: where the file or folder is to stand. Its parent folder must exist. A file replaces a
            file, a folder a folder **with all that is in it**.
        folder: where to write until then, on the same file system; None for the folder of `path`.

    Yields:
        A free path in that folder, with the same suffix.

    Raises:
        FileNotFoundError: the parent folder does not exist.
        PermissionError: the parent folder is not writable.
        IsADirectoryError, NotADirectoryError: a file would replace a folder, or a folder a file.
        OSError: `path` is a device, a pipe or a socket, which a rename would replace.
    """
    path = Path(path)
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
    """Whether this process has the lock that the file stands for, until the block or the process ends.

    The file is made, and stays. File systems that have no locks give them to everyone.

    Args:
        wait: for whoever has it; else a lock that another process has gives False.
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
        raise IsADirectoryError(f"cannot write the file {path}: a folder stands there; name a file")
    if not path.is_dir() and is_folder:
        raise NotADirectoryError(f"cannot write the folder {path}: a file stands there; remove it")


def _flush(path: Path) -> None:
    """Wait for the disk: else a power cut could keep the new name and lose what it names."""
    for file in path.rglob("*") if path.is_dir() else [path]:
        if file.is_file():
            with file.open("rb") as stream:
                os.fsync(stream.fileno())


def _move(temporary: Path, target: Path) -> None:
    if not target.is_dir():
        os.replace(temporary, target)
        return
    # A rename does not replace a folder with something in it, so the old one steps aside.
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
