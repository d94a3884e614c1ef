"""Files to samples, in worker processes, so that the device does not wait for either.

Each worker keeps the files that it has open and answers one kind of question: what comes next of this one? A
clip of less than half a minute is one answer, and hours are no more memory than that. Nothing here imports
JAX, whose threads and memory the workers do without.
"""

import collections
import contextlib
import io
import itertools
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import BinaryIO, NamedTuple

import numpy as np

from mimi_jax.files.audio import AudioReader
from mimi_jax.tokenization.inputs import Item

PIECE_SECONDS = 30  # of an answer
SILENCE = 1e-4  # -80 dBFS; 16-bit audio has three steps below it


class Target(NamedTuple):
    """What every clip becomes, and what it may be."""

    sampling_rate: int  # Hz
    channels: int
    max_seconds: float


class Piece(NamedTuple):
    audio: np.ndarray  # float32 [channels, samples]
    is_last: bool


class Decoders:
    """Worker processes that read, decode and resample.

        with Decoders(Target(24_000, 1, 3600), num_workers=4) as decoders:
            stream = decoders.open(item)
            piece = stream.next()

    A worker that dies, as a C library may on a hostile file, is started anew. The file at which it was is
    tried once more, since somebody else may have killed it; the others go on.

    Args:
        target: the form of the audio.
        num_workers: processes.

    Raises:
        ChildProcessError: from a stream, where workers die as they start.
    """

    def __init__(self, target: Target, num_workers: int):
        if num_workers < 1:
            raise ValueError(f"workers must be positive, got {num_workers}")
        self._workers = [_Worker(target) for _ in range(num_workers)]

    def __enter__(self) -> "Decoders":
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            worker.stop()

    def open(self, item: Item) -> "Stream":
        """Begin to decode, on the worker that has the least to do."""
        worker = min(self._workers, key=lambda worker: worker.num_open)
        return Stream(worker, item)


class Stream:
    """A clip that is being decoded, one piece ahead of who takes them."""

    _keys = itertools.count()

    def __init__(self, worker: "_Worker", item: Item):
        self.item, self.key = item, next(self._keys)
        self.taken = 0  # pieces
        self.crashes = 0  # of the worker, while it was at this clip
        self.known_by = -1  # the life of the worker that has the file open
        self._worker = worker
        worker.num_open += 1
        self._is_over = False
        self._request = None if item.problem else worker.request(self)

    def next(self) -> Piece:
        """The next piece, once it is there.

        Raises:
            ValueError: the clip cannot be used, with the reason.
        """
        try:
            if self._request is None:
                raise ValueError(self.item.problem)
            piece = self._worker.result(self)
        except ChildProcessError:
            raise
        except Exception as error:
            self.close()
            raise ValueError(_reason(error)) from error
        self.taken += 1
        if piece.is_last:
            self.close()
        else:
            self._request = self._worker.request(self)
        return piece

    def close(self) -> None:
        if not self._is_over:
            self._is_over = True
            self._worker.num_open -= 1


class _Worker:
    """One process, and the questions that it has not answered yet, oldest first."""

    def __init__(self, target: Target):
        self._target, self.num_open, self._life = target, 0, -1
        self._asked: dict[int, tuple[Stream, Future[Piece]]] = {}
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")  # a fork of a process with JAX's threads may hang
        self._pool = ProcessPoolExecutor(1, context, initializer=_prepare, initargs=(self._target,))
        self._process = self._pool.submit(os.getpid)  # its number, and a sign that it lives
        self._life += 1

    def stop(self) -> None:
        """Whatever it is at: it may be stuck, and Python waits for it at its own end."""
        if self._process.done() and self._process.exception() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._process.result(), signal.SIGKILL)
        self._pool.shutdown(wait=False, cancel_futures=True)

    def request(self, stream: Stream) -> int:
        item = None if stream.known_by == self._life else stream.item
        stream.known_by = self._life
        try:
            future = self._pool.submit(_next_piece, stream.key, item, stream.taken)
        except BrokenProcessPool as error:  # it died a moment ago
            future = Future()
            future.set_exception(error)
        self._asked[stream.key] = (stream, future)
        return stream.key

    def result(self, stream: Stream) -> Piece:
        try:
            while True:
                try:
                    return self._asked[stream.key][1].result()
                except BrokenProcessPool:
                    self._revive()
        finally:
            del self._asked[stream.key]

    def _revive(self) -> None:
        """Start anew, and ask again for what was lost: first for that at which it died, the first in line."""
        wait(future for _, future in self._asked.values())
        if self._process.exception() is not None:
            raise ChildProcessError(
                "the processes that decode audio die as they start. They import the script that started them:"
                ' what it does must stand under if __name__ == "__main__":, and it must be a file'
            )
        lost = [
            stream
            for stream, future in self._asked.values()
            if isinstance(future.exception(), BrokenProcessPool)
        ]
        self.stop()
        self._start()
        for number, stream in enumerate(lost):
            del self._asked[stream.key]
            stream.crashes += number == 0
            if stream.crashes < 2:
                self.request(stream)
            else:
                crashed: Future[Piece] = Future()
                crashed.set_exception(ValueError("the decoder crashed on this file"))
                self._asked[stream.key] = (stream, crashed)


def _reason(error: Exception) -> str:
    """In one line."""
    text = str(error) or type(error).__name__
    if isinstance(error, OSError) and error.strerror:
        text = error.strerror
    elif not isinstance(error, ValueError):
        text = f"{type(error).__name__}: {text}"
    return " ".join(text.split())


# In the worker.

_target: Target
_open: dict[int, Iterator[Piece]] = {}


def _prepare(target: Target) -> None:
    global _target
    _target = target
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent to handle
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # the MP3 decoder comments on damaged files there
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def _next_piece(key: int, item: Item | None, taken: int) -> Piece:
    if item is not None:
        _open[key] = _pieces(item, _target)
        collections.deque(itertools.islice(_open[key], taken), maxlen=0)
    try:
        piece = next(_open[key])
    except BaseException:
        del _open[key]
        raise
    if piece.is_last:
        del _open[key]
    return piece


def _pieces(item: Item, target: Target) -> Iterator[Piece]:
    """Decode a clip: at least one piece, each of PIECE_SECONDS but the last."""
    with _open_file(item) as file:
        reader = AudioReader(file, "the file", target.sampling_rate, target.channels, item.start, item.end)
        limit, count, is_silent = target.max_seconds * target.sampling_rate, 0, True
        size = PIECE_SECONDS * target.sampling_rate
        if reader.num_samples is not None:
            _check_length(reader.num_samples, limit, target)
        pending, length = [], 0
        for block in reader:
            count += block.shape[1]
            _check_length(count, limit, target)
            is_silent = is_silent and not (np.abs(block) > SILENCE).any()
            if length >= size:
                yield Piece(np.concatenate(pending, axis=1), is_last=False)
                pending, length = [], 0
            pending.append(block)
            length += block.shape[1]
        if is_silent:
            raise ValueError("the clip is silent: no sample is above -80 dBFS")
        yield Piece(np.concatenate(pending, axis=1), is_last=True)


def _check_length(num_samples: int, limit: float, target: Target) -> None:
    if num_samples > limit:
        raise ValueError(
            f"the clip is too long: more than {target.max_seconds:g} s, of which --max-seconds is the limit"
        )


def _open_file(item: Item) -> BinaryIO:
    if item.data is not None:
        return io.BytesIO(item.data)
    if item.offset == 0:
        return open(item.path, "rb")
    assert item.size is not None
    return io.BufferedReader(_Part(item.path, item.offset, item.size))


class _Part(io.RawIOBase):
    """Some bytes of a file, as a file."""

    def __init__(self, path: str, offset: int, size: int):
        self._file = open(path, "rb")  # noqa: SIM115 - closed by `close`
        self._offset, self._size, self._place = offset, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: self._size}[whence]
        self._place = max(base + offset, 0)
        return self._place

    def readinto(self, buffer) -> int:
        view = memoryview(buffer).cast("B")[: max(self._size - self._place, 0)]
        self._file.seek(self._offset + self._place)
        count = self._file.readinto(view)
        self._place += count
        return count

    def close(self) -> None:
        self._file.close()
        super().close()
