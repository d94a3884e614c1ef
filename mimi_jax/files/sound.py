"""libsndfile as a reader of Python's files, from front to back."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

import numpy as np
import soundfile


class _Source:
    """A file as soundfile gets it: without its name, which could decide the format.

    libsndfile may seek to a place before the beginning of a damaged file. The exception could not pass
    through it, and Python would print it. An error of the disk or the network could not pass either, so it is
    kept, and the file seems to end.
    """

    def __init__(self, file: BinaryIO):
        self.tell, self._readinto, self._seek = file.tell, file.readinto, file.seek  # pyright: ignore
        self.error: OSError | None = None

    def readinto(self, buffer) -> int:
        try:
            return self._readinto(buffer) if self.error is None else 0
        except OSError as error:
            self.error = error
            return 0

    @contextmanager
    def passing(self) -> Iterator[None]:
        """Raise the error that was kept, instead of what libsndfile makes of it."""
        try:
            yield
        finally:
            if self.error is not None:
                raise self.error

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return self._seek(max(offset, 0) if whence == os.SEEK_SET else offset, whence)


class ForwardReader(soundfile.SoundFile):
    """A file that is read once, from front to back.

    soundfile seeks after every read. That fails for a FLAC file that was written to a pipe, since its length
    is unknown.

    Args:
        file: binary and seekable.

    Raises:
        OSError: from every method, if the file cannot be read.
        soundfile.LibsndfileError: libsndfile does not know what the file is, or it is damaged.
    """

    def __init__(self, file: BinaryIO):
        self._source = _Source(file)
        with self._source.passing():
            super().__init__(self._source)  # pyright: ignore - it needs no more than these methods

    def seekable(self) -> bool:
        return False

    def seek(self, frames: int, whence: int = os.SEEK_SET) -> int:
        with self._source.passing():
            return super().seek(frames, whence)

    def read(self, *arguments: Any, **options: Any) -> np.ndarray:
        with self._source.passing():
            return super().read(*arguments, **options)
