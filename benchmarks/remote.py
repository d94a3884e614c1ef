"""What a bucket costs: `tokenize` of a tar archive on S3, beside the same archive on a local disk.

    python -m benchmarks.remote [--gigabytes 3] [--delay 20] [--runs 3] [--folder FOLDER] [--markdown FILE]

The archive holds clips of 20 seconds, 16-bit stereo at 48 kHz. The server is a small S3 double on this
machine, which waits for some milliseconds before each answer. It takes CPU time from the job, as no real one
would. Both jobs run in turns, each in a process of its own, with `mini` and 8 codebooks. Their memory is that
of the main process and its workers together, where pages that they share count once.
"""

import argparse
import asyncio
import contextlib
import io
import multiprocessing
import os
import statistics
import tarfile
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple
from xml.sax.saxutils import escape

import numpy as np
import soundfile

from benchmarks.inputs import CODEBOOKS
from benchmarks.report import Report, add_markdown_option

RATE, CHANNELS, SECONDS = 48_000, 2, 20
ACCOUNT = {"AWS_ACCESS_KEY_ID": "any", "AWS_SECRET_ACCESS_KEY": "any", "AWS_DEFAULT_REGION": "us-east-1"}
SAMPLE_SECONDS = 0.25  # between two looks at the memory
MB = 1e6


class Run(NamedTuple):
    """What one job took."""

    seconds: float
    num_bytes: float  # the most memory
    audio_seconds: float


def make_archive(path: Path, num_bytes: float) -> None:
    """A tar archive of clips of noise, about as large as asked for."""
    noise = 0.1 * np.random.default_rng(0).standard_normal((RATE * (SECONDS + 10), CHANNELS), np.float32)
    with tarfile.open(path, "w") as archive:
        number = 0
        while path.stat().st_size < num_bytes:
            file, first = io.BytesIO(), 37 * number % (10 * RATE)
            soundfile.write(file, noise[first : first + RATE * SECONDS], RATE, format="WAV", subtype="PCM_16")
            member = tarfile.TarInfo(f"{number:06}.wav")
            member.size = file.tell()
            file.seek(0)
            archive.addfile(member, file)
            number += 1


def serve(folder: Path, delay: float, port: Any) -> None:
    """Serve the files of a folder as a bucket named "bucket", and put the port into a queue."""
    from aiohttp import web  # s3fs needs it anyway

    async def answer(request: web.Request) -> web.StreamResponse:
        await asyncio.sleep(delay)
        if "list-type" in request.query:
            return web.Response(
                text=_listing(folder, request.query["prefix"]), content_type="application/xml"
            )
        path = folder / request.match_info["key"]
        if not path.is_file():
            return web.Response(status=404)
        return web.FileResponse(path, chunk_size=1 << 20)

    async def run() -> None:
        app = web.Application()
        app.router.add_get("/bucket{slash:/?}{key:.*}", answer)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        port.put(runner.addresses[0][1])
        await asyncio.Event().wait()

    asyncio.run(run())


def _listing(folder: Path, prefix: str) -> str:
    """The answer of S3 when it is asked for the files whose names begin with a prefix."""
    files = (path for path in folder.iterdir() if path.name.startswith(prefix))
    entries = (
        f"<Contents><Key>{escape(path.name)}</Key><Size>{path.stat().st_size}</Size></Contents>"
        for path in files
    )
    return f"<ListBucketResult><IsTruncated>false</IsTruncated>{''.join(entries)}</ListBucketResult>"


@contextlib.contextmanager
def bucket(folder: Path, delay: float) -> Iterator[str]:
    """Serve a folder in another process. Yields the address."""
    context = multiprocessing.get_context("spawn")
    port = context.Queue()
    process = context.Process(target=serve, args=(folder, delay, port), daemon=True)
    process.start()
    try:
        yield f"http://127.0.0.1:{port.get(timeout=60)}"
    finally:
        process.kill()
        process.join()


def run_job(source: str) -> Run:
    """Tokenize a source in this process, which has not done so before."""
    from mimi_jax.tokenization import Settings, tokenize

    peak, is_done = [0.0], threading.Event()

    def watch() -> None:
        while not is_done.wait(SAMPLE_SECONDS):
            peak[0] = max(peak[0], _memory())

    watcher = threading.Thread(target=watch)
    watcher.start()
    with tempfile.TemporaryDirectory() as out:
        start = time.perf_counter()
        summary = tokenize([source], Path(out) / "out", "mini", Settings(num_quantizers=CODEBOOKS))
        seconds = time.perf_counter() - start
    is_done.set()
    watcher.join()
    assert summary.total.errors == 0
    return Run(seconds, peak[0], 3600 * summary.hours)


def _memory() -> float:
    """Bytes of memory of this process and its children. A page of several counts in parts."""
    total = 0.0
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    for process in ("self", *children):
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    total += 1024 * int(line.split()[1])
    return total


def in_process(source: str) -> Run:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(run_job, source).result()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gigabytes", type=float, default=3.0)
    parser.add_argument("--delay", type=float, default=20.0, help="milliseconds before each answer")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--folder", help="where the archive is made")
    add_markdown_option(parser)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        path = Path(folder) / "clips.tar"
        make_archive(path, 1e9 * options.gigabytes)
        size = path.stat().st_size
        runs: dict[str, list[Run]] = {"local": [], "S3": []}
        with bucket(Path(folder), options.delay / 1000) as address:
            os.environ.update(ACCOUNT, AWS_ENDPOINT_URL=address)
            for _ in range(options.runs):
                runs["local"].append(in_process(str(path)))
                runs["S3"].append(in_process("s3://bucket/clips.tar"))
    audio = runs["S3"][0].audio_seconds
    notes = [
        f"a tar of {size / 1e9:.1f} GB, {audio / 3600:.1f} h",
        f"{options.delay:g} ms before each answer",
    ]
    report = Report("CPU", notes)
    report.table(["archive", "seconds", "x realtime", "of local", "MB of memory", "over local"])
    base = statistics.median(run.num_bytes for run in runs["local"])
    for name, rows in runs.items():
        seconds = statistics.median(run.seconds for run in rows)
        memory = statistics.median(run.num_bytes for run in rows)
        pairs = zip(runs["local"], rows, strict=True)
        share = statistics.median(local.seconds / run.seconds for local, run in pairs)
        cells = [name, f"{seconds:.1f}", f"{audio / seconds:.0f}", f"{share:.0%}", f"{memory / MB:.0f}"]
        report.row([*cells, f"{(memory - base) / MB:.0f}"])
    report.save(options.markdown)


if __name__ == "__main__":
    main()
