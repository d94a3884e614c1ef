"""How many live streams two cores take, beside a process for each stream.

    python -m benchmarks.live [--model mini] [--first 12] [--seconds 15] [--only overhead pool processes]
        [--minutes 60 --sessions N --plot FILE] [--markdown FILE]

A stream is a loopback in real time: a frame of speech is due every 80 ms, from a random moment on; it is
encoded, and its codes are decoded. It is late by the time from when it was due to when its sound is there.
"overhead" compares a step of a pool whose rows all have a frame with a bare step. "pool" and "processes" look
for the largest number of streams whose lateness stays below 80 ms in 99 of 100 frames: as sessions of one
pool, and as processes with a stream each. With `--minutes`, a pool runs for long with `--sessions` streams
instead. Then its lateness and its memory are drawn, and what the machine has to do with them: when its cores
stood still, and how slowly they worked. A process on each core sees when it stands still, if root starts it:
with its priority, it never waits for other processes. The event loop is that of `mimi-jax serve`, uvloop.
"""

import argparse
import array
import asyncio
import collections
import contextlib
import gc
import multiprocessing
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import uvloop
from tqdm import tqdm

from benchmarks.report import Report, add_markdown_option
from mimi_jax import Mimi, StreamingDecoder, StreamingEncoder, load_audio
from mimi_jax.streams.batch import Batch
from mimi_jax.streams.pool import EncoderSession, Pool
from mimi_jax.streams.stepping import Step

CODEBOOKS = 8
SPEECH = Path(__file__).parents[1] / "mimi_jax" / "samples" / "speech.flac"
LATE = 0.08  # seconds
PAUSE = 0.01  # seconds by which a core wakes up late, if it stood still
SLOW = 1.1  # times the usual CPU time of steps; in an hour it varied by 5 %


class Second(NamedTuple):
    """A second of a long run, or a little more."""

    latest: float  # seconds by which the latest frame was late
    late: int  # frames
    cpu: float  # seconds that the cores worked for this process
    others: float  # seconds that they worked for other processes
    stolen: float  # seconds that the host says it gave them to others
    pause: float  # seconds of the longest time that a core stood still
    memory: float  # MB
    steps: collections.Counter[int]  # steps by their rows


def frames_of(model: Mimi) -> np.ndarray:
    """Speech as float32 [frames, channels, frame_size]."""
    audio, size = load_audio(SPEECH), model.config.frame_size
    return audio[:, : audio.shape[1] // size * size].reshape(1, -1, size).swapaxes(0, 1)


async def step_times(model: Mimi, rows: int, rounds: int = 20, steps: int = 10) -> tuple[float, float, float]:
    """Median seconds of encoder steps of a full batch, and of the same in a pool, where each session pushes
    its next frame as soon as it has its codes. And of what the pool adds: both are measured by turns.
    """
    batch, frames = Batch(model, "encoder", rows, CODEBOOKS), frames_of(model)
    taken = [batch.take() for _ in range(rows)]

    async def push_all(session: EncoderSession) -> None:
        for number in range(steps):
            await session.push(frames[number])

    async with Pool(model, rows, CODEBOOKS) as pool, contextlib.AsyncExitStack() as stack:
        sessions = [await stack.enter_async_context(pool.encoder()) for _ in range(rows)]
        gc.collect()
        gc.freeze()
        times = []
        for _ in range(rounds):
            start = time.perf_counter()
            for number in range(steps):
                np.asarray(batch.step({row: frames[number] for row in taken}))
            middle = time.perf_counter()
            await asyncio.gather(*map(push_all, sessions))
            times.append((middle - start, time.perf_counter() - middle))
    bare, pooled = np.array(times[2:]).T / steps
    return float(np.median(bare)), float(np.median(pooled)), float(np.median(pooled - bare))


async def live_session(pool: Pool, frames: np.ndarray, begin: float, end: float, note: Callable) -> None:
    """A loopback in real time."""
    rng = random.Random(begin)
    async with pool.encoder() as encoder, pool.decoder() as decoder:
        number, due = rng.randrange(len(frames)), begin
        while due < end:
            if (wait := due - time.monotonic()) > 0:
                await asyncio.sleep(wait)
            codes = await encoder.push(frames[number % len(frames)])
            await decoder.push(codes)
            note(time.monotonic() - due)
            number, due = number + 1, due + 0.08


async def pool_lateness(
    model: Mimi,
    sessions: int,
    seconds: float,
    every: Callable[[list[float]], None] = lambda new: None,
    on_step: Callable[[Step], None] = lambda step: None,
) -> list[float]:
    """How late the frames of a pool's sessions are. `every` is called each second with the new ones."""
    frames, found, new = frames_of(model), array.array("d"), []  # a list would look like a leak
    rows = 1 << (sessions - 1).bit_length()
    async with Pool(model, rows, CODEBOOKS, on_step) as pool:
        await pool.warmup()
        gc.collect()
        gc.freeze()
        start = time.monotonic() + 1
        calls = (
            live_session(pool, frames, start + random.random(), start + seconds, new.append)
            for _ in range(sessions)
        )
        running = asyncio.gather(*calls)
        while not running.done():
            await asyncio.sleep(1)
            if time.monotonic() > start + 2:  # the first frames find all programs cold
                found.extend(new)
                every(new.copy())
            new.clear()
        await running
    return found.tolist()


def process_lateness(model_name: str, count: int, seconds: float) -> list[float]:
    """How late the frames are, where each stream has a process. They find their programs compiled."""
    context = multiprocessing.get_context("spawn")
    barrier, queue = context.Barrier(count + 1), context.Queue()
    processes = [
        context.Process(target=_stream, args=(model_name, seed, seconds, barrier, queue), daemon=True)
        for seed in range(count)
    ]
    for process in processes:
        process.start()
    barrier.wait(600)
    found = [lateness for _ in processes for lateness in queue.get()]
    for process in processes:
        process.join()
    return found


def _stream(model_name: str, seed: int, seconds: float, barrier: Any, queue: Any) -> None:
    model = Mimi.from_pretrained(model_name)
    frames, rng = frames_of(model), random.Random(seed)
    encoder, decoder = StreamingEncoder(model, 1, CODEBOOKS), StreamingDecoder(model)
    encoder.warmup()
    decoder.warmup(CODEBOOKS)
    barrier.wait(600)
    due = time.monotonic() + 1 + rng.random()
    end, warm, found = due + seconds, due + 2, []
    while due < end:
        if (wait := due - time.monotonic()) > 0:
            time.sleep(wait)
        codes = encoder.push(frames[rng.randrange(len(frames))][None])
        assert codes is not None
        decoder.push(codes)
        if due > warm:
            found.append(time.monotonic() - due)
        due += 0.08
    queue.put(found)


def p99(lateness: list[float]) -> float:
    return float(np.percentile(lateness, 99)) if lateness else float("inf")


def largest(measure: Callable[[int], list[float]], first: int) -> list[tuple[int, float]]:
    """Numbers of streams and their p99, of a search for the largest number that stays below `LATE`."""
    tried: list[tuple[int, float]] = []
    good, bad, count = 0, None, first
    while bad is None or bad - good > max(1, good // 12):
        tried.append((count, p99(measure(count))))
        tqdm.write(f"{count} streams: p99 {1000 * tried[-1][1]:.0f} ms")
        if tried[-1][1] < LATE:
            good = count
        else:
            bad = count
        count = 2 * good if bad is None else (good + bad) // 2
    return sorted(tried)


def run_long(model: Mimi, sessions: int, minutes: float, plot: Path | None) -> dict[str, str]:
    """Run a pool for long. Returns a row of a table, by its heads."""
    seconds: list[Second] = []
    steps: collections.Counter[int] = collections.Counter()
    before = times_of_cores()

    def note(new: list[float]) -> None:
        nonlocal before
        now = times_of_cores()
        with open("/proc/self/statm") as file:
            memory = int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6
        late, pause = sum(x > LATE for x in new), 0.0
        while not pauses.empty():
            pause = max(pause, pauses.get())
        cpu, others, stolen = now - before
        seconds.append(Second(max(new, default=0.0), late, cpu, others, stolen, pause, memory, steps.copy()))
        steps.clear()
        before = now

    def count(step: Step) -> None:
        steps[step.rows] += 1

    with watched_cores() as pauses:
        lateness = uvloop.run(pool_lateness(model, sessions, 60 * minutes, note, count))
    seconds = seconds[1:]  # the first one began before the pool
    if plot is not None:
        draw_seconds(seconds, f"{sessions} live loopbacks on {os.cpu_count()} cores", plot)
    early, last = (statistics.median(each.memory for each in part) for part in (seconds[:60], seconds[-60:]))
    counts = {"streams": f"{sessions}", "frames": f"{len(lateness)}"}
    memory = {"MB in the first minute": f"{early:.0f}", "in the last": f"{last:.0f}"}
    return counts | {"p99, ms": f"{1000 * p99(lateness):.0f}"} | causes_of_late(seconds) | memory


def causes_of_late(seconds: list[Second]) -> dict[str, str]:
    """Numbers of late frames, and how many of them each cause explains that those before it do not."""
    causes = {
        "after a core stood still": np.array([each.pause > 0 for each in seconds]),
        "after the host took a core": np.array([each.stolen > 0 for each in seconds]),
        "after others used a core for 50 ms": np.array([each.others > 0.05 for each in seconds]),
        f"after steps took {SLOW} times their CPU time": slowness(seconds) > SLOW,
    }
    late, unexplained = np.array([each.late for each in seconds]), np.full(len(seconds), True)
    row = {"late frames": f"{late.sum()}"}
    for cause, found in causes.items():
        # A queue is late for a while after the cores are back.
        found = np.convolve(found, np.ones(4))[: len(found)] > 0
        row[cause] = f"{late[unexplained & found].sum()} ({found.mean():.0%} of the time)"
        unexplained &= ~found
    return row | {"for no known cause": f"{late[unexplained].sum()}"}


@contextlib.contextmanager
def watched_cores() -> Iterator[Any]:
    """Yields a queue of the pauses of all cores, in seconds."""
    context = multiprocessing.get_context("spawn")
    pauses = context.SimpleQueue()
    watchers = [context.Process(target=_watch, args=(core, pauses)) for core in os.sched_getaffinity(0)]
    for watcher in watchers:
        watcher.start()
    try:
        yield pauses
    finally:
        for watcher in watchers:
            watcher.terminate()


def _watch(core: int, pauses: Any) -> None:
    """Sleep again and again, and tell when it took longer by a pause."""
    os.sched_setaffinity(0, {core})
    with contextlib.suppress(PermissionError):  # of those who are not root; then others delay it, too
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    while True:
        start = time.monotonic()
        time.sleep(0.005)
        if (pause := time.monotonic() - start - 0.005) > PAUSE:
            pauses.put(pause)


def times_of_cores() -> np.ndarray:
    """Seconds that all cores worked for this process and for others, and that the host of a virtual machine
    gave them to others, since different moments.
    """
    with open("/proc/stat") as file:
        user, nice, system, _, _, irq, softirq, stolen = map(int, file.readline().split()[1:9])
    busy = (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")
    return np.array([time.process_time(), busy - time.process_time(), stolen / os.sysconf("SC_CLK_TCK")])


def slowness(seconds: list[Second]) -> np.ndarray:
    """How much more CPU time the steps of each second took than such steps take in the whole run.

    If neighbours fill a cache that they share with this machine, or the clock slows down, nothing else in a
    virtual machine shows it.
    """
    sizes = sorted({rows for each in seconds for rows in each.steps})
    steps = np.array([[each.steps[rows] for rows in sizes] for each in seconds])
    cpu = np.array([each.cpu for each in seconds])
    costs = np.linalg.lstsq(steps, cpu, rcond=None)[0]
    return cpu / np.maximum(steps @ costs, 1e-9)


def draw_seconds(seconds: list[Second], title: str, file: Path) -> None:
    import matplotlib.pyplot as plt

    panels = {"latest frame, ms": [1000 * each.latest for each in seconds],
              "longest pause\nof a core, ms": [1000 * each.pause for each in seconds],
              "CPU time\nof steps, relative": slowness(seconds),
              "memory, MB": [each.memory for each in seconds]}  # fmt: skip
    figure, axes = plt.subplots(
        len(panels), sharex=True, figsize=(8, 7), layout="constrained", height_ratios=(3, 1, 1.5, 1.5)
    )
    for axis, (name, values) in zip(axes, panels.items(), strict=True):
        axis.plot(np.arange(len(seconds)) / 60, values, linewidth=0.7)
        axis.set(ylabel=name, ylim=(0, 1.1 * max(*values, 1)))
    axes[0].axhline(1000 * LATE, color="C3", linestyle=":")
    axes[2].axhline(SLOW, color="C3", linestyle=":")
    axes[0].set_title(title)
    axes[-1].set_xlabel("minutes")
    figure.savefig(file, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="mini")
    parser.add_argument("--first", type=int, default=12, help="number of streams to try first")
    parser.add_argument("--seconds", type=float, default=15.0, help="of each attempt")
    what = ["overhead", "pool", "processes"]
    parser.add_argument("--only", nargs="+", choices=what, default=what)
    parser.add_argument("--minutes", type=float, help="run a pool for so long instead")
    parser.add_argument("--sessions", type=int, default=32)
    parser.add_argument("--plot", type=Path, metavar="FILE")
    add_markdown_option(parser)
    options = parser.parse_args()
    model = Mimi.from_pretrained(options.model)
    report = Report(jax.devices()[0].device_kind, [f"{options.model}, {CODEBOOKS} codebooks"])
    if options.minutes:
        row = run_long(model, options.sessions, options.minutes, options.plot)
        report.table(list(row))
        report.row(list(row.values()))
        return report.save(options.markdown)
    if "overhead" in options.only:
        report.table(["rows", "bare encoder step, ms", "in a pool, ms", "overhead, ms"])
        for rows in (8, 64):
            report.row([str(rows), *(f"{1000 * x:.1f}" for x in uvloop.run(step_times(model, rows)))])
    searches = {
        "pool": lambda count: uvloop.run(pool_lateness(model, count, options.seconds)),
        "processes": lambda count: process_lateness(options.model, count, options.seconds),
    }
    if options.only != ["overhead"]:
        report.table(["streams", "as", "p99 lateness, ms"])
    with tempfile.TemporaryDirectory() as programs:
        # For the processes: this one has read its settings already.
        os.environ |= {
            "JAX_COMPILATION_CACHE_DIR": programs,
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        if "processes" in options.only:
            process_lateness(options.model, 1, 1)
        for name, measure in searches.items():
            if name in options.only:
                for count, value in largest(measure, options.first):
                    report.row([str(count), name, f"{1000 * value:.0f}"])
    report.save(options.markdown)


if __name__ == "__main__":
    main()
