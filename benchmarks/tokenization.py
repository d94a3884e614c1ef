"""What reading, resampling and writing cost: `tokenize` beside `encode` of the same audio in memory.

    python -m benchmarks.tokenization FOLDER_OF_SPEECH [--minutes 20] [--runs 3] [--model mini]
        [--markdown FILE]

Both encode the same clips, of mixed lengths, with 8 codebooks. `encode` gets them in batches of 8, sorted by
length and padded to few shapes, each of which has run before. `tokenize` begins with files and ends with
Parquet. Its time leaves out the loading of the model and, as for `encode`, a first run that compiles. Without
--model it is a model of full size with random weights.
"""

import argparse
import collections
import json
import random
import statistics
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
import soundfile
from tqdm import tqdm

import mimi_jax
from benchmarks.inputs import CODEBOOKS, save_random_model
from benchmarks.report import Report, add_markdown_option
from mimi_jax import Mimi
from mimi_jax.files.audio import FORMATS
from mimi_jax.tokenization import Settings, Summary, tokenize
from mimi_jax.tokenization.coding import IN_FLIGHT

BATCH_SIZE = 8


def choose(folder: Path, seconds: float) -> list[Path]:
    """Files of about so many seconds in all, the same ones each time."""
    paths = sorted(path for path in folder.rglob("*") if path.suffix in FORMATS)
    random.Random(0).shuffle(paths)
    chosen: list[Path] = []
    for path in paths:
        if seconds <= 0:
            return chosen
        chosen.append(path)
        seconds -= soundfile.info(path).duration
    return chosen


def make_batches(clips: list[np.ndarray], frame_size: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Batches of clips of similar length, and their masks."""
    clips = sorted(clips, key=lambda clip: clip.shape[1])
    groups = [clips[first : first + BATCH_SIZE] for first in range(0, len(clips), BATCH_SIZE)]
    return [mimi_jax.pad_batch(group, frame_size) for group in groups]


def time_encode(model: Mimi, batches: list[tuple[np.ndarray, np.ndarray]]) -> float:
    """Seconds to encode all batches, as many of them in flight as in `tokenize`."""
    start, running = time.perf_counter(), collections.deque()
    for audio, mask in tqdm(batches, desc="encode", disable=None, leave=False):
        running.append(mimi_jax.encode(model, audio, mask, CODEBOOKS).audio_codes)
        if len(running) > IN_FLIGHT:
            np.asarray(running.popleft())
    jax.block_until_ready(list(running))
    return time.perf_counter() - start


def time_tokenize(manifest: Path, model: str) -> Summary:
    with tempfile.TemporaryDirectory() as folder:
        return tokenize([manifest], Path(folder) / "out", model, Settings(num_quantizers=CODEBOOKS))


def measure(paths: list[Path], name: str, folder: Path, runs: int) -> Report:
    """Measure both in turns on these files."""
    manifest = folder / "manifest.jsonl"
    manifest.write_text("".join(json.dumps({"path": str(path.absolute())}) + "\n" for path in paths))
    model = Mimi.from_pretrained(name, decoder=False)
    clips = [mimi_jax.load_audio(path) for path in paths]
    seconds = sum(clip.shape[1] for clip in clips) / model.config.sampling_rate
    batches = make_batches(clips, model.config.frame_size)
    shapes = {audio.shape: (audio, mask) for audio, mask in batches}
    report = Report(jax.devices()[0].device_kind, [f"{len(clips)} clips, {seconds / 60:.1f} min"])
    time_encode(model, list(shapes.values()))
    compilations = time_tokenize(manifest, name).compilations
    raw, whole = [], []
    for _ in range(runs):
        raw.append(time_encode(model, batches))
        whole.append(time_tokenize(manifest, name).seconds)
    report.table(["system", "median", "x realtime", "of encode", "programs"])
    for system, times, programs in (("encode", raw, len(shapes)), ("tokenize", whole, compilations)):
        median = statistics.median(times)
        share = statistics.median(r / t for r, t in zip(raw, times, strict=True))
        report.row([system, f"{median:.1f} s", f"{seconds / median:.1f}", f"{share:.0%}", str(programs)])
    return report


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--model")
    add_markdown_option(parser)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        name = options.model
        if name is None:
            name = str(Path(folder) / "random")
            save_random_model(name)
        report = measure(choose(options.folder, 60 * options.minutes), name, Path(folder), options.runs)
    report.save(options.markdown)


if __name__ == "__main__":
    main()
