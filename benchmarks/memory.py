"""How much memory `mimi-jax encode` and `mimi-jax decode` take, by the length of the audio.

    python -m benchmarks.memory [MODEL] [--minutes 1 6 60] [--rate 24000] [--markdown FILE]

Whole processes with a warm compilation cache: how long each took, and what the system says was its peak. The
audio is a WAV file that repeats the bundled clip. MODEL is "mini" or a folder; without it, a model of full
size with random weights. Linux and macOS.
"""

import argparse
import multiprocessing
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from benchmarks.inputs import save_random_model, write_speech
from benchmarks.processes import Usage, run_python
from benchmarks.report import Report, add_markdown_option, device_of_new_processes

WARMUP_MINUTES = 0.1
COLUMNS = ("minutes", "command", "seconds", "x realtime", "peak MB", "more than the first")


def measure(model: str, minutes: float, rate: int, folder: str) -> dict[str, Usage]:
    """What each command takes, by its name."""
    audio, codes, decoded = (
        f"{folder}/{name}" for name in ("speech.wav", "speech.safetensors", "decoded.wav")
    )
    write_speech(Path(audio), minutes, rate)
    commands = {"encode": [audio, "-o", codes], "decode": [codes, "-o", decoded]}
    return {
        name: run_python(["-m", "mimi_jax.cli", name, *words, "--model", model], folder)
        for name, words in commands.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", metavar="MODEL")
    parser.add_argument("--minutes", type=float, nargs="+", default=[1, 6, 60])
    parser.add_argument("--rate", type=int, default=24_000, help="of the WAV file, Hz")
    add_markdown_option(parser)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = options.model
        if model is None:
            model = f"{folder}/model"
            # In a new process: the peak of a command includes what its parent has resident.
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                pool.submit(save_random_model, model).result()
        measure(model, WARMUP_MINUTES, options.rate, folder)
        name = options.model or "full size, random weights"
        report = Report(device_of_new_processes(), [f"{name}, WAV of {options.rate} Hz"])
        report.table(COLUMNS)
        first: dict[str, Usage] = {}
        for minutes in options.minutes:
            results = measure(model, minutes, options.rate, folder)
            first = first or results
            for command, (seconds, peak) in results.items():
                speed, more = 60 * minutes / seconds, peak - first[command].peak
                cells = [f"{minutes:g}", command, f"{seconds:.1f}", f"{speed:.1f}"]
                report.row([*cells, f"{peak:.0f}", f"{more:+.0f}"])
    report.save(options.markdown)


if __name__ == "__main__":
    main()
