"""How far a job is: a bar on a terminal, a line a minute in a log."""

import sys
import time
from typing import TextIO

from tqdm import tqdm

LOG_SECONDS = 60.0


class Progress:
    """Counts what is done, and shows it.

    Args:
        num_bytes: of all inputs, by which the time left is estimated.
        sampling_rate: Hz.
        stream: where to; stderr by default.
    """

    def __init__(self, num_bytes: int, sampling_rate: int, stream: TextIO | None = None):
        self.clips = self.errors = self.samples = 0
        self._num_bytes, self._rate = num_bytes, sampling_rate
        self._stream = sys.stderr if stream is None else stream
        self._is_terminal = self._stream.isatty()
        self._start = self._logged = time.monotonic()
        self._bytes = 0
        layout = "{l_bar}{bar}| {postfix} [{elapsed}<{remaining}]"
        self._bar = tqdm(
            desc="tokenizing",
            total=num_bytes,
            file=self._stream,
            bar_format=layout,
            disable=not self._is_terminal,
        )

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.monotonic() - self._start

    @property
    def realtime(self) -> float:
        """Seconds of audio in a second."""
        return self.samples / self._rate / max(self.seconds, 1e-9)

    def coded(self, num_samples: int) -> None:
        self.samples += num_samples
        self._show()

    def clip(self, num_bytes: int) -> None:
        self.clips += 1
        self.read(num_bytes)

    def error(self, num_bytes: int) -> None:
        self.errors += 1
        self.read(num_bytes)

    def shard(self, clips: int, errors: int, samples: int, num_bytes: int) -> None:
        """Count a shard that was done elsewhere."""
        self.clips, self.errors, self.samples = (
            self.clips + clips,
            self.errors + errors,
            self.samples + samples,
        )
        self.read(num_bytes)

    def read(self, num_bytes: int) -> None:
        """Count bytes that are done with."""
        num_bytes = min(num_bytes, self._num_bytes - self._bytes)
        self._bytes += num_bytes
        self._bar.update(num_bytes)
        self._show()

    def close(self) -> None:
        self._bar.close()

    def __str__(self) -> str:
        hours = self.samples / self._rate / 3600
        return f"{hours:.2f} h, {self.realtime:.0f}x realtime, {self.clips:,} clips, {self.errors:,} errors"

    def _show(self) -> None:
        if self._is_terminal:
            self._bar.set_postfix_str(str(self), refresh=False)
        elif time.monotonic() - self._logged >= LOG_SECONDS:
            self._logged = time.monotonic()
            share = self._bytes / max(self._num_bytes, 1)
            left = "?" if not share else tqdm.format_interval(self.seconds / share - self.seconds)
            line = f"{time.strftime('%H:%M:%S')} {share:.0%}: {self}, {left} left"
            print(line, file=self._stream, flush=True)
