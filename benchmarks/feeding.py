"""How busy tokenization keeps a device: all that `tokenize` does on the host, with a device that is none.

    python -m benchmarks.feeding [--speed 10000] [--clips 20000] [--workers N] [--markdown FILE]

The device answers each batch after its seconds of audio / SPEED, one batch after the other, and computes
nothing. So a machine without accelerators shows whether the host keeps one busy: clips become batches of 64
rows, answers are fetched, and shards of 1,000 clips are written. The way of a batch to the device is left
out, since accelerators fetch it themselves.

The clips are 2 to 16 s long. They lie in memory as workers deliver them, as if enough cores read. With
--workers, so many processes read them from WAV files instead. Then the share says how many cores this machine
has, but the CPU time of the main process says what they cost there.
"""

import argparse
import collections
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.inputs import CODEBOOKS
from benchmarks.report import Report, add_markdown_option
from mimi_jax import MimiConfig
from mimi_jax.files.audio import save_audio
from mimi_jax.tokenization.coding import Coder
from mimi_jax.tokenization.inputs import Shard
from mimi_jax.tokenization.output import Output
from mimi_jax.tokenization.progress import Progress
from mimi_jax.tokenization.sources import Item
from mimi_jax.tokenization.tokenizer import OTHER_BATCH_SIZE, OTHER_CHUNK_FRAMES, Tokenizer
from mimi_jax.tokenization.workers import Piece, Readers, Target

CONFIG = MimiConfig()
RATE = CONFIG.sampling_rate
CLIPS_PER_SHARD = 1000
SECONDS = np.random.default_rng(0).uniform(2, 16, 200)  # of the different clips
# The answer to each batch. It is random, so it compresses as badly as real codes.
SHAPE = OTHER_BATCH_SIZE, CODEBOOKS, 16 * CONFIG.sampling_rate // CONFIG.frame_size + 64
CODES = np.random.default_rng(0).integers(CONFIG.codebook_size, size=SHAPE, dtype=np.uint16)


class FakePrograms:
    """Stands for `Programs` on a device that encodes `speed` seconds of audio a second."""

    config, num_devices = CONFIG, 1

    def __init__(self, speed: float):
        self._speed = speed
        self.first = self.free = 0.0  # when the first batch came, and when all are done
        self.busy, self.num_batches = 0.0, 0

    def encode(self, audio: np.ndarray, lengths: np.ndarray) -> tuple[float, np.ndarray]:
        """Return when the batch is done, and its codes."""
        now, seconds = time.perf_counter(), float(lengths.sum()) / RATE / self._speed
        self.first = self.first or now
        self.free = max(self.free, now) + seconds
        self.busy += seconds
        self.num_batches += 1
        return self.free, CODES[: len(audio), :, : audio.shape[2] // CONFIG.frame_size]

    def fetch(self, batch: tuple[float, np.ndarray]) -> np.ndarray:
        time.sleep(max(batch[0] - time.perf_counter(), 0.0))
        return batch[1]


class InMemory:
    """Stands for `Readers` whose workers are never late."""

    def __init__(self, clips: list[np.ndarray]):
        self._clips, self._count = clips, 0

    def open(self, item: Item) -> Any:
        self._count += 1
        return _InMemoryReader(item, self._count, self._clips[self._count % len(self._clips)])

    def close(self) -> None:
        pass


class _InMemoryReader:
    """Stands for `ClipReader`."""

    def __init__(self, item: Item, key: int, clip: np.ndarray):
        self.item, self.key, self._clip = item, key, clip

    def next(self) -> Piece:
        return Piece(self._clip, is_last=True)


def prepare(folder: Path, workers: int) -> tuple[Any, list[Path]]:
    """The readers, and the files that they read."""
    generator = np.random.default_rng(1)
    clips = [0.1 * generator.standard_normal((1, int(s * RATE)), np.float32) for s in SECONDS]
    paths = [folder / f"{number}.wav" for number in range(len(clips))]
    if not workers:
        return InMemory(clips), paths
    for path, clip in zip(paths, clips, strict=True):
        save_audio(path, clip, RATE)
    return Readers(Target(RATE, CONFIG.audio_channels, max_seconds=60), workers), paths


def make_shards(paths: list[Path], num_clips: int) -> list[Shard]:
    items = tuple(Item(f"clip {n:08}", str(paths[n % len(paths)]), size=1) for n in range(num_clips))
    groups = [items[first : first + CLIPS_PER_SHARD] for first in range(0, num_clips, CLIPS_PER_SHARD)]
    return [
        Shard(
            index, "clips", group, "", num_bytes=len(group), audio_column="", left_out=collections.Counter()
        )
        for index, group in enumerate(groups)
    ]


def measure(folder: Path, num_clips: int, speed: float, workers: int) -> Report:
    readers, paths = prepare(folder, workers)
    shards = make_shards(paths, num_clips)
    settings = {"num_shards": len(shards), "sampling_rate": RATE}
    device: Any = FakePrograms(speed)
    coder = Coder(device, OTHER_BATCH_SIZE, OTHER_CHUNK_FRAMES)
    output = Output(folder / "out", settings, CONFIG.to_dict())
    with Tokenizer(coder, readers, output, strict=True) as tokenizer:
        cpu = time.process_time()
        totals = tokenizer.run(shards, Progress(num_clips, RATE))
        end, cpu = time.perf_counter(), time.process_time() - cpu
    seconds, count = totals.samples / RATE, device.num_batches
    source = f"{workers} workers read WAV files" if workers else "clips in memory"
    notes = [
        f"a fake device of {speed:,.0f}x realtime; {source}; {num_clips:,} clips, {seconds / 3600:.0f} h"
    ]
    report = Report("no device", notes)
    report.table(["from the first batch to", "seconds", "busy"])
    for name, last in (("the last answer", device.free), ("the last file", end)):
        report.row([name, f"{last - device.first:.2f}", f"{device.busy / (last - device.first):.1%}"])
    report.line()
    report.line(
        f"{count:,} batches of {1e3 * device.busy / count:.1f} ms; the main process takes"
        f" {1e3 * cpu / count:.1f} ms of CPU time for each, or {seconds / cpu:,.0f}x realtime on one core"
    )
    return report


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--speed", type=float, default=10_000.0)
    parser.add_argument("--clips", type=int, default=20_000)
    parser.add_argument("--workers", type=int, default=0)
    add_markdown_option(parser)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        report = measure(Path(folder), options.clips, options.speed, options.workers)
    report.save(options.markdown)


if __name__ == "__main__":
    main()
