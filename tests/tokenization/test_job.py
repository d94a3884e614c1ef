"""Jobs from end to end: every clip once with the codes that it gets alone, or listed with a reason."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from flax import nnx

import mimi_jax
from mimi_jax import Mimi, checkpoint, cli
from mimi_jax.files.audio import AudioReader
from mimi_jax.tokenization import Settings, Summary, read_manifest, tokenize
from mimi_jax.tokenization.output import Totals
from tests.models import load_fixture
from tests.tokenization.corpora import (
    RATE,
    audio_bytes,
    codes_alone,
    codes_by_id,
    errors_of,
    noise_clip,
    write_folder,
    write_parquet,
    write_tar,
)

LENGTHS = [1, 15, 16, 17, 399, 400, 401, 1000, 2345, 800, 5000, 64]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    load_fixture("base").model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model() -> Mimi:
    return load_fixture("base").model


def check_folder(out: Path, data: Path, model: Mimi) -> None:
    """Every WAV file in `data` is there once, with its codes."""
    found = codes_by_id(out)
    paths = {str(path.relative_to(data)): path for path in data.rglob("*.wav")}
    assert found.keys() == paths.keys()
    for name, path in paths.items():
        np.testing.assert_array_equal(found[name], codes_alone(model, mimi_jax.load_audio(path)))


def test_a_folder_becomes_shards(tmp_path: Path, tiny: Path, model: Mimi):
    write_folder(tmp_path / "data", LENGTHS)
    summary = tokenize([tmp_path / "data"], tmp_path / "out", tiny, Settings(clips_per_shard=5))
    assert (summary.num_done, summary.num_shards) == (3, 3)
    assert summary.now == summary.total
    assert summary.total.samples == sum(LENGTHS)
    assert summary.compilations == 1  # all are shorter than a second
    check_folder(tmp_path / "out", tmp_path / "data", model)
    manifest = read_manifest(tmp_path / "out")
    assert manifest["complete"] is True
    assert manifest["totals"]["clips"] == len(LENGTHS)
    assert manifest["settings"]["num_quantizers"] == model.config.num_quantizers
    assert manifest["config"] == model.config.to_dict()


def test_a_summary_computes_hours_and_speed():
    now, total = Totals(samples=2 * 3600 * RATE), Totals(samples=5 * 3600 * RATE)
    summary = Summary(now, RATE, seconds=100.0, compilations=3, total=total, num_done=1, num_shards=2)
    assert (summary.hours, summary.realtime) == (2.0, 72.0)


def test_archives_and_manifests_become_shards(tmp_path: Path, tiny: Path, model: Mimi):
    clips = {f"{n}.wav": noise_clip(100 * n, seed=n) for n in range(1, 5)}
    files = {name: audio_bytes(clip, subtype="FLOAT") for name, clip in clips.items()}
    write_tar(tmp_path / "a.tar", {**files, "1.json": b"{}"})
    write_parquet(tmp_path / "b.parquet", [{"bytes": data, "path": name} for name, data in files.items()])
    (tmp_path / "long.wav").write_bytes(audio_bytes(noise_clip(48_000), subtype="FLOAT"))
    (tmp_path / "m.jsonl").write_text('{"path": "long.wav", "start": 0.5, "end": 1.5}\n{"path": "4.wav"}\n')
    (tmp_path / "4.wav").write_bytes(files["4.wav"])
    for name in ("a.tar", "b.parquet", "m.jsonl"):
        tokenize([tmp_path / name], tmp_path / name.split(".")[0], tiny, Settings(num_quantizers=3))
    for name in "ab":
        found = codes_by_id(tmp_path / name)
        assert found.keys() == clips.keys()
        for clip_id, clip in clips.items():
            np.testing.assert_array_equal(found[clip_id], codes_alone(model, clip, 3))
    found = codes_by_id(tmp_path / "m")
    assert list(found) == ["long.wav@0.5-1.5", "4.wav"]
    stretch = noise_clip(48_000)[:, 12_000:36_000]
    np.testing.assert_array_equal(found["long.wav@0.5-1.5"], codes_alone(model, stretch, 3))


def test_a_rerun_does_only_what_is_missing(tmp_path: Path, tiny: Path, model: Mimi):
    write_folder(tmp_path / "data", LENGTHS)
    tokenize([tmp_path / "data"], tmp_path / "out", tiny, Settings(clips_per_shard=4))
    shards = sorted((tmp_path / "out" / "codes").iterdir())
    times = [path.stat().st_mtime_ns for path in shards]
    shards[1].unlink()
    summary = tokenize([tmp_path / "data"], tmp_path / "out", tiny, Settings(clips_per_shard=4))
    assert (summary.now.clips, summary.total.clips) == (4, len(LENGTHS))
    again = [path.stat().st_mtime_ns for path in sorted((tmp_path / "out" / "codes").iterdir())]
    assert [new == old for new, old in zip(again, times, strict=True)] == [True, False, True]
    check_folder(tmp_path / "out", tmp_path / "data", model)
    summary = tokenize([tmp_path / "data"], tmp_path / "out", tiny, Settings(clips_per_shard=4))
    assert (summary.now.clips, summary.compilations, summary.total.clips) == (0, 0, len(LENGTHS))


def test_other_settings_and_other_inputs_are_refused(tmp_path: Path, tiny: Path):
    write_folder(tmp_path / "data", [100, 200])
    tokenize([tmp_path / "data"], tmp_path / "out", tiny)
    with pytest.raises(ValueError, match="num_quantizers was 4 and is 2"):
        tokenize([tmp_path / "data"], tmp_path / "out", tiny, Settings(num_quantizers=2))
    with pytest.raises(ValueError, match="model_id was"):
        tokenize([tmp_path / "data"], tmp_path / "out", "mini", Settings(num_quantizers=4))
    write_folder(tmp_path / "data", [100, 200, 300])
    with pytest.raises(ValueError, match="inputs was"):
        tokenize([tmp_path / "data"], tmp_path / "out", tiny)


def test_a_job_goes_on_with_the_first_codebooks_alone(tmp_path: Path, tiny: Path, model: Mimi):
    write_folder(tmp_path / "data", [100, 200])
    tokenize([tmp_path / "data"], tmp_path / "out", tiny, Settings(num_quantizers=2))
    settings = json.loads((tmp_path / "out" / "manifest.json").read_text())["settings"]
    assert settings["model_id"] == checkpoint.model_id(model, 2) != checkpoint.model_id(model)
    checkpoint.keep_codebooks(model, 2).save_pretrained(tmp_path / "few")
    assert tokenize([tmp_path / "data"], tmp_path / "out", tmp_path / "few").now.clips == 0


def test_processes_split_the_shards(tmp_path: Path, tiny: Path, model: Mimi):
    write_folder(tmp_path / "data", LENGTHS)
    parts = []
    for index in range(3):
        summary = tokenize(
            [tmp_path / "data"],
            tmp_path / "out",
            tiny,
            Settings(clips_per_shard=3),
            process_index=index,
            process_count=3,
        )
        parts.append(summary.now.clips)
        assert read_manifest(tmp_path / "out")["complete"] is (index == 2)
    assert parts == [6, 3, 3]
    check_folder(tmp_path / "out", tmp_path / "data", model)
    with pytest.raises(ValueError, match=r"process_index must lie in \[0, 3\), got 3"):
        tokenize([tmp_path / "data"], tmp_path / "out", tiny, process_index=3, process_count=3)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"settings": Settings(num_quantizers=99)}, "num_quantizers must be an integer from 1 to 4"),
        ({"process_index": 0}, "process_index and process_count must be given together"),
        ({"workers": 0}, "workers must be positive, got 0"),
        ({"batch_size": 3}, "batch_size must be a multiple of the 8 devices, got 3"),
    ],
)
def test_bad_options_are_refused(tmp_path: Path, tiny: Path, options: dict, error: str):
    write_folder(tmp_path / "data", [100])
    with pytest.raises(ValueError, match=error):
        tokenize([tmp_path / "data"], tmp_path / "out", tiny, **options)


def test_a_model_that_cannot_stream_is_refused_before_anything_is_made(tmp_path: Path):
    load_fixture("noncausal").model.save_pretrained(tmp_path / "whole")
    write_folder(tmp_path / "data", [100])
    with pytest.raises(ValueError, match="looks ahead and cannot stream"):
        tokenize([tmp_path / "data"], tmp_path / "out", tmp_path / "whole")
    assert not (tmp_path / "out").exists()


def test_errors_are_retried_when_asked(tmp_path: Path, tiny: Path, model: Mimi):
    write_folder(tmp_path / "data", [100, 200, 300, 400])
    bad = tmp_path / "data" / "speaker 1" / "clip_001.wav"
    data = bad.read_bytes()
    bad.write_bytes(b"")
    options: dict[str, Any] = {"settings": Settings(clips_per_shard=2)}
    assert tokenize([tmp_path / "data"], tmp_path / "out", tiny, **options).total.errors == 1
    bad.write_bytes(data)
    assert tokenize([tmp_path / "data"], tmp_path / "out", tiny, **options).total.errors == 1
    other: dict[str, Any] = {"process_index": 0, "process_count": 2, "retry_errors": True, **options}
    summary = tokenize([tmp_path / "data"], tmp_path / "out", tiny, **other)  # whose shards have none
    assert (summary.num_done, summary.total.errors) == (2, 1)
    summary = tokenize([tmp_path / "data"], tmp_path / "out", tiny, retry_errors=True, **options)
    assert (summary.now.clips, summary.total.clips, summary.total.errors) == (2, 4, 0)
    check_folder(tmp_path / "out", tmp_path / "data", model)


def test_bfloat16_codes_are_those_of_the_model_in_bfloat16(tmp_path: Path, tiny: Path, model: Mimi):
    write_folder(tmp_path / "data", [1600] * 8)
    tokenize([tmp_path / "data"], tmp_path / "out", tiny, Settings(dtype="bfloat16"))
    found, half = codes_by_id(tmp_path / "out"), model.astype("bfloat16")
    alone = [codes_alone(half, mimi_jax.load_audio(tmp_path / "data" / name)) for name in found]
    assert np.mean(np.stack(list(found.values())) == np.stack(alone)) > 0.95  # the sums are in another order
    assert read_manifest(tmp_path / "out")["settings"]["dtype"] == "bfloat16"


def test_the_output_may_lie_in_the_input(tmp_path: Path, tiny: Path, model: Mimi):
    write_folder(tmp_path / "data", [100, 200])
    for _ in range(2):
        tokenize([tmp_path / "data"], tmp_path / "data" / "tokens", tiny)
    check_folder(tmp_path / "data" / "tokens", tmp_path / "data", model)


def test_another_encoder_is_refused(tmp_path: Path, tiny: Path):
    write_folder(tmp_path / "data", [100, 200])
    tokenize([tmp_path / "data"], tmp_path / "out", tiny)
    tuned = nnx.clone(load_fixture("base").model)
    tuned.downsample.kernel[...] *= 1.01  # type: ignore[union-attr]
    tuned.save_pretrained(tmp_path / "tuned")
    with pytest.raises(ValueError, match="encoder_id was"):
        tokenize([tmp_path / "data"], tmp_path / "out", tmp_path / "tuned")


def test_strict_stops_at_the_first_clip_that_is_broken(tmp_path: Path, tiny: Path):
    write_folder(tmp_path / "data", [100, 200])
    (tmp_path / "data" / "bad.wav").write_bytes(b"")
    with pytest.raises(ValueError, match=r"data: bad.wav: the file is empty \(0 bytes\)"):
        tokenize([tmp_path / "data"], tmp_path / "out", tiny, strict=True)


def hostile(number: int, random: np.random.Generator) -> tuple[str, bytes]:
    """A name, and a file that somebody might have in a corpus."""
    audio = noise_clip(int(random.integers(50, 3000)), seed=number, channels=int(random.choice([1, 1, 2, 6])))
    form = str(random.choice(["WAV", "FLAC", "OGG", "MP3"]))
    rate = int(random.choice([8000, 16_000, 24_000, 44_100, 192_000]))
    if form == "MP3":
        audio, rate = audio[:2], min(rate, 44_100)
    elif form == "OGG":
        rate = min(rate, 44_100)
    data = bytearray(audio_bytes(audio, rate, form))
    match number % 10:
        case 0:  # a fuzzed header
            for place in random.integers(0, 60, 4):
                data[place] = random.integers(256)
        case 1:
            data = data[: random.integers(len(data))]
        case 2:  # 0 to 3 samples
            data = bytearray(audio_bytes(noise_clip(int(random.integers(4)), seed=number)))
        case 3:
            data = bytearray(audio_bytes(noise_clip(200, seed=number), 192_000, "FLAC"))
        case 4:
            data = bytearray(audio_bytes(noise_clip(200, seed=number, channels=6)))
        case 5:
            broken = noise_clip(200, seed=number)
            broken[0, random.integers(200)] = random.choice([np.nan, np.inf])
            data = bytearray(audio_bytes(broken, subtype="FLOAT"))
        case 6:  # fuzz in the middle
            for place in random.integers(0, len(data), 8):
                data[place] = random.integers(256)
        case 7:
            data = bytearray(random.bytes(int(random.integers(2000))))
    suffix = form.lower()
    names = [
        f"{number}.{suffix}",
        f"with space {number}.{suffix}",
        f'it\'s "{number}".{suffix}',
        f"ñ語{number}.wav",
    ]
    return f"{number % 3}/{names[number % 4]}", bytes(data)


def test_500_hostile_inputs_are_each_coded_or_listed(tmp_path: Path, tiny: Path, model: Mimi):
    generator = np.random.default_rng(0)
    files = dict(hostile(number, generator) for number in range(500))
    folders, tarred, rows = list(files.items())[:300], list(files.items())[300:400], list(files.items())[400:]
    for name, data in folders:
        path = tmp_path / "data" / "files" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    write_tar(tmp_path / "data" / "a.tar", dict(tarred))
    whole = (tmp_path / "data" / "a.tar").read_bytes()
    (tmp_path / "data" / "cut.tar").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "data" / "zeros.tar").write_bytes(b"")
    entries = [None, *({"bytes": data, "path": "same name"} for _, data in rows)]
    write_parquet(tmp_path / "data" / "b.parquet", entries)
    summary = tokenize([tmp_path / "data"], tmp_path / "out", tiny, Settings(clips_per_shard=100))
    assert summary.num_done == summary.num_shards
    found, errors = codes_by_id_and_source(tmp_path / "out"), errors_of(tmp_path / "out")
    assert all(reason and "\n" not in reason for reason in errors.values())
    assert len(found) > 150 and len(errors) > 100
    for name, _ in folders:
        assert (f"files/{name}" in errors) != (("data", f"files/{name}") in found), name
    assert (
        sum(source == "b.parquet" for source, _ in found) + sum("same name" in name for name in errors) == 100
    )
    assert "neither bytes nor the path" in errors["0"]
    assert "cut short" in " ".join(errors.values())
    names = [name for source, name in found if source == "data"]
    clips = {name: mimi_jax.load_audio(tmp_path / "data" / name) for name in names}
    longest = max(clips.values(), key=np.size)  # beside which each is padded, or each would be a program
    for name, clip in clips.items():
        codes, expected = found["data", name], mimi_jax.encode(model, *mimi_jax.pad_batch([clip, longest]))
        np.testing.assert_array_equal(codes, expected.audio_codes[0, :, : codes.shape[1]])
        assert codes.shape[1] == model.encoded_length(clip.shape[1])


def codes_by_id_and_source(folder: Path) -> dict[tuple[str, str], np.ndarray]:
    from mimi_jax.tokenization import read_codes

    clips = list(read_codes(folder))
    found = {(Path(clip.source).name, clip.id): clip.codes for clip in clips}
    assert len(found) == len(clips)
    return found


def command(data: Path, out: Path, *options: str) -> list[str]:
    program = "import sys; from mimi_jax import cli; sys.exit(cli.main())"
    return [sys.executable, "-c", program, "tokenize", str(data), "-o", str(out), *options]


def kill_and_rerun(line: list[str], out: Path, kills: int, span: float, seed: int = 0) -> int:
    """Run a command, killed at random moments, the last time to its end; returns how often it was killed."""
    generator, reached = random.Random(seed), 0
    for _ in range(kills):
        before = len(list((out / "codes").glob("*.parquet"))) if out.exists() else 0
        process = subprocess.Popen(line, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        start = time.monotonic()
        # Most are counted from the first shard that it writes, so that they come in the middle of the work.
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


def test_a_long_clip_is_coded_as_a_stream(tmp_path: Path):
    """Of three pieces, so that workers and device go on with it where they were."""
    clips = {"long.wav": noise_clip(65 * RATE), "short.wav": noise_clip(3 * RATE, seed=1)}
    for name, clip in clips.items():
        (tmp_path / name).write_bytes(audio_bytes(clip, subtype="FLOAT"))
    summary = tokenize([tmp_path / "*.wav"], tmp_path / "out", settings=Settings(num_quantizers=8))
    assert summary.total.samples == 68 * RATE
    mini, found = Mimi.from_pretrained("mini", decoder=False), codes_by_id(tmp_path / "out")
    for name, clip in clips.items():
        np.testing.assert_array_equal(found[str(tmp_path / name)], codes_alone(mini, clip, 8))


def test_an_interrupted_job_says_so_and_goes_on(tmp_path: Path, tiny: Path, model: Mimi):
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


def test_the_command_prints_a_table_and_its_status_tells_of_errors(
    tmp_path: Path, tiny: Path, capsys: pytest.CaptureFixture[str]
):
    write_folder(tmp_path / "data", [100, 200])
    words = ["tokenize", str(tmp_path / "data"), "-o", str(tmp_path / "out"), "--model", str(tiny)]
    assert cli.main(words) == 0
    table = capsys.readouterr().out
    assert "2 clips, 0.00 h, 0 errors" in table
    assert "programs compiled" in table
    assert "1 of 1 are done" in table
    (tmp_path / "data" / "bad.wav").write_bytes(b"RIFF")
    words[3] = str(tmp_path / "other")
    assert cli.main(words) == 1
    captured = capsys.readouterr()
    assert "2 clips, 0.00 h, 1 errors" in captured.out
    assert (
        captured.err.strip()
        .splitlines()[-1]
        .startswith(
            "mimi-jax tokenize: error: 1 clips could not be encoded; the reasons are in"
            f" {tmp_path / 'other' / 'errors'}"
        )
    )


@pytest.mark.parametrize(
    ("words", "variables", "error"),
    [
        (["--process-index", "1"], {}, "--process-index and --process-count must be given together"),
        (["--ray-actors", "2"], {}, "need --engine ray"),
        (["--batch-size", "0"], {}, "argument --batch-size: must be positive, got 0"),
        (["--process-index", "2", "--process-count", "2"], {}, "must lie in [0, 2), got 2"),
        ([], {"SLURM_PROCID": "4", "SLURM_STEP_NUM_TASKS": "4"}, "must lie in [0, 4), got 4"),
        ([], {"OMPI_COMM_WORLD_RANK": "5", "OMPI_COMM_WORLD_SIZE": "5"}, "must lie in [0, 5), got 5"),
        ([], {"TPU_WORKER_ID": "2", "TPU_WORKER_HOSTNAMES": "a,b"}, "must lie in [0, 2), got 2"),
    ],
)
def test_the_process_is_named_by_options_or_variables(
    tmp_path: Path,
    words: list[str],
    variables: dict[str, str],
    error: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    write_folder(tmp_path / "data", [100])
    status = cli.main(["tokenize", str(tmp_path / "data"), "-o", str(tmp_path / "out"), *words])
    assert status == 2
    assert error in capsys.readouterr().err
