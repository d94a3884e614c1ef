"""Handing arrays from a worker process to the main process in memory.

A pipe copies an array several times, mostly while no other thread of the main process can run Python. In
memory that both processes have, it is not copied on its way. Linux has such memory without a name, which is
freed when no process has it open, however they end. Elsewhere, arrays go through pipes.
"""

import contextlib
import functools
import math
import mmap
import os
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

SMALLEST = 2**16  # bytes; a pipe is as good for less
MOST = 256  # arrays that a worker shares at once, since each is an open file, and a process may have 1,024


def allow_open_files() -> None:
    """Let this process have as many files open as the system allows: each array that it is handed is one."""
    if not hasattr(os, "memfd_create"):
        return
    import resource

    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


class Shared(NamedTuple):
    """A float32 array in memory that a worker has open."""

    process: int
    descriptor: int
    shape: tuple[int, ...]


_shared: set[int] = set()  # the descriptors that this process has open


@functools.cache
def probe() -> Shared | np.ndarray:
    """Something that this process shares until it ends, for `can_share`."""
    return share(np.zeros(SMALLEST, np.float32))


def can_share(probe: Shared | np.ndarray) -> bool:
    """Whether this process may open what another one shares, tried on the `probe` of that one."""
    try:
        return isinstance(probe, Shared) and open_shared(probe).any() == 0
    except OSError:
        return False


def share(array: np.ndarray) -> Shared | np.ndarray:
    """Copy a float32 array to memory that another process can open; the array itself, if a pipe must do."""
    if array.nbytes < SMALLEST or len(_shared) >= MOST or not hasattr(os, "memfd_create"):
        return array
    try:
        descriptor = os.memfd_create("audio")
    except OSError:  # too many files are open
        return array
    left = np.ascontiguousarray(array).data.cast("B")
    try:
        while left:
            left = left[os.write(descriptor, left) :]
    except OSError:  # too little memory
        os.close(descriptor)
        return array
    _shared.add(descriptor)
    return Shared(os.getpid(), descriptor, array.shape)


def open_shared(shared: Shared) -> np.ndarray:
    """The array, read-only, that another process of this user shares. It stays when that process ends.

    Raises:
        FileNotFoundError: the other process has ended.
        OSError: this one may not look into it, or has too many files open.
    """
    descriptor = os.open(f"/proc/{shared.process}/fd/{shared.descriptor}", os.O_RDONLY)
    try:
        memory = mmap.mmap(descriptor, 4 * math.prod(shared.shape), prot=mmap.PROT_READ)
    finally:
        os.close(descriptor)
    return np.frombuffer(memory, np.float32).reshape(shared.shape)


def release(descriptors: Sequence[int]) -> None:
    """Close what this process shares, after the other one has opened it."""
    for descriptor in descriptors:
        _shared.remove(descriptor)
        os.close(descriptor)
