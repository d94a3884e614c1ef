"""Jobs that are killed, interrupted or run twice at once: in the end each clip is there once."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile

from mimi_jax import Mimi
from mimi_jax.files.audio import AudioReader
from tests.tokenization.corpora import check_folder, codes_alone, codes_by_id, write_folder


def command(data: Path | str, out: Path | str, *options: str) -> list[str]:
    program = "import sys; from mimi_jax import cli; sys.exit(cli.main())"
    return [sys.executable, "-c", program, "tokenize", str(data), "-o", str(out), *options]


def kill_and_rerun(line: list[str], out: Path, kills: int, span: float, seed: int = 0) -> int:
    """Run a command and kill it at random moments, then run it to its end.

    Returns:
        How often it was killed before its end.
    """
    generator, reached = random.Random(seed), 0
    for _ in range(kills):
        before = len(list((out / "codes").glob("*.parquet"))) if out.exists() else 0
        process = subprocess.Popen(line, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        start = time.monotonic()
        # Most kills wait for a new shard first, so that they come in the middle of the work.
        limit = 120 if generator.random() < 0.8 else generator.uniform(0, 3)
        while process.poll() is None and time.monotonic() - start < limit:
            if out.exists() and len(list((out / "codes").glob("*.parquet"))) > before:
                break
            time.sleep(0.01)
        time.sleep(generator.uniform(0, span))
        reached += process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait()
    subprocess.run(line, check=True, stdout=subprocess.DEVNULL, env={**os.environ})
    return reached


@pytest.mark.slow
def test_60_real_clips_survive_three_kills(tmp_path: Path, shared_speech: list[Path]):
    long_enough = [path for path in shared_speech if soundfile.info(path).duration > 2.5]
    clips = long_enough[:: len(long_enough) // 60][:60]
    entries = [{"path": str(path), "start": 0.25, "end": 2.5} for path in clips]
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    line = command(tmp_path / "m.jsonl", tmp_path / "out", "--clips-per-shard", "4", "--num-quantizers", "8")
    assert kill_and_rerun(line, tmp_path / "out", kills=3, span=0.3) >= 2
    found = codes_by_id(tmp_path / "out")
    assert list(found) == [f"{path}@0.25-2.5" for path in clips]
    mini = Mimi.from_pretrained("mini", decoder=False)
    for path in clips:
        with path.open("rb") as file:
            reader = AudioReader(file, "it", start=0.25, end=2.5)
            audio = np.concatenate(list(reader), axis=1)
        np.testing.assert_array_equal(found[f"{path}@0.25-2.5"], codes_alone(mini, audio, 8))


def test_an_interrupted_job_says_so_and_can_be_continued(tmp_path: Path, tiny: Path, model: Mimi):
    write_folder(tmp_path / "data", [3000] * 60)
    line = command(tmp_path / "data", tmp_path / "out", "--clips-per-shard", "2", "--model", str(tiny))
    process = subprocess.Popen(line, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not list(tmp_path.glob("out/codes/*.parquet")):
        time.sleep(0.01)
    process.terminate()
    assert process.communicate()[1] == "mimi-jax tokenize: error: interrupted\n"
    assert process.returncode == 128 + signal.SIGTERM
    assert 0 < len(list(tmp_path.glob("out/codes/*.parquet"))) < 30
    assert subprocess.run(line, stdout=subprocess.DEVNULL).returncode == 0
    check_folder(tmp_path / "out", tmp_path / "data", model)


@pytest.mark.slow
def test_300_clips_survive_30_kills(tmp_path: Path, tiny: Path, model: Mimi):
    write_folder(tmp_path / "data", [100 + 7 * (n % 9) for n in range(300)])
    line = command(tmp_path / "data", tmp_path / "out", "--clips-per-shard", "5", "--model", str(tiny))
    assert kill_and_rerun(line, tmp_path / "out", kills=30, span=0.05) >= 15
    check_folder(tmp_path / "out", tmp_path / "data", model)


def test_two_processes_on_one_output_share_the_work(tmp_path: Path, tiny: Path, model: Mimi):
    write_folder(tmp_path / "data", [200 + n % 4 for n in range(40)])
    line = command(tmp_path / "data", tmp_path / "out", "--clips-per-shard", "2", "--model", str(tiny))
    both = [subprocess.Popen(line, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    done = [int(process.communicate()[0].split("this run")[1].split()[0]) for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert sum(done) == 40
    check_folder(tmp_path / "out", tmp_path / "data", model)
