"""Files appear whole or not at all, a claim ends with its process, and totals add up."""

import json
import multiprocessing
import os
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from mimi_jax.tokenization import records
from mimi_jax.tokenization.dataset import read_codes, read_manifest
from mimi_jax.tokenization.output import ROW_GROUP, Output
from mimi_jax.tokenization.records import Failure, TokenizedClip, Totals

SETTINGS = {"num_shards": 3, "sampling_rate": 24_000, "num_quantizers": 2, "dtype": "float32"}


def row(number: int, frames: int = 3) -> TokenizedClip:
    codes = np.arange(2 * frames, dtype=np.uint16).reshape(2, frames) + number
    return TokenizedClip(f"clip {number}", "source", 1920 * frames - 5, codes)


def open_output(folder: Path, **changes: Any) -> Output:
    return Output(folder, {**SETTINGS, **changes}, {"model_type": "mimi"})


def test_many_long_clips_are_written_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Arrow counts the codes of a piece in 32 bits."""
    monkeypatch.setattr(records, "MOST_CODES", 50)
    output, rows = open_output(tmp_path / "out"), [row(number, 4) for number in range(20)]
    output.write(1, rows, [Failure("bad", "source", "no file s3://b/\ud800.wav")], Counter())
    found = list(read_codes(tmp_path / "out"))
    assert [clip.id for clip in found] == [clip.id for clip in rows]
    for clip, wanted in zip(found, rows, strict=True):
        np.testing.assert_array_equal(clip.codes, wanted.codes)


def test_a_shard_has_the_documented_columns(tmp_path: Path):
    output = open_output(tmp_path / "out")
    rows = [row(number, frames=number % 4 + 1) for number in range(150)]
    failures = [Failure("bad", "source", "damaged"), Failure("far", "source", "lost", is_transient=True)]
    totals = output.write(1, rows, failures, Counter())
    samples, frames = sum(r.num_samples for r in rows), sum(r.codes.shape[1] for r in rows)
    assert totals == Totals(150, 2, samples, frames, transient=1)
    table = pq.read_table(tmp_path / "out" / "codes" / "00001-of-00003.parquet")
    assert [(field.name, str(field.type)) for field in table.schema] == [
        ("id", "string"),
        ("source", "string"),
        ("num_samples", "int64"),
        ("num_frames", "int32"),
        ("num_quantizers", "int32"),
        ("codes", "list<element: uint16>"),
    ]
    first = table.slice(2, 1).to_pylist()[0]
    assert first == {
        "id": "clip 2",
        "source": "source",
        "num_samples": 3 * 1920 - 5,
        "num_frames": 3,
        "num_quantizers": 2,
        "codes": [2, 3, 4, 5, 6, 7],  # row-major
    }
    metadata = pq.read_metadata(tmp_path / "out" / "codes" / "00001-of-00003.parquet")
    assert metadata.num_row_groups == -(-150 // ROW_GROUP)
    assert metadata.row_group(0).column(5).compression == "ZSTD"
    for clip, expected in zip(read_codes(tmp_path / "out"), rows, strict=True):
        assert clip[:3] == expected[:3]
        np.testing.assert_array_equal(clip.codes, expected.codes)
    errors = pq.read_table(tmp_path / "out" / "errors" / "00001-of-00003.parquet").to_pylist()
    assert errors == [failure._asdict() for failure in failures]


def test_the_manifest_describes_the_codes_and_counts_them(tmp_path: Path):
    output = open_output(tmp_path / "out")
    manifest = read_manifest(tmp_path / "out")
    assert (manifest["complete"], manifest["totals"]["clips"]) == (False, 0)
    assert manifest["settings"] == SETTINGS
    assert manifest["config"] == {"model_type": "mimi"}
    assert {"jax", "mimi_jax", "pyarrow"} <= manifest["libraries"].keys()
    output.write(0, [row(0), row(1)], [], Counter({".txt": 2}))
    output.write(2, [], [Failure("a", "b", "c")], Counter({".txt": 1, ".json": 5}))
    left_out = {".txt": 3, ".json": 5}
    assert output.finish() == (Totals(2, 1, 2 * (1920 * 3 - 5), 6, Counter(left_out)), 2)
    assert read_manifest(tmp_path / "out")["complete"] is False
    output.write(1, [], [], Counter())
    output.finish()
    manifest = read_manifest(tmp_path / "out")
    assert manifest["complete"] is True
    counts = {"clips": 2, "errors": 1, "samples": 11510, "frames": 6}
    assert manifest["totals"] == {**counts, "left_out": left_out, "transient": 0, "hours": 0.0001}


def test_totals_of_older_outputs_are_read():
    assert Totals.from_json("[1, 2, 3, 4]") == Totals(1, 2, 3, 4, Counter())


def test_other_settings_are_refused_with_both_values(tmp_path: Path):
    open_output(tmp_path / "out")
    with pytest.raises(ValueError, match="num_quantizers was 2 and is 4; dtype was 'float32' and is 'bf"):
        open_output(tmp_path / "out", num_quantizers=4, dtype="bfloat16")


def test_a_folder_with_another_kind_of_manifest_is_refused(tmp_path: Path):
    for text in ('{"name": "my app"}', "no JSON", "[]"):
        (tmp_path / "manifest.json").write_text(text)
        with pytest.raises(ValueError, match="holds files that `mimi-jax tokenize` did not write"):
            open_output(tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]


def test_file_names_sort_as_the_numbers_of_shards_do(tmp_path: Path):
    output = open_output(tmp_path / "out", num_shards=1_000_000)
    names = [output.name(shard) for shard in (9, 99_999, 100_000, 999_999)]
    assert names == sorted(names)
    assert names[0] == "0000009-of-1000000.parquet"


def test_a_folder_with_other_files_is_refused(tmp_path: Path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(ValueError, match="holds files that `mimi-jax tokenize` did not write"):
        open_output(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_hidden_files_are_no_files_of_a_job(tmp_path: Path):
    output = open_output(tmp_path)
    output.write(1, [row(1)], [], Counter())
    (tmp_path / ".DS_Store").write_bytes(b"any")
    (tmp_path / "codes" / "._00000-of-00003.parquet").write_bytes(b"any")
    assert open_output(tmp_path).done() == {"00001-of-00003.parquet"}


def test_a_write_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    output = open_output(tmp_path / "out")

    def fail(*_: Any) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="the disk is full"):
        output.write(0, [row(0)], [], Counter())
    assert list((tmp_path / "out").rglob("*.parquet")) == []


def test_the_manifest_counts_a_shard_that_is_written_during_the_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Where files cannot be locked, another process may even count it and write its manifest first."""
    output = open_output(tmp_path / "out", num_shards=2)
    output.write(0, [row(0)], [], Counter())
    write_manifest = output._write_manifest

    def write_late(totals: Totals, num_done: int) -> None:
        if not output.is_done(1):
            output.write(1, [row(1)], [], Counter())
        write_manifest(totals, num_done)

    monkeypatch.setattr(output, "_write_manifest", write_late)
    totals, num_done = output.finish()
    assert (totals.clips, num_done) == (2, 2)
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["totals"]["clips"] == 2


def test_a_shard_that_is_done_again_has_only_its_new_errors(tmp_path: Path):
    output = open_output(tmp_path / "out")
    output.write(0, [], [Failure("a", "b", "c")], Counter())
    output.write(0, [row(0)], [], Counter())
    assert list((tmp_path / "out" / "errors").iterdir()) == []


def test_only_one_process_at_a_time_can_claim_a_shard(tmp_path: Path):
    first, second = (open_output(tmp_path / "out") for _ in range(2))
    with first.claim(0) as mine, second.claim(0) as other, second.claim(1) as next_one:
        assert (mine, other, next_one) == (True, False, True)
    with second.claim(0) as now:
        assert now
    first.write(0, [row(0)], [], Counter())
    with second.claim(0) as done:
        assert not done


def _claim_and_wait(folder: Path, claimed: Any) -> None:
    with open_output(folder).claim(0):
        (folder / "work" / "123-00000-of-00003.parquet").write_bytes(b"half a file")
        claimed.set()
        signal.pause()


def test_the_claim_and_the_files_of_a_killed_process_are_freed(tmp_path: Path):
    output = open_output(tmp_path / "out")
    context = multiprocessing.get_context("spawn")
    claimed = context.Event()
    process = context.Process(target=_claim_and_wait, args=(tmp_path / "out", claimed))
    process.start()
    assert claimed.wait(60)
    with output.claim(0) as mine:
        assert not mine
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    with output.claim(0, wait=True) as mine:
        assert mine
    output.write(0, [row(0)], [], Counter())
    output.finish()
    leftover = tmp_path / "out" / "work" / "123-00000-of-00003.parquet"
    assert leftover.exists()  # another process may still be writing it
    for shard in (1, 2):
        output.write(shard, [], [], Counter())
    output.finish()
    assert not leftover.exists()


def test_each_file_holds_the_settings(tmp_path: Path):
    open_output(tmp_path / "out").write(0, [row(0)], [], Counter())
    metadata = pq.read_schema(tmp_path / "out" / "codes" / "00000-of-00003.parquet").metadata
    assert json.loads(metadata[b"settings"]) == SETTINGS


def test_only_the_totals_of_new_shards_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    output = open_output(tmp_path / "out")
    names = []
    read_totals = output._totals
    monkeypatch.setattr(output, "_totals", lambda name: names.append(name) or read_totals(name))
    output.write(0, [row(0)], [], Counter({".txt": 2}))
    assert output.finish() == output.finish()
    output.write(2, [row(0)], [Failure("a", "b", "c")], Counter())
    for _ in range(2):
        assert output.finish() == (Totals(2, 1, 2 * (1920 * 3 - 5), 6, Counter({".txt": 2})), 2)
    assert names == []  # this run wrote them all
    later = open_output(tmp_path / "out")
    monkeypatch.setattr(later, "_totals", lambda name: names.append(name) or read_totals(name))
    open_output(tmp_path / "out").write(1, [], [], Counter())
    for _ in range(2):
        assert later.finish() == (Totals(2, 1, 2 * (1920 * 3 - 5), 6, Counter({".txt": 2})), 3)
    assert names == [output.name(1)]
    kept = json.loads((tmp_path / "out" / "totals.json").read_text())
    zero, two = [1, 0, 5755, 3, {".txt": 2}, 0], [1, 1, 5755, 3, {}, 0]
    assert kept == {output.name(0): zero, output.name(1): [0, 0, 0, 0, {}, 0], output.name(2): two}


@pytest.mark.parametrize("retry_errors", [True, False])
def test_a_shard_that_is_done_again_is_counted_again(tmp_path: Path, retry_errors: bool):
    output = open_output(tmp_path / "out")
    for shard in range(2):
        output.write(shard, [row(0)], [Failure("a", "b", "c")], Counter())
    output.finish()
    if not retry_errors:
        (tmp_path / "out" / "codes" / output.name(1)).unlink()
    assert output.start([1], retry_errors) == {output.name(0)}
    assert (tmp_path / "out" / "errors" / output.name(0)).exists()
    assert (tmp_path / "out" / "errors" / output.name(1)).exists() is not retry_errors
    output.write(1, [row(0), row(1)], [], Counter())
    totals, num_done = output.finish()
    assert (totals.clips, totals.errors, num_done) == (3, 1, 2)


def test_files_that_are_no_shards_of_the_job_are_not_counted(tmp_path: Path):
    output = open_output(tmp_path / "out")
    for name in (".DS_Store", "00000-of-00004.parquet", "part.parquet"):
        (tmp_path / "out" / "codes" / name).write_bytes(b"")
    assert output.finish() == (Totals(), 0)
