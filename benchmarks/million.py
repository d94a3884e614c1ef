"""What a job costs besides reading and encoding, for up to a million clips.

    python -m benchmarks.million [--clips 1000000] [--folder FOLDER] [--markdown FILE] [--plot FILE]

N clips are stored in three ways: as stretches of WAV files, named by a manifest; as files in folders; and in
tar archives of 1,000 clips. Each way is measured for 10,000 clips and ten times as many, up to --clips. The
files are links to a few real ones, so a RAM disk has room for them (--folder).

    plan    `make_plan` in a process of its own: seconds, and the most memory that the process had
    run     all that `tokenize` does for each clip but reading and encoding: the clips come from the plan, a
            stub that reads no audio gives each of them random codes (8 codebooks, 13 frames), and the shards
            are written and counted
    resume  the command `mimi-jax tokenize` on the finished output, from its start to its end

A clip costs what `plan` and `run` take together, in CPU time of the main process, divided by N. Last, it is
measured how long it takes to read stretches of an hour of MP3.
"""

import argparse
import io
import json
import multiprocessing
import os
import resource
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.inputs import CODEBOOKS
from benchmarks.report import Report, add_markdown_option
from mimi_jax.files.audio import AudioReader, save_audio

RATE = 24_000
PER_FILE = 1000  # clips in a shard, a folder, an archive, or a file that is cut
SECONDS = 0.1  # of a clip
FRAMES = 13  # of its codes, as if it were one second long
SMALLEST = 10_000  # clips
LIMITS = {"plan": 60, "resume": 30}  # seconds, for a million clips
MB = 1e6


class Cost(NamedTuple):
    """What was measured for one number of clips."""

    clips: int
    plan: float  # seconds
    plan_bytes: float  # the most memory
    run: float  # seconds
    run_bytes: float
    cpu: float  # seconds of `plan` and `run` in the main process
    resume: float  # seconds

    @property
    def per_clip(self) -> float:
        """Seconds of CPU time."""
        return self.cpu / self.clips


def make_stretches(folder: Path, count: int) -> Path:
    """A manifest that cuts each of `count` / 1,000 files into 1,000 clips."""
    folder.mkdir(parents=True)
    names = [f"{number:04}.wav" for number in range(count // PER_FILE)]
    save_audio(folder / names[0], _noise(SECONDS * PER_FILE), RATE)
    for name in names[1:]:
        os.link(folder / names[0], folder / name)
    with (folder / "clips.jsonl").open("w") as file:
        for name in names:
            for number in range(PER_FILE):
                times = {"start": round(number * SECONDS, 1), "end": round((number + 1) * SECONDS, 1)}
                file.write(json.dumps({"path": name, **times}) + "\n")
    return folder / "clips.jsonl"


def make_files(folder: Path, count: int) -> Path:
    """`count` files in folders of 1,000."""
    folder.mkdir(parents=True)
    clip = folder.with_suffix(".wav")
    for number in range(count):
        if number % PER_FILE == 0:
            (folder / f"speaker {number // PER_FILE:04}").mkdir()
            clip.unlink(missing_ok=True)  # a file system has a limit of links to one file
            save_audio(clip, _noise(SECONDS), RATE)
        os.link(clip, folder / f"speaker {number // PER_FILE:04}" / f"{number % PER_FILE:03}.wav")
    return folder


def make_tars(folder: Path, count: int) -> Path:
    """Archives of 1,000 clips."""
    folder.mkdir(parents=True)
    save_audio(folder.with_suffix(".wav"), _noise(SECONDS), RATE)
    data = folder.with_suffix(".wav").read_bytes()
    names = [folder / f"{number:04}.tar" for number in range(count // PER_FILE)]
    with tarfile.open(names[0], "w") as archive:
        for number in range(PER_FILE):
            member = tarfile.TarInfo(f"{number:03}.wav")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    for name in names[1:]:
        os.link(names[0], name)
    return folder


def _noise(seconds: float) -> np.ndarray:
    return 0.1 * np.random.default_rng(0).standard_normal((1, round(seconds * RATE)), np.float32)


CORPORA: dict[str, Callable[[Path, int], Path]] = {
    "a manifest of stretches": make_stretches,
    "files in folders": make_files,
    "tar archives": make_tars,
}


class StubReaders:
    """Stands for `Readers`, and opens nothing."""

    def __init__(self) -> None:
        self._count = 0

    def open(self, item: Any) -> Any:
        self._count += 1
        return argparse.Namespace(item=item, key=self._count)

    def close(self) -> None:
        pass


class StubCoder:
    """Stands for `Coder`, and answers at once with random codes, which compress as badly as real ones."""

    codes = np.random.default_rng(0).integers(2048, size=(CODEBOOKS, 10_007), dtype=np.uint16)

    def run(self, readers: Iterator[Any], coded: Callable[[int], object]) -> Iterator[Any]:
        from mimi_jax.tokenization.coding import Result

        for reader in readers:
            first = 13 * reader.key % (self.codes.shape[1] - FRAMES)
            coded(RATE)
            yield Result(reader, RATE, self.codes[:, first : first + FRAMES].copy())


def plan_alone(source: Path) -> tuple[float, float, float]:
    """Seconds, seconds of CPU time, and bytes of memory."""
    import pyarrow.parquet  # noqa: F401 - the time that this takes does not depend on the clips

    from mimi_jax.tokenization.plan import make_plan

    start, cpu = time.perf_counter(), time.process_time()
    make_plan([source])
    return time.perf_counter() - start, time.process_time() - cpu, _peak()


def run_job(source: Path, out: Path) -> tuple[float, float, float]:
    """Seconds, seconds of CPU time, and bytes of memory."""
    from mimi_jax.tokenization.job import plan
    from mimi_jax.tokenization.records import Totals
    from mimi_jax.tokenization.settings import DEFAULTS
    from mimi_jax.tokenization.tokenizer import Tokenizer

    job = plan([source], out, "mini", DEFAULTS)
    coder: Any = StubCoder()
    readers: Any = StubReaders()
    start, cpu = time.perf_counter(), time.process_time()
    shards = job.missing(job.shards, retry_errors=False)
    progress = job.progress(shards)
    with Tokenizer(coder, readers, job.output, strict=True) as tokenizer:
        now: Totals = tokenizer.run(shards, progress)
    summary = job.finish(now, progress, None)
    assert summary.num_done == summary.num_shards
    return time.perf_counter() - start, time.process_time() - cpu, _peak()


def resume(source: Path, out: Path) -> float:
    """Seconds of the whole command."""
    start = time.perf_counter()
    line = [sys.executable, "-m", "mimi_jax.cli", "tokenize", str(source), "-o", str(out), "--model", "mini"]
    subprocess.run(line, check=True, capture_output=True)
    return time.perf_counter() - start


def _peak() -> float:
    """The most memory that this process had, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def in_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function in a new process."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(function, *arguments).result()


def measure(folder: Path, make: Callable[[Path, int], Path], count: int) -> Cost:
    with tempfile.TemporaryDirectory(dir=folder) as place:
        source, out = make(Path(place) / "data", count), Path(place) / "out"
        seconds, cpu, plan_bytes = in_process(plan_alone, source)
        run, run_cpu, run_bytes = in_process(run_job, source, out)
        return Cost(count, seconds, plan_bytes, run, run_bytes, cpu + run_cpu, resume(source, out))


def stretches_of_mp3(folder: Path) -> list[tuple[float, float, float]]:
    """For some places in an hour of MP3: seconds to read 10 s there, first and again."""
    path, rows = folder / "hour.mp3", []
    save_audio(path, _noise(3600), RATE)
    for start in (0, 60, 600, 1800, 3500):
        os.utime(path)  # it is a new file for `mpeg`, which remembers where frames are
        rows.append((start, *(_seconds_to_read(path, start) for _ in range(2))))
    path.unlink()
    return rows


def _seconds_to_read(path: Path, start: float) -> float:
    begin = time.perf_counter()
    with path.open("rb") as file:
        for _ in AudioReader(file, "it", RATE, start=start, end=start + 10):
            pass
    return time.perf_counter() - begin


def plot(costs: dict[str, list[Cost]], path: Path) -> None:
    import matplotlib.pyplot as plt

    figure, (times, memory, cost) = plt.subplots(1, 3, figsize=(14, 4.8), layout="constrained")
    for number, (name, rows) in enumerate(costs.items()):
        clips, color = [row.clips for row in rows], f"C{number}"
        times.plot(clips, [row.plan for row in rows], "o-", color=color, label=f"plan, {name}")
        times.plot(clips, [row.resume for row in rows], "s--", color=color, label=f"resume, {name}")
        memory.plot(clips, [row.plan_bytes / MB for row in rows], "o-", color=color)
        memory.plot(clips, [row.run_bytes / MB for row in rows], "s--", color=color)
        cost.plot(clips, [1e6 * row.per_clip for row in rows], "o-", color=color)
    for name, limit in LIMITS.items():
        times.axhline(limit, color="gray", linestyle="-" if name == "plan" else "--", linewidth=0.8)
        times.annotate(f"aim of {name}: {limit} s", (SMALLEST, limit), va="bottom", fontsize=8)
    memory.axhline(1000, color="gray", linewidth=0.8)
    memory.annotate("aim of plan: 1 GB", (SMALLEST, 1000), va="bottom", fontsize=8)
    times.set(title="seconds of plan (solid) and resume (dashed)", yscale="log")
    memory.set(title="peak memory of plan (solid) and job (dashed), MB", ylim=(0, 1100))
    cost.set(title="CPU time of plan and run for each clip, µs", ylim=(0, None))
    for axes in (times, memory, cost):
        axes.set(xscale="log", xlabel="clips")
        axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=3)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clips", type=int, default=1_000_000)
    parser.add_argument("--folder", type=Path, help="where the clips are made, such as /dev/shm")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="also draw the figures")
    add_markdown_option(parser)
    options = parser.parse_args()
    report = Report(
        "no device: the coder is a stub", [f"clips of {SECONDS} s in {options.folder or 'a disk'}"]
    )
    sizes = [SMALLEST]
    while sizes[-1] * 10 <= options.clips:
        sizes.append(sizes[-1] * 10)
    columns = ["clips in", "clips", "plan, s", "MB", "run, s", "MB", "resume, s", "µs of CPU a clip"]
    report.table(columns)
    costs: dict[str, list[Cost]] = {}
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        for name, make in CORPORA.items():
            for count in sizes:
                row = measure(Path(folder), make, count)
                costs.setdefault(name, []).append(row)
                numbers = [row.plan, row.plan_bytes / MB, row.run, row.run_bytes / MB, row.resume]
                report.row([name, f"{count:,}", *(f"{n:.1f}" for n in numbers), f"{1e6 * row.per_clip:.1f}"])
        report.table(["10 s of an hour of MP3, from", "first time, ms", "again, ms"])
        for start, *seconds in stretches_of_mp3(Path(folder)):
            report.row([f"{start:g} s", *(f"{1e3 * s:.1f}" for s in seconds)])
    report.save(options.markdown)
    if options.plot is not None:
        plot(costs, options.plot)


if __name__ == "__main__":
    main()
