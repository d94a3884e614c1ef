"""One process lists the clips, and all take theirs from the plan that it writes."""

import json
import os
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from mimi_jax.tokenization import Settings, inputs, job, plan, tokenize
from mimi_jax.tokenization.inputs import find_shards
from mimi_jax.tokenization.output import planning
from mimi_jax.tokenization.plan import Plan, make_plan
from tests.tokenization.corpora import (
    audio_bytes,
    ids,
    noise_clip,
    read,
    write_folder,
    write_parquet,
    write_tar,
)

WAV = audio_bytes(noise_clip(100))


def write_manifest(path: Path, lines: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_a_large_shard_is_one_row_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_folder(tmp_path, [100, 200])
    count = 2**20 + 1  # clips; pyarrow would begin a second group
    table = plan._table

    def larger(items: Any) -> Any:
        return (
            pa.concat_tables([table(items)] * count).combine_chunks()
            if items[0].id in first
            else table(items)
        )

    first = [item.id for item in next(find_shards([tmp_path], clips_per_shard=1)).items or ()]
    monkeypatch.setattr(plan, "_table", larger)
    shards = make_plan([tmp_path], clips_per_shard=1).shards
    assert [item.id for item in shards[1].items or ()] == ["speaker 1/clip_000.wav"]


def test_a_plan_has_all_that_was_listed(tmp_path: Path):
    data = tmp_path / "data"
    write_folder(data, [100, 200, 300])
    with open(os.path.join(os.fsencode(data), b"bad\xff name.wav"), "wb") as file:
        file.write(WAV)
    (data / "speech.m4a").write_bytes(b"1")
    (data / "gone.wav").symlink_to(data / "nowhere.wav")
    (data / "notes.txt").write_text("words")
    write_tar(data / "a.tar", {"1.wav": WAV, "1.txt": b""})
    write_parquet(data / "b.parquet", [{"bytes": WAV, "path": "x.wav"}])
    lines = [{"path": "\ud800.wav"}, {"path": "data/speech.m4a", "end": 2}]
    write_manifest(
        tmp_path / "m.jsonl", [{"path": "x", "start": 0.1, "end": 0.7}, {"path": "x", "start": 3}, *lines]
    )
    (tmp_path / "x").write_bytes(WAV)
    sources = [data, tmp_path / "m.jsonl"]
    listed = list(find_shards(sources, clips_per_shard=2))
    plan = Plan(make_plan(sources, clips_per_shard=2).data)
    assert plan.sources == [str(source) for source in sources]
    assert len(plan.shards) == len(listed) == 7
    for shard, expected in zip(plan.shards, listed, strict=True):
        assert shard._replace(items=None) == expected._replace(items=None)
        assert (shard.items is None) == (expected.items is None)
        counts, expected_counts = Counter[str](), Counter[str]()
        assert list(shard.read(counts)) == list(expected.read(expected_counts))
        assert counts == expected_counts
    assert plan.shards[0].left_out == {".txt": 1}


def test_a_folder_without_files_of_their_own_has_a_plan_too(tmp_path: Path):
    write_tar(tmp_path / "a.tar", {"1.wav": WAV, "2.wav": WAV})
    (shard,) = make_plan([tmp_path]).shards
    assert ids(read(shard)) == ["1.wav", "2.wav"]


def test_only_the_clips_of_one_shard_are_in_memory_while_they_are_listed(tmp_path: Path):
    write_manifest(tmp_path / "m.jsonl", [{"path": "a"}] * 2 + [{"path": 1}])
    shards = find_shards([tmp_path / "m.jsonl"], clips_per_shard=2)
    assert ids(read(next(shards))) == ["a", "a#2"]
    with pytest.raises(ValueError, match=r"m.jsonl, line 3: must be a JSON object with a path"):
        next(shards)


def test_ids_are_distinct_among_very_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Only their hashes are kept, most of them in sorted arrays."""
    monkeypatch.setattr(inputs, "NEWEST", 8)
    names = [f"clip {number * number % 97}" for number in range(500)]
    write_manifest(tmp_path / "m.jsonl", [{"path": "x", "id": name} for name in names])
    (shard,) = make_plan([tmp_path / "m.jsonl"]).shards
    seen = Counter[str]()
    for name, found in zip(names, ids(read(shard)), strict=True):
        seen[name] += 1
        assert found == (name if seen[name] == 1 else f"{name}#{seen[name]}")


def test_a_file_in_a_folder_that_was_named_is_named_twice(tmp_path: Path):
    write_folder(tmp_path / "a", [100])
    write_manifest(tmp_path / "a" / "m.jsonl", [{"path": "speaker 0/clip_000.wav"}])
    inside = tmp_path / "a" / "speaker 0"
    for sources in ([tmp_path / "a", inside], [inside, tmp_path / "a"], [inside / "*", tmp_path / "a"]):
        with pytest.raises(ValueError, match=r"clip_000\.wav is named twice"):
            make_plan(sources)
    # No manifest is found in a folder, so that one may be named beside the folder.
    assert len(make_plan([tmp_path / "a", tmp_path / "a" / "m.jsonl"]).shards) == 2


def test_one_process_lists_while_the_others_wait(tmp_path: Path):
    found: list[bytes | None] = []

    def start() -> None:
        with planning(tmp_path / "out", is_first=False) as data:
            found.append(data)
            if data is None:
                time.sleep(0.1)
                (tmp_path / "out" / "plan.parquet").write_bytes(b"the plan")

    threads = [threading.Thread(target=start) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [None, *[b"the plan"] * 3]
    with planning(tmp_path / "out", is_first=True), planning(tmp_path / "out", is_first=False) as data:
        assert data == b"the plan"


def test_only_the_first_process_lists_again(tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch):
    lists: list[int] = []

    def counted(*args: Any) -> Plan:
        lists.append(index)
        return make_plan(*args)

    monkeypatch.setattr(job, "make_plan", counted)
    write_folder(tmp_path / "data", [100, 200, 300])
    arguments = [tmp_path / "data"], tmp_path / "out", tiny, Settings(clips_per_shard=1)
    for index in (2, 1, 0):
        assert len(job.plan(*arguments, is_first=index == 0).shards) == 3
    assert lists == [2, 0]
    write_folder(tmp_path / "data", [100, 200, 300, 400])
    with pytest.raises(ValueError, match="inputs was"):
        job.plan(*arguments, is_first=True)
    assert len(job.plan(*arguments, is_first=False).shards) == 3
    assert lists == [2, 0, 0]


def test_a_process_that_finds_the_inputs_elsewhere_lists_them(tmp_path: Path, tiny: Path):
    """Each host may have mounted them in another place. Other inputs are refused."""
    options: dict[str, Any] = {"settings": Settings(clips_per_shard=1), "process_count": 2}
    for name in ("here", "there"):
        write_folder(tmp_path / name, [100, 200])
    tokenize([tmp_path / "here"], tmp_path / "out", tiny, process_index=0, **options)
    for path in (tmp_path / "here").rglob("*.wav"):
        path.unlink()
    summary = tokenize([tmp_path / "there"], tmp_path / "out", tiny, process_index=1, **options)
    assert (summary.total.clips, summary.total.errors) == (2, 0)
    write_folder(tmp_path / "other", [100, 200, 300])
    with pytest.raises(ValueError, match="inputs was"):
        tokenize([tmp_path / "other"], tmp_path / "out", tiny, process_index=1, **options)


def test_a_job_that_was_begun_without_a_plan_is_continued(tmp_path: Path, tiny: Path):
    write_folder(tmp_path / "data", [100, 200])
    tokenize([tmp_path / "data"], tmp_path / "out", tiny)
    for name in ("plan.parquet", "totals.json"):
        (tmp_path / "out" / name).unlink()
    summary = tokenize([tmp_path / "data"], tmp_path / "out", tiny)
    assert (summary.now.clips, summary.total.clips) == (0, 2)
    assert Plan((tmp_path / "out" / "plan.parquet").read_bytes()).shards


def test_a_missing_source_is_found_before_the_output_is_created(tmp_path: Path, tiny: Path):
    with pytest.raises(FileNotFoundError, match="there is no folder or file"):
        tokenize([tmp_path / "data"], tmp_path / "out", tiny)
    assert not (tmp_path / "out").exists()
