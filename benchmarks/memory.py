"""How much memory `mimi-jax encode` and `mimi-jax decode` take, by the length of the audio.

    python -m benchmarks.memory [MODEL] [--minutes 1 6 60] [--rate 24000]

Whole processes, by the clock and by what the system says was their peak, with a warm compilation cache. The
audio is a WAV file of the bundled clip over and over. MODEL is "mini" or a folder; without it, a model of
full size with random weights. Linux and macOS.
"""

import argparse
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from flax import nnx

import mimi_jax
from mimi_jax.files.audio import audio_writer

SAMPLE = Path(mimi_jax.__file__).parent / "samples" / "speech.flac"
MAXRSS_BYTES = 1 if sys.platform == "darwin" else 1024  # the unit of `ru_maxrss`
WARMUP_MINUTES = 0.1


def save_full_size_model(folder: str) -> None:
    mimi_jax.Mimi(mimi_jax.MimiConfig(), rngs=nnx.Rngs(0)).save_pretrained(folder)


def write_speech(path: Path, minutes: float, rate: int) -> None:
    """The bundled clip over and over, at `rate` Hz."""
    clip, left = mimi_jax.load_audio(SAMPLE, rate), round(60 * minutes * rate)
    with audio_writer(path, rate, channels=1, num_samples=left) as write:
        while left > 0:
            write(clip[:, :left])
            left -= clip.shape[1]


def run(words: list[str], cache: str) -> tuple[float, float]:
    """Seconds that one command takes, and the peak of its memory in MB."""
    environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": cache}
    command = [sys.executable, "-m", "mimi_jax.cli", *words]
    start = time.perf_counter()
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return seconds, usage.ru_maxrss * MAXRSS_BYTES / 1e6


def measure(model: str, minutes: float, rate: int, folder: str) -> dict[str, tuple[float, float]]:
    """Seconds and MB of each command."""
    audio, codes, decoded = (
        f"{folder}/{name}" for name in ("speech.wav", "speech.safetensors", "decoded.wav")
    )
    write_speech(Path(audio), minutes, rate)
    return {
        "encode": run(["encode", audio, "-o", codes, "--model", model], folder),
        "decode": run(["decode", codes, "-o", decoded, "--model", model], folder),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", metavar="MODEL")
    parser.add_argument("--minutes", type=float, nargs="+", default=[1, 6, 60])
    parser.add_argument("--rate", type=int, default=24_000, help="of the WAV file, Hz")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = arguments.model
        if model is None:
            model = f"{folder}/model"
            # In a process of its own: the peak of a command would include that of the process it is born of.
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                pool.submit(save_full_size_model, model).result()
        measure(model, WARMUP_MINUTES, arguments.rate, folder)
        first = {}
        print("| minutes | command | seconds | x realtime | peak MB | more than the first |")
        print("|---|---|---|---|---|---|", flush=True)
        for minutes in arguments.minutes:
            results = measure(model, minutes, arguments.rate, folder)
            first = first or results
            for command, (seconds, peak) in results.items():
                speed, more = 60 * minutes / seconds, peak - first[command][1]
                print(f"| {minutes:g} | {command} | {seconds:.1f} | {speed:.1f} | {peak:.0f} | {more:+.0f} |")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
