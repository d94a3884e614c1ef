"""What a process shares is there for another one, and nothing is left when they end."""

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from mimi_jax.tokenization import sharing
from mimi_jax.tokenization.sharing import (
    MOST,
    SMALLEST,
    Shared,
    can_share,
    open_shared,
    probe,
    release,
    share,
)

needs_linux = pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="only Linux has such memory")


def long_array(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((2, SMALLEST), np.float32)


def share_in_worker(seed: int) -> Shared | np.ndarray:
    return share(long_array(seed))


@needs_linux
def test_an_array_of_another_process_outlives_it():
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        shared = pool.submit(share_in_worker, 3).result()
        assert isinstance(shared, Shared)
        assert shared.process != os.getpid()
        array = open_shared(shared)
        assert pool.submit(can_share, probe()).result()
    np.testing.assert_array_equal(array, long_array(3))
    assert not array.flags.writeable
    with pytest.raises(OSError, match="No such file"):
        open_shared(shared)
    assert not can_share(shared)


def test_short_arrays_are_not_shared():
    array = np.zeros((1, SMALLEST // 8), np.float32)
    assert share(array) is array
    assert not can_share(array)


@needs_linux
def test_no_more_files_are_open_than_allowed():
    before, shared = len(list(Path("/proc/self/fd").iterdir())), []
    while isinstance(part := share(long_array(0)), Shared):
        shared.append(part.descriptor)
    assert len(sharing._shared) == MOST
    release(shared)
    assert len(list(Path("/proc/self/fd").iterdir())) == before


@needs_linux
@pytest.mark.parametrize("name", ["memfd_create", "write"])
def test_where_there_is_no_memory_to_share_the_array_itself_is_given(
    name: str, monkeypatch: pytest.MonkeyPatch
):
    def fail(*_):
        raise OSError("no memory")

    array, before = long_array(0), set(sharing._shared)
    with monkeypatch.context() as patch:
        patch.setattr(os, name, fail)
        assert share(array) is array
    assert sharing._shared == before
