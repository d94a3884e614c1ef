"""The progress of a job: a bar on a terminal, or a line every minute in a log."""

import sys
import time
from typing import TextIO

from tqdm import tqdm

LOG_SECONDS = 60.0  # between two lines


class Progress:
    """Counts what is done and shows it.

    Args:
        num_bytes: size of all inputs, from which the remaining time is estimated.
        sampling_rate: Hz, of the samples that are counted.
        stream: where the progress is written. None for stderr.
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
        """Seconds since the start."""
        return time.monotonic() - self._start

    def coded(self, num_samples: int) -> None:
        """Count samples that were encoded."""
        self.samples += num_samples
        self._show()

    def clip(self, num_bytes: int) -> None:
        """Count a clip that was encoded."""
        self.clips += 1
        self.read(num_bytes)

    def error(self, num_bytes: int) -> None:
        """Count a clip that could not be encoded."""
        self.errors += 1
        self.read(num_bytes)

    def shard(self, clips: int, errors: int, samples: int, num_bytes: int) -> None:
        """Count a whole shard, which another process has done."""
        self.clips += clips
        self.errors += errors
        self.samples += samples
        self.read(num_bytes)

    def read(self, num_bytes: int) -> None:
        """Count bytes of the inputs that are finished."""
        num_bytes = min(num_bytes, self._num_bytes - self._bytes)
        self._bytes += num_bytes
        self._bar.update(num_bytes)
        self._show()

    def close(self) -> None:
        """Finish the bar."""
        self._bar.close()

    def __str__(self) -> str:
        audio_seconds = self.samples / self._rate
        realtime = audio_seconds / max(self.seconds, 1e-9)
        hours = audio_seconds / 3600
        return f"{hours:.2f} h, {realtime:.0f}x realtime, {self.clips:,} clips, {self.errors:,} errors"

    def _show(self) -> None:
        if self._is_terminal:
            self._bar.set_postfix_str(str(self), refresh=False)
        elif time.monotonic() - self._logged >= LOG_SECONDS:
            self._logged = time.monotonic()
            share = self._bytes / max(self._num_bytes, 1)
            left = "?" if not share else tqdm.format_interval(self.seconds / share - self.seconds)
            line = f"{time.strftime('%H:%M:%S')} {share:.0%}: {self}, {left} left"
            print(line, file=self._stream, flush=True)
