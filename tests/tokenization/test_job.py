"""Whole jobs: each clip is there once with the codes that it gets alone, or is listed with a reason."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

import mimi_jax
from mimi_jax import Mimi, checkpoint
from mimi_jax.tokenization import Settings, Summary, read_codes, read_manifest, tokenize
from mimi_jax.tokenization.output import Output
from mimi_jax.tokenization.records import Totals
from tests.models import load_fixture
from tests.tokenization.corpora import (
    RATE,
    audio_bytes,
    check_folder,
    codes_alone,
    codes_by_id,
    errors_of,
    noise_clip,
    write_folder,
    write_parquet,
    write_tar,
)

LENGTHS = [1, 15, 16, 17, 399, 400, 401, 1000, 2345, 800, 5000, 64]


def test_a_folder_becomes_shards(tmp_path: Path, tiny: Path, model: Mimi):
    write_folder(tmp_path / "data", LENGTHS)
    jax.clear_caches()  # other tests may have compiled the same program
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


def test_what_is_left_out_is_counted_in_all_runs(tmp_path: Path, tiny: Path):
    write_folder(tmp_path / "data", [100, 200])
    write_tar(
        tmp_path / "data" / "a.tar", {"1.wav": audio_bytes(noise_clip(300)), "1.txt": b"", "1.json": b""}
    )
    write_tar(tmp_path / "data" / "b.tar", {"1.m4a": b"", "1.txt": b""})
    for name in ("1.txt", "2.txt", "a.tar.gz"):
        (tmp_path / "data" / name).write_bytes(b"")
    for index in range(2):
        options: dict[str, Any] = {"process_index": index, "process_count": 2}
        summary = tokenize([tmp_path / "data"], tmp_path / "out", tiny, **options)
    assert (summary.total.clips, summary.total.errors) == (3, 1)
    assert summary.left_out == "4 .txt, 1 a.tar.gz, 1 .json"
    assert read_manifest(tmp_path / "out")["totals"]["left_out"] == {".txt": 4, "a.tar.gz": 1, ".json": 1}


def test_only_another_column_of_audio_is_recorded(tmp_path: Path, tiny: Path):
    """Else jobs that older versions began could not be continued."""
    write_parquet(tmp_path / "a.parquet", [{"bytes": audio_bytes(noise_clip(100)), "path": None}])
    tokenize([tmp_path / "a.parquet"], tmp_path / "out", tiny)
    assert "audio_column" not in read_manifest(tmp_path / "out")["settings"]
    with pytest.raises(ValueError, match="audio_column was None and is 'text'"):
        tokenize([tmp_path / "a.parquet"], tmp_path / "out", tiny, Settings(audio_column="text"))
    summary = tokenize([tmp_path / "a.parquet"], tmp_path / "other", tiny, Settings(audio_column="text"))
    assert errors_of(tmp_path / "other") == {"words": f"there is no file {tmp_path / 'words'}"}
    assert (summary.total.clips, summary.total.errors) == (0, 1)
    assert read_manifest(tmp_path / "other")["settings"]["audio_column"] == "text"


def test_the_home_folder_may_be_written_as_a_tilde(
    tmp_path: Path, tiny: Path, model: Mimi, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    write_folder(tmp_path / "data", [100, 200])
    tokenize(["~/data"], "~/out", tiny)
    check_folder(tmp_path / "out", tmp_path / "data", model)
    assert read_manifest("~/out")["complete"] is True
    assert len(list(read_codes("~/out"))) == 2
    assert not list((tmp_path / "elsewhere").iterdir())


def test_audio_in_all_containers_gets_the_same_codes(tmp_path: Path, tiny: Path, model: Mimi):
    clip = np.round(noise_clip(1000) * 2**15) / np.float32(2**15)
    forms = {
        "wav": "WAV",
        "aiff": "AIFF",
        "au": "AU",
        "caf": "CAF",
        "w64": "W64",
        "sph": "NIST",
        "rf64": "RF64",
    }
    (tmp_path / "data").mkdir()
    for suffix, form in {**forms, "flac": "FLAC"}.items():
        (tmp_path / "data" / f"x.{suffix}").write_bytes(audio_bytes(clip, form=form, subtype="PCM_16"))
    (tmp_path / "data" / "sphere.wav").write_bytes(audio_bytes(clip, form="NIST", subtype="PCM_16"))
    tokenize([tmp_path / "data"], tmp_path / "out", tiny)
    found, expected = codes_by_id(tmp_path / "out"), codes_alone(model, clip)
    assert len(found) == len(forms) + 2
    for codes in found.values():
        np.testing.assert_array_equal(codes, expected)


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


def test_a_job_can_be_continued_with_a_model_of_its_codebooks_alone(tmp_path: Path, tiny: Path, model: Mimi):
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
        ({"batch_size": 3}, "batch_size must be a multiple of the 2 devices, got 3"),
    ],
)
def test_bad_options_are_refused(tmp_path: Path, tiny: Path, options: dict, error: str):
    write_folder(tmp_path / "data", [100])
    with pytest.raises(ValueError, match=error):
        tokenize([tmp_path / "data"], tmp_path / "out", tiny, **options)


def test_a_model_that_cannot_stream_is_refused_before_the_output_is_created(tmp_path: Path):
    load_fixture("noncausal").model.save_pretrained(tmp_path / "whole")
    write_folder(tmp_path / "data", [100])
    with pytest.raises(ValueError, match="looks ahead and cannot stream"):
        tokenize([tmp_path / "data"], tmp_path / "out", tmp_path / "whole")
    assert not (tmp_path / "out").exists()


def test_errors_are_retried_on_request(tmp_path: Path, tiny: Path, model: Mimi):
    write_folder(tmp_path / "data", [100, 200, 300, 400])
    bad = tmp_path / "data" / "speaker 1" / "clip_001.wav"
    data = bad.read_bytes()
    bad.write_bytes(b"")
    options: dict[str, Any] = {"settings": Settings(clips_per_shard=2)}
    assert tokenize([tmp_path / "data"], tmp_path / "out", tiny, **options).total.errors == 1
    bad.write_bytes(data)
    assert tokenize([tmp_path / "data"], tmp_path / "out", tiny, **options).total.errors == 1
    other: dict[str, Any] = {"process_index": 0, "process_count": 2, "retry_errors": True, **options}
    summary = tokenize(
        [tmp_path / "data"], tmp_path / "out", tiny, **other
    )  # the shard of this process has no errors
    assert (summary.num_done, summary.total.errors) == (2, 1)
    summary = tokenize([tmp_path / "data"], tmp_path / "out", tiny, retry_errors=True, **options)
    assert (summary.now.clips, summary.total.clips, summary.total.errors) == (2, 4, 0)
    check_folder(tmp_path / "out", tmp_path / "data", model)


def test_bfloat16_codes_are_those_of_the_model_in_bfloat16(tmp_path: Path, tiny: Path, model: Mimi):
    write_folder(tmp_path / "data", [1600] * 8)
    tokenize([tmp_path / "data"], tmp_path / "out", tiny, Settings(dtype="bfloat16"))
    found, half = codes_by_id(tmp_path / "out"), model.astype("bfloat16")
    alone = [codes_alone(half, mimi_jax.load_audio(tmp_path / "data" / name)) for name in found]
    assert (
        np.mean(np.stack(list(found.values())) == np.stack(alone)) > 0.95
    )  # sums are added in another order
    assert read_manifest(tmp_path / "out")["settings"]["dtype"] == "bfloat16"


def test_the_output_may_be_inside_the_input(tmp_path: Path, tiny: Path, model: Mimi):
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


def test_a_shard_that_cannot_be_written_stops_the_job(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
):
    def fail(*_: Any) -> None:
        raise OSError("the disk is full")

    write_folder(tmp_path / "data", [100, 200])
    monkeypatch.setattr(Output, "write", fail)
    with pytest.raises(OSError, match="the disk is full"):
        tokenize([tmp_path / "data"], tmp_path / "out", tiny)


def test_strict_stops_at_the_first_broken_clip(tmp_path: Path, tiny: Path):
    write_folder(tmp_path / "data", [100, 200])
    (tmp_path / "data" / "bad.wav").write_bytes(b"")
    with pytest.raises(ValueError, match=r"data: bad.wav: the file is empty \(0 bytes\)"):
        tokenize([tmp_path / "data"], tmp_path / "out", tiny, strict=True)


def test_a_long_clip_is_encoded_as_a_stream(tmp_path: Path):
    """The clip has three pieces, so workers and device must continue where they were."""
    clips = {"long.wav": noise_clip(65 * RATE), "short.wav": noise_clip(3 * RATE, seed=1)}
    for name, clip in clips.items():
        (tmp_path / name).write_bytes(audio_bytes(clip, subtype="FLOAT"))
    settings = Settings(num_quantizers=8)
    summary = tokenize([tmp_path / "*.wav"], tmp_path / "out", settings=settings, batch_size=8)
    assert summary.total.samples == 68 * RATE
    mini, found = Mimi.from_pretrained("mini", decoder=False), codes_by_id(tmp_path / "out")
    for name, clip in clips.items():
        np.testing.assert_array_equal(found[str(tmp_path / name)], codes_alone(mini, clip, 8))
