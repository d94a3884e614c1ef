"""Fetching clips from a bucket before their turn comes, many at a time, so that delays do not add up."""

import collections
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

from mimi_jax.files.corpus import is_transient, reason_of
from mimi_jax.files.remote import AT_ONCE, file_size, is_remote, read_whole
from mimi_jax.tokenization.sources import LARGE_FILE, Item

MAX_BYTES = 1 << 26  # of clips that wait for their turn
USUAL_BYTES = 1 << 20  # of a clip whose size is not known


def fetched(items: Iterable[Item]) -> Iterator[Item]:
    """Put the bytes of remote audio files into the items, in their order.

    Local files stay where they are. So do large remote ones, and those of which only a stretch is a clip: the
    workers read them in blocks. A file that cannot be fetched becomes the problem of its item.
    """
    waiting: collections.deque[tuple[int, Item | Future[Item]]] = collections.deque()
    pool, stop = ThreadPoolExecutor(AT_ONCE), threading.Event()
    try:
        for item in items:
            is_wanted = _is_wanted(item)
            if not waiting and not is_wanted:
                yield item
                continue
            size = (item.size or USUAL_BYTES) if is_wanted else 0
            while len(waiting) >= AT_ONCE or sum(size for size, _ in waiting) + size > MAX_BYTES:
                yield _result(waiting.popleft())
            waiting.append((size, pool.submit(_fetch, item, stop) if is_wanted else item))
        while waiting:
            yield _result(waiting.popleft())
    finally:
        stop.set()
        pool.shutdown(wait=False, cancel_futures=True)


def _is_wanted(item: Item) -> bool:
    is_whole = item.start == 0 and item.end is None
    return is_remote(item.path) and is_whole and not item.problem and item.num_bytes <= LARGE_FILE


def _fetch(item: Item, stop: threading.Event) -> Item:
    try:
        size = file_size(item.path) if item.size is None else item.size
        if size is None:
            raise ValueError("its server does not say how large it is")
        if size > LARGE_FILE:
            return item._replace(size=size)
        data = read_whole(item.path, size, stop)
    except Exception as error:  # libraries of file systems raise errors of any kind
        return item._replace(problem=reason_of(error), is_transient=is_transient(error))
    return item._replace(data=data, size=len(data))


def _result(waiting: tuple[int, Item | Future[Item]]) -> Item:
    _, item = waiting
    return item.result() if isinstance(item, Future) else item
