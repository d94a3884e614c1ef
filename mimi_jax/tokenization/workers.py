"""Reading and resampling audio in worker processes, so that the device does not wait for either.

Each worker keeps several files open and answers one kind of request: the next piece of one of them. A piece
is about half a minute of audio, so a file of hours takes no more memory than a short one. Only a clip whose
bytes are in a Parquet file is in memory as a whole. Nothing here imports JAX, so that the workers do without
its threads and memory.
"""

import collections
import contextlib
import functools
import io
import itertools
from collections.abc import Iterator
from concurrent.futures import Future, wait
from concurrent.futures.process import BrokenProcessPool
from typing import BinaryIO, NamedTuple

import numpy as np

from mimi_jax.files.audio import AudioReader
from mimi_jax.files.blocks import CLIP, CROP, open_binary
from mimi_jax.files.containers.spans import part_of
from mimi_jax.files.corpus import SILENCE, is_transient, reason_of
from mimi_jax.files.processes import Worker
from mimi_jax.tokenization.sharing import (
    Shared,
    allow_open_files,
    can_share,
    open_shared,
    probe,
    release,
    share,
)
from mimi_jax.tokenization.sources import Item

PIECE_SECONDS = 30  # length of a piece


class Target(NamedTuple):
    """The form that every clip is brought into, and the longest clip that is accepted."""

    sampling_rate: int  # Hz
    channels: int
    max_seconds: float  # seconds of audio


class Piece(NamedTuple):
    """The next stretch of a clip."""

    audio: np.ndarray  # float32 [channels, samples]
    is_last: bool


class _SharedPiece(NamedTuple):
    """A piece on its way from a worker."""

    audio: Shared
    is_last: bool


class ClipError(ValueError):
    """A clip cannot be used. `is_transient` says that a second try may succeed."""

    def __init__(self, reason: str, is_transient: bool):
        super().__init__(reason)
        self.is_transient = is_transient


class Readers:
    """Worker processes that read audio files, mix them to the target's channels and resample them.

        with Readers(Target(24_000, 1, 3600), num_workers=4) as readers:
            clip = readers.open(item)
            piece = clip.next()

    A worker that dies is started again, since a broken file may crash a C library. The file that it was
    reading is tried once more, since something else may have killed the worker. The other files continue
    where they were.

    Args:
        target: the form of the audio.
        num_workers: number of processes.

    Raises:
        ValueError: `num_workers` is not positive.
        ChildProcessError: from `ClipReader.next`, if the workers die while they start.
    """

    def __init__(self, target: Target, num_workers: int):
        if num_workers < 1:
            raise ValueError(f"workers must be positive, got {num_workers}")
        self._workers = [_Worker(target) for _ in range(num_workers)]

    def __enter__(self) -> "Readers":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the workers, even in the middle of a file."""
        for worker in self._workers:
            worker.stop()

    def open(self, item: Item) -> "ClipReader":
        """Start to read a clip, on the worker with the fewest open files."""
        worker = min(self._workers, key=lambda worker: worker.num_open)
        return ClipReader(worker, item)


class ClipReader:
    """A clip that a worker is reading. The worker is always one piece ahead of `next`.

    Args:
        worker: the worker that reads it.
        item: where the clip is.
    """

    _keys = itertools.count()

    def __init__(self, worker: "_Worker", item: Item):
        self.item, self.key = item, next(self._keys)
        self.num_taken = 0  # pieces that `next` has returned
        self.num_crashes = 0  # how often the worker died while it read this clip
        self.known_by = -1  # the generation of the worker that has the file open
        self._worker = worker
        worker.num_open += 1
        self._is_closed = False
        if not item.problem:
            worker.request(self)

    def next(self) -> Piece:
        """Wait for the next piece and return it.

        Raises:
            ClipError: the clip cannot be used, with the reason.
            ChildProcessError: the workers die while they start.
        """
        if self.item.problem:
            self.close()
            raise ClipError(self.item.problem, self.item.is_transient)
        try:
            piece = self._worker.result(self)
        except ChildProcessError:
            raise
        except Exception as error:
            self.close()
            raise ClipError(reason_of(error), is_transient(error)) from error
        self.num_taken += 1
        if piece.is_last:
            self.close()
        else:
            self._worker.request(self)
        return piece

    def close(self) -> None:
        """Count the clip as finished, so that its worker gets the next one."""
        if not self._is_closed:
            self._is_closed = True
            # The item may outlive its audio.
            self.item = self.item._replace(data=None, size=self.item.num_bytes)
            self._worker.num_open -= 1


class _Worker:
    """One process, and the requests that it has not answered yet, oldest first."""

    def __init__(self, target: Target):
        self._target, self.num_open, self._generation = target, 0, -1
        self._asked: dict[int, tuple[ClipReader, Future[Piece]]] = {}
        allow_open_files()
        self._start()

    def _start(self) -> None:
        self._process = Worker(_prepare, self._target, probe())
        self._generation += 1
        self._opened: list[int] = []  # what the process need not share any longer

    def stop(self) -> None:
        self._process.stop()

    def request(self, clip: ClipReader) -> None:
        """Ask for the next piece of a clip."""
        item = None if clip.known_by == self._generation else clip.item
        clip.known_by = self._generation
        opened = self._opened[:]
        del self._opened[: len(opened)]  # meanwhile, `_receive` may have added more
        answer = self._process.submit(_next_piece, clip.key, item, clip.num_taken, opened)
        future: Future[Piece] = Future()
        self._asked[clip.key] = (clip, future)
        answer.add_done_callback(functools.partial(_receive, future, self._opened))

    def result(self, clip: ClipReader) -> Piece:
        """Wait for the piece that was asked for."""
        try:
            while True:
                try:
                    return self._asked[clip.key][1].result()
                except BrokenProcessPool:
                    self._restart()
        finally:
            del self._asked[clip.key]

    def _restart(self) -> None:
        """Start a new process and repeat the lost requests, in their order.

        The process died at the first of them, so that clip is blamed.
        """
        wait(future for _, future in self._asked.values())
        self._process.check_started()
        lost = [
            clip for clip, future in self._asked.values() if isinstance(future.exception(), BrokenProcessPool)
        ]
        self.stop()
        self._start()
        for number, clip in enumerate(lost):
            del self._asked[clip.key]
            clip.num_crashes += number == 0
            if clip.num_crashes < 2:
                self.request(clip)
            else:
                crashed: Future[Piece] = Future()
                crashed.set_exception(ValueError("the audio library crashed on this file"))
                self._asked[clip.key] = (clip, crashed)


def _receive(future: "Future[Piece]", opened: list[int], answer: "Future[Piece | _SharedPiece]") -> None:
    """Turn a worker's answer into a piece. This is done as soon as it comes, before the worker may die."""
    if answer.cancelled():
        return
    try:
        piece = answer.result()
    except BaseException as error:
        future.set_exception(error)
        return
    if isinstance(piece, _SharedPiece):
        try:
            audio = open_shared(piece.audio)
        except FileNotFoundError:
            future.set_exception(BrokenProcessPool("the worker died before its answer came"))
            return
        except OSError as error:  # such as too many open files
            future.set_exception(error)
            return
        finally:
            opened.append(piece.audio.descriptor)
        piece = Piece(audio, piece.is_last)
    future.set_result(piece)


# What follows runs in the worker process.

_target: Target
_can_share: bool
_open: dict[int, Iterator[Piece]] = {}  # the clips that are being read, by their keys


def _prepare(target: Target, probe: Shared | np.ndarray) -> None:
    """Set up a new worker process."""
    global _target, _can_share
    _target, _can_share = target, can_share(probe)


def _next_piece(key: int, item: Item | None, num_taken: int, opened: list[int]) -> Piece | _SharedPiece:
    """Read the next piece of a clip.

    Args:
        key: of the clip.
        item: where the clip is, if this process has not opened it yet; else None.
        num_taken: pieces to skip in a clip that is opened again.
        opened: the audio of earlier pieces that the main process has opened.
    """
    release(opened)
    if item is not None:
        _open[key] = _pieces(item, _target)
        collections.deque(itertools.islice(_open[key], num_taken), maxlen=0)
    try:
        piece = next(_open[key])
    except BaseException:
        del _open[key]
        raise
    if piece.is_last:
        del _open[key]
    audio = share(piece.audio) if _can_share else piece.audio
    return _SharedPiece(audio, piece.is_last) if isinstance(audio, Shared) else piece


def _pieces(item: Item, target: Target) -> Iterator[Piece]:
    """Read a clip: at least one piece, and all but the last at least PIECE_SECONDS long."""
    with _open_file(item) as file:
        reader = AudioReader(file, "the file", target.sampling_rate, target.channels, item.start, item.end)
        if reader.num_samples is not None:
            _check_length(reader.num_samples, target)
        count, is_silent, pending, length = 0, True, [], 0
        for audio in reader:
            count += audio.shape[1]
            _check_length(count, target)
            is_silent = is_silent and not (np.abs(audio) > SILENCE).any()
            if length >= PIECE_SECONDS * target.sampling_rate:
                yield Piece(np.concatenate(pending, axis=1), is_last=False)
                pending, length = [], 0
            pending.append(audio)
            length += audio.shape[1]
        if is_silent:
            raise ValueError("the clip is silent: no sample is above -80 dBFS")
    # After the file, since it may turn out that it was replaced.
    yield Piece(np.concatenate(pending, axis=1), is_last=True)


def _check_length(num_samples: int, target: Target) -> None:
    if num_samples > target.max_seconds * target.sampling_rate:
        raise ValueError(
            f"the clip is too long: it must not exceed max_seconds={target.max_seconds:g};"
            " raise it (--max-seconds) or cut the clip"
        )


@contextlib.contextmanager
def _open_file(item: Item) -> Iterator[BinaryIO]:
    blocks = CROP if item.start > 0 or item.end is not None else CLIP
    with io.BytesIO(item.data) if item.data is not None else open_binary(item.path, blocks) as file:
        if item.offset == 0:
            yield file
        else:
            assert item.size is not None
            yield part_of(file, item.offset, item.offset + item.size)
