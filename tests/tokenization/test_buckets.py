"""Jobs whose inputs and outputs are in a bucket: an S3 server on this machine, and a proxy that fails."""

import json
import random
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from mimi_jax.files import remote
from mimi_jax.tokenization import (
    CodeSource,
    Settings,
    fetching,
    pack,
    read_codes,
    read_manifest,
    tokenize,
)
from mimi_jax.tokenization.output import Output
from mimi_jax.tokenization.records import TokenizedClip
from mimi_jax.tokenization.sources import Item
from mimi_jax.tokenization.workers import Readers, Target, _pieces
from tests.buckets import Proxy, account, proxy, s3_server
from tests.tokenization.corpora import (
    RATE,
    audio_bytes,
    find_shards,
    ids,
    noise_clip,
    read,
    write_parquet,
    write_tar,
)
from tests.tokenization.test_kills import command

SETTINGS = Settings(num_quantizers=3, clips_per_shard=4)


@pytest.fixture(scope="module")
def front() -> Iterator[Proxy]:
    with s3_server() as behind, proxy(behind) as front, account(front.address):
        yield front


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "DELAYS", (0.01,) * 3)


@pytest.fixture(scope="module")
def filesystem(front: Proxy) -> Any:
    return remote.resolve("s3://bucket")[0]


def write_corpus(folder: Path, count: int) -> None:
    """A third of the clips in files, a third in a tar archive, and a third in a Parquet file."""
    clips = {f"{n:03}.wav": audio_bytes(noise_clip(300 + 7 * (n % 50), seed=n)) for n in range(count)}
    names = list(clips)
    (folder / "plain").mkdir(parents=True)
    for name in names[::3]:
        (folder / "plain" / name).write_bytes(clips[name])
    write_tar(folder / "a.tar", {**{name: clips[name] for name in names[1::3]}, "notes.txt": b"words"})
    write_parquet(folder / "b.parquet", [{"bytes": clips[name], "path": name} for name in names[2::3]])


def contents(folder: str | Path) -> dict[str, np.ndarray]:
    """Codes by id, each clip once."""
    clips = list(read_codes(folder))
    found = {clip.id: clip.codes for clip in clips}
    assert len(found) == len(clips)
    return found


def check_same(remote_output: str, local_output: Path) -> None:
    there, here = contents(remote_output), contents(local_output)
    assert list(there) == list(here)
    for name, codes in here.items():
        np.testing.assert_array_equal(there[name], codes, name)


def errors_in(filesystem: Any, folder: str) -> list[dict[str, Any]]:
    return [
        row
        for path in filesystem.find(f"{folder}/errors")
        for row in pq.read_table(path, filesystem=filesystem).to_pylist()
    ]


def test_a_job_in_a_bucket_is_the_local_one(tmp_path: Path, tiny: Path, filesystem: Any):
    write_corpus(tmp_path / "data", 30)
    filesystem.put(f"{tmp_path}/data/", "bucket/same/data/", recursive=True)
    there = tokenize(["s3://bucket/same/data"], "s3://bucket/same/out", tiny, SETTINGS)
    here = tokenize([tmp_path / "data"], tmp_path / "out", tiny, SETTINGS)
    assert there.total == here.total
    assert (there.num_done, there.left_out) == (here.num_done, "1 .txt")
    check_same("s3://bucket/same/out", tmp_path / "out")
    manifests = [read_manifest(folder) for folder in ("s3://bucket/same/out", tmp_path / "out")]
    assert manifests[0] == manifests[1]
    names = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.*")}
    written = {name.removeprefix("bucket/same/out/") for name in filesystem.find("bucket/same/out")}
    assert written == {name for name in names if not name.startswith("work")}
    source = CodeSource("s3://bucket/same/out")
    assert [source[n].id for n in range(len(source))] == list(contents(tmp_path / "out"))
    rows = [
        pack(folder, tmp_path / name, 50)
        for name, folder in (("x", "s3://bucket/same/out"), ("y", tmp_path / "out"))
    ]
    assert rows[0] == rows[1]


def test_the_requests_of_a_finished_job_do_not_grow_with_its_shards(
    tmp_path: Path, tiny: Path, front: Proxy, filesystem: Any
):
    counts = []
    for number in (6, 24):
        (tmp_path / f"{number}").mkdir()
        for clip in range(number):
            (tmp_path / f"{number}" / f"{clip}.wav").write_bytes(audio_bytes(noise_clip(300, seed=clip)))
        for _ in range(2):
            front.requests.clear()
            output = f"s3://bucket/resume/{number}"
            summary = tokenize([tmp_path / f"{number}"], output, tiny, Settings(clips_per_shard=2))
        assert (summary.now.clips, summary.num_done) == (0, number // 2)
        counts.append(dict(front.requests))
    assert counts[0] == counts[1]


def test_every_kind_of_input_may_be_a_url(tmp_path: Path, tiny: Path, filesystem: Any):
    clips = {f"{n}.wav": audio_bytes(noise_clip(500 + n, seed=n)) for n in range(6)}
    for name, data in clips.items():
        filesystem.pipe_file(f"bucket/kinds/audio/{name}", data)
    (tmp_path / "long.wav").write_bytes(audio_bytes(noise_clip(9000)))
    filesystem.put(str(tmp_path / "long.wav"), "bucket/kinds/long.wav")
    entries = [{"path": "audio/1.wav"}, {"path": "long.wav", "start": 0.1, "end": 0.3}]
    entries += [{"path": "s3://bucket/kinds/audio/2.wav", "id": "two"}, {"path": "none.wav"}]
    lines = "".join(json.dumps(entry) + "\n" for entry in entries)
    filesystem.pipe_file("bucket/kinds/m.jsonl", lines.encode())
    write_parquet(tmp_path / "p.parquet", [{"bytes": None, "path": "audio/3.wav"}])
    filesystem.put(str(tmp_path / "p.parquet"), "bucket/kinds/p.parquet")
    sources = [
        "s3://bucket/kinds/audio/0.wav",
        "s3://bucket/kinds/audio/[45].wav",
        "s3://bucket/kinds/m.jsonl",
        "s3://bucket/kinds/p.parquet",
    ]
    summary = tokenize(sources, tmp_path / "out", tiny, SETTINGS)
    found = contents(tmp_path / "out")
    assert list(found) == [
        sources[0],
        "s3://bucket/kinds/audio/4.wav",
        "s3://bucket/kinds/audio/5.wav",
        "audio/1.wav",
        "long.wav@0.1-0.3",
        "two",
        "audio/3.wav",
    ]
    for name, path in zip(list(found)[:3], ("0", "4", "5"), strict=True):
        (tmp_path / "alone.wav").write_bytes(clips[f"{path}.wav"])
        tokenize([tmp_path / "alone.wav"], tmp_path / f"alone{path}", tiny, SETTINGS)
        np.testing.assert_array_equal(next(iter(contents(tmp_path / f"alone{path}").values())), found[name])
    assert (summary.total.errors, summary.total.transient) == (1, 0)


def test_sources_that_overlap_or_are_missing_are_refused(filesystem: Any, tiny: Path, tmp_path: Path):
    filesystem.pipe_file("bucket/twice/a/1.wav", audio_bytes(noise_clip(300)))
    with pytest.raises(ValueError, match=r"1.wav is named twice"):
        find_shards(["s3://bucket/twice", "s3://bucket/twice/a/*.wav"])
    with pytest.raises(FileNotFoundError, match="no folder or file s3://bucket/none, and nothing matches"):
        tokenize(["s3://bucket/none"], tmp_path / "out", tiny)
    assert not (tmp_path / "out").exists()


def test_the_output_in_the_input_is_left_out(filesystem: Any):
    for name in ("a.wav", "out/b.wav", "out2/c.wav"):
        filesystem.pipe_file(f"bucket/inside/{name}", audio_bytes(noise_clip(300)))
    for output in ("s3://bucket/inside/out", "s3a://bucket/inside/out/"):
        (shard,) = find_shards(["s3://bucket/inside/"], without=output)
        assert ids(read(shard)) == ["a.wav", "out2/c.wav"]


@pytest.mark.parametrize(
    "name",
    [
        "plain/000.wav",
        pytest.param("a.tar", marks=pytest.mark.slow),
        pytest.param("b.parquet", marks=pytest.mark.slow),
    ],
)
def test_what_was_lost_on_the_way_is_read_again_in_the_next_run(
    tmp_path: Path, tiny: Path, front: Proxy, filesystem: Any, monkeypatch: pytest.MonkeyPatch, name: str
):
    folder = f"bucket/lost/{name}"
    write_corpus(tmp_path / "data", 12)
    (tmp_path / "data" / "plain" / "damaged.wav").write_bytes(b"RIFF, but no more")
    filesystem.put(f"{tmp_path}/data/", f"{folder}/data/", recursive=True)
    sources, output = [f"s3://{folder}/data"], f"s3://{folder}/out"
    with monkeypatch.context() as patch:
        patch.setattr(front, "broken", f"data/{name}")
        first = tokenize(sources, output, tiny, SETTINGS)
    rows = errors_in(filesystem, f"{folder}/out")
    lost = [row for row in rows if row["is_transient"]]
    assert len(lost) == first.total.transient == 1
    assert name in lost[0]["reason"]
    assert [row["id"] for row in rows if not row["is_transient"]] == ["plain/damaged.wav"]
    second = tokenize(sources, output, tiny, SETTINGS)
    assert (second.total.errors, second.total.transient) == (1, 0)
    assert second.now.clips < second.total.clips == 12
    assert [row["id"] for row in errors_in(filesystem, f"{folder}/out")] == ["plain/damaged.wav"]
    assert tokenize(sources, output, tiny, SETTINGS).now.clips == 0  # the damaged clip is not tried again
    tokenize([tmp_path / "data"], tmp_path / "out", tiny, SETTINGS)
    check_same(output, tmp_path / "out")


def test_an_archive_that_was_stored_incomplete_is_a_lasting_error(
    tmp_path: Path, tiny: Path, filesystem: Any
):
    write_corpus(tmp_path / "data", 12)
    data = (tmp_path / "data" / "a.tar").read_bytes()
    filesystem.pipe_file("bucket/cut/a.tar", data[:900])
    summary = tokenize(["s3://bucket/cut"], "s3://bucket/cut/out", tiny, SETTINGS)
    (row,) = errors_in(filesystem, "bucket/cut/out")
    assert "the archive is cut short" in row["reason"]
    assert (row["is_transient"], summary.total.transient) == (False, 0)


def test_a_bad_name_costs_one_clip(filesystem: Any):
    filesystem.pipe_file("bucket/names/1.wav", audio_bytes(noise_clip(300)))
    lines = '{"path": "nothing://x.wav"}\n{"path": "a::b.wav"}\n{"path": "../names/1.wav"}\n'
    filesystem.pipe_file("bucket/names/m.jsonl", lines.encode())
    (shard,) = find_shards(["s3://bucket/names/m.jsonl"])
    first, second, third = read(shard)
    assert "not a URL that fsspec knows" in first.problem
    assert "rename the file" in second.problem
    assert third.data == audio_bytes(noise_clip(300))
    assert not any(item.is_transient for item in (first, second, third))


def test_errors_of_any_kind_cost_one_clip(filesystem: Any, monkeypatch: pytest.MonkeyPatch):
    for name in "12":
        filesystem.pipe_file(f"bucket/kinds/{name}.wav", audio_bytes(noise_clip(300)))
    filesystem.pipe_file("bucket/kinds/m.jsonl", b'{"path": "1.wav"}\n{"path": "2.wav"}\n')

    def size(path: str) -> int | None:
        if path.endswith("1.wav"):
            raise NotImplementedError("no sizes here")
        return None

    monkeypatch.setattr(fetching, "file_size", size)
    (shard,) = find_shards(["s3://bucket/kinds/m.jsonl"])
    problems = [item.problem for item in read(shard)]
    assert problems == ["NotImplementedError: no sizes here", "its server does not say how large it is"]


def test_large_files_are_left_to_the_workers(filesystem: Any, monkeypatch: pytest.MonkeyPatch):
    filesystem.pipe_file("bucket/large/1.wav", audio_bytes(noise_clip(30_000)))
    filesystem.pipe_file("bucket/large/m.jsonl", b'{"path": "1.wav"}\n')
    monkeypatch.setattr(fetching, "LARGE_FILE", 50_000)
    for source in ("s3://bucket/large", "s3://bucket/large/m.jsonl"):
        (shard,) = find_shards([source])
        (item,) = read(shard)
        assert (item.data, item.size) == (None, 60_044)
    with Readers(Target(RATE, 1, 3600), num_workers=1) as readers:
        piece = readers.open(item).next()
    assert (piece.audio.shape, piece.is_last) == ((1, 30_000), True)


def test_a_large_clip_that_is_replaced_while_it_is_read_is_refused():
    item = Item("1", "memory://replaced.wav")
    filesystem = remote.resolve(item.path)[0]
    filesystem.pipe_file("/replaced.wav", audio_bytes(noise_clip(100 * RATE)))
    pieces = _pieces(item, Target(RATE, 1, 3600))
    next(pieces)
    filesystem.pipe_file("/replaced.wav", audio_bytes(noise_clip(100 * RATE, seed=1)))
    with pytest.raises(ConnectionError, match="was replaced while it was read"):
        list(pieces)


def test_two_processes_write_the_same_bytes(filesystem: Any):
    clips = [TokenizedClip(f"{n}", "s", 1920, np.full((2, 3), n, np.uint16)) for n in range(100)]
    settings = {"num_shards": 1, "sampling_rate": 24_000}
    written = []
    for _ in range(2):
        Output("s3://bucket/both", settings, {}).write(0, clips, [], Counter())
        written.append(filesystem.cat_file("bucket/both/codes/00000-of-00001.parquet"))
    assert written[0] == written[1]


def test_uploads_of_killed_processes_are_aborted_at_the_end(filesystem: Any):
    output = Output("s3://bucket/killed", {"num_shards": 2, "sampling_rate": 24_000}, {})
    for key in ("killed/codes/00000-of-00002.parquet", "killed too/codes/1.parquet"):
        filesystem.call_s3("create_multipart_upload", Bucket="bucket", Key=key)
    for shard in range(2):
        output.write(shard, [], [], Counter())
        output.finish()
        left = [upload["Key"] for upload in filesystem.list_multipart_uploads("bucket")]
        assert ("killed/codes/00000-of-00002.parquet" in left) is (shard == 0)
    assert left == ["killed too/codes/1.parquet"]


def test_a_stale_listing_hides_no_shard_and_brings_none_back(front: Proxy, filesystem: Any):
    output = Output("s3://bucket/stale", {"num_shards": 2, "sampling_rate": 24_000}, {})
    front.listings.clear()
    assert output.start(range(2), retry_errors=False) == set()  # this listing will be served again
    output.write(0, [], [], Counter())
    front.planned = ["stale"]
    assert output.done() == {output.name(0)}
    front.listings.clear()
    assert Output("s3://bucket/stale", output.settings, {}).done() == {output.name(0)}
    filesystem.rm_file("bucket/stale/codes/" + output.name(0))
    filesystem.rm_file("bucket/stale/totals.json")
    later = Output("s3://bucket/stale", output.settings, {})
    front.planned = ["stale"]
    assert later.start(range(2), retry_errors=False) == set()
    front.planned = []


def test_a_folder_with_other_files_is_refused(filesystem: Any, tiny: Path):
    filesystem.pipe_file("bucket/thesis/main.tex", b"precious")
    filesystem.pipe_file("bucket/mine/1.wav", audio_bytes(noise_clip(300)))
    with pytest.raises(
        ValueError, match="s3://bucket/thesis holds files that `mimi-jax tokenize` did not write"
    ):
        tokenize(["s3://bucket/mine"], "s3://bucket/thesis", tiny)


@pytest.mark.slow
def test_200_clips_survive_faults_and_ten_kills(tmp_path: Path, tiny: Path, front: Proxy, filesystem: Any):
    write_corpus(tmp_path / "data", 200)
    filesystem.put(f"{tmp_path}/data/", "bucket/kills/data/", recursive=True)
    line = command(
        "s3://bucket/kills/data", "s3://bucket/kills/out", "--clips-per-shard", "5", "--model", str(tiny)
    )
    generator, reached = random.Random(0), 0
    front.share = 0.05
    for _ in range(10):
        before = front.requests["PUT"]
        process = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and front.requests["PUT"] <= before + generator.randrange(4):
            time.sleep(0.01)
        time.sleep(generator.uniform(0, 0.1))
        reached += process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait()
    subprocess.run(line, check=True, stdout=subprocess.DEVNULL)
    front.share = 0
    assert reached >= 8
    assert front.faults.keys() == {"delay", "cut", "truncate", "refuse", "stale"}
    tokenize([tmp_path / "data"], tmp_path / "out", tiny, Settings(clips_per_shard=5))
    assert len(contents(tmp_path / "out")) == 200
    check_same("s3://bucket/kills/out", tmp_path / "out")
    assert read_manifest("s3://bucket/kills/out") == read_manifest(tmp_path / "out")
    names = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.*")}
    written = {name.removeprefix("bucket/kills/out/") for name in filesystem.find("bucket/kills/out")}
    assert written == {name for name in names if not name.startswith("work")}
    assert [u for u in filesystem.list_multipart_uploads("bucket") if u["Key"].startswith("kills/")] == []
