"""What is found in folders, patterns, archives and manifests, and what is said of what is broken."""

import json
import os
from pathlib import Path

import pytest

from mimi_jax.tokenization.inputs import Item, find_shards, fingerprint
from tests.tokenization.corpora import audio_bytes, noise_clip, write_folder, write_parquet, write_tar

WAV = audio_bytes(noise_clip(100))


def ids(items: list[Item]) -> list[str]:
    return [item.id for item in items]


def test_a_folder_gives_its_audio_in_shards_sorted(tmp_path: Path):
    write_folder(tmp_path, [100, 200, 300, 400, 500])
    (tmp_path / "notes.txt").write_text("not audio")
    shards = find_shards([tmp_path], clips_per_shard=2)
    assert [ids(list(shard.read())) for shard in shards] == [
        ["speaker 0/clip_000.wav", "speaker 0/clip_001.wav"],
        ["speaker 0/clip_002.wav", "speaker 1/clip_000.wav"],
        ["speaker 1/clip_001.wav"],
    ]
    assert [shard.index for shard in shards] == [0, 1, 2]
    assert {shard.source for shard in shards} == {str(tmp_path)}
    assert sum(shard.num_bytes for shard in shards) == sum(p.stat().st_size for p in tmp_path.rglob("*.wav"))


def test_a_pattern_and_a_file_are_named_by_their_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_folder(tmp_path, [100, 200])
    monkeypatch.chdir(tmp_path)
    (shard,) = find_shards(["*/clip_000.wav"])
    assert ids(list(shard.read())) == ["speaker 0/clip_000.wav", "speaker 1/clip_000.wav"]
    (shard,) = find_shards(["speaker 1/clip_000.wav"])
    assert ids(list(shard.read())) == ["speaker 1/clip_000.wav"]


def test_an_archive_is_a_shard_of_its_audio(tmp_path: Path):
    write_tar(tmp_path / "a.tar", {"1.wav": WAV, "1.json": b"{}", "sub/2.flac": WAV, "1.mp3": WAV})
    write_parquet(tmp_path / "b.parquet", [{"bytes": WAV, "path": "x.wav"}, {"bytes": WAV, "path": None}])
    tar, parquet = find_shards([tmp_path], clips_per_shard=1)
    assert ids(list(tar.read())) == ["1.wav", "sub/2.flac", "1.mp3"]
    assert ids(list(parquet.read())) == ["x.wav", "1"]
    for item in tar.read():
        data = Path(item.path).read_bytes()
        assert item.size is not None
        assert data[item.offset : item.offset + item.size] == WAV


def test_equal_names_in_an_archive_are_told_apart(tmp_path: Path):
    write_parquet(tmp_path / "b.parquet", [{"bytes": WAV, "path": "x.wav"}] * 3)
    (shard,) = find_shards([tmp_path])
    assert ids(list(shard.read())) == ["x.wav", "x.wav#2", "x.wav#3"]


def test_a_manifest_names_stretches(tmp_path: Path):
    (tmp_path / "x.wav").write_bytes(WAV)
    lines = [
        {"path": "x.wav"},
        {"path": "x.wav", "start": 1.5, "end": 2},
        {"path": "x.wav", "id": "mine", "start": 2},
        {"path": "gone.wav"},
    ]
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (shard,) = find_shards([tmp_path / "m.jsonl"])
    items = list(shard.read())
    assert ids(items) == ["x.wav", "x.wav@1.5-2", "mine", "gone.wav"]
    assert [(item.start, item.end) for item in items] == [(0, None), (1.5, 2), (2, None), (0, None)]
    assert items[3].problem == "there is no such file"


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("nonsense", "line 2: must be a JSON object with a path, got b'nonsense"),
        ('{"path": 3}', "line 2: must be a JSON object with a path"),
        ('{"path": "x", "start": "1"}', "line 2: start must be seconds, got '1'"),
        ('{"path": "x", "start": 2, "end": 1}', "line 2: start must lie before end, got 2.0 and 1"),
    ],
)
def test_a_broken_manifest_is_refused_with_its_line(tmp_path: Path, line: str, error: str):
    (tmp_path / "m.jsonl").write_text(f'{{"path": "y.wav"}}\n{line}\n')
    with pytest.raises(ValueError, match=error):
        find_shards([tmp_path / "m.jsonl"])


# Two members of 512 bytes of header and 512 of data each, then blocks of zeros.
@pytest.mark.parametrize(
    ("cut", "good", "reason"),
    [
        (512 + 50, [], "cut short inside this file"),
        (1024, ["1.wav"], "has no end"),
        (1024 + 100, ["1.wav"], "has no end"),
        (1536 + 50, ["1.wav"], "cut short inside this file"),
        (2048, ["1.wav", "2.wav"], "has no end"),
    ],
)
def test_a_tar_that_is_cut_gives_what_is_whole_and_the_damage(
    tmp_path: Path, cut: int, good: list[str], reason: str
):
    write_tar(tmp_path / "a.tar", {"1.wav": WAV, "2.wav": WAV})
    whole = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(whole[:cut])
    (shard,) = find_shards([tmp_path])
    items = list(shard.read())
    assert [item.id for item in items if not item.problem] == good
    assert reason in items[-1].problem


def test_damage_inside_a_tar_is_told(tmp_path: Path):
    write_tar(tmp_path / "a.tar", {"1.wav": WAV, "2.wav": WAV})
    data = bytearray((tmp_path / "a.tar").read_bytes())
    data[1024 : 1024 + 512] = b"x" * 512  # the second header
    (tmp_path / "a.tar").write_bytes(data)
    (shard,) = find_shards([tmp_path])
    first, second = shard.read()
    assert (first.id, first.problem) == ("1.wav", "")
    assert "damaged after byte 1024" in second.problem


def test_rows_without_audio_and_broken_parquet_are_told(tmp_path: Path):
    write_parquet(tmp_path / "a.parquet", [{"bytes": WAV, "path": "x"}, None, {"bytes": None, "path": "no"}])
    (tmp_path / "b.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-20])
    rows, broken = find_shards([tmp_path])
    items = list(rows.read())
    assert ids(items) == ["x", "1", "no"]
    assert [bool(item.problem) for item in items] == [False, True, True]
    assert "neither bytes nor a path" in items[1].problem
    (item,) = broken.read()
    assert "cannot be read from row 0 on" in item.problem


def test_a_parquet_file_of_something_else_is_told(tmp_path: Path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "a.parquet")
    (shard,) = find_shards([tmp_path])
    (item,) = shard.read()
    assert "needs a column audio of {bytes, path}, got text" in item.problem


def test_names_of_any_bytes_can_be_written(tmp_path: Path):
    path = os.path.join(os.fsencode(tmp_path), b"bad\xff name.wav")
    with open(path, "wb") as file:
        file.write(WAV)
    (shard,) = find_shards([tmp_path])
    (item,) = shard.read()
    assert item.id == "bad\\xff name.wav"
    assert os.path.getsize(item.path) == len(WAV)


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("nothing*.wav", "no such folder or file, and no match"),
        ("empty", "has no files to tokenize"),
        ("a.tar.gz", "is a compressed archive"),
    ],
)
def test_sources_that_cannot_be_used_are_refused(tmp_path: Path, name: str, error: str):
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.tar.gz").write_bytes(b"")
    with pytest.raises((ValueError, FileNotFoundError), match=error):
        find_shards([tmp_path / name])


def test_an_archive_that_is_named_twice_is_refused(tmp_path: Path):
    write_tar(tmp_path / "a.tar", {"1.wav": WAV})
    with pytest.raises(ValueError, match="named twice"):
        find_shards([tmp_path, tmp_path / "a.tar"])


def test_the_fingerprint_is_of_the_clips_and_not_of_their_place(tmp_path: Path):
    for name in ("here", "there"):
        write_folder(tmp_path / name, [100, 200])
    here, there = (fingerprint(find_shards([tmp_path / name])) for name in ("here", "there"))
    assert here == there
    assert here != fingerprint(find_shards([tmp_path / "here"], clips_per_shard=1))
    write_folder(tmp_path / "there", [100, 200, 300])
    assert here != fingerprint(find_shards([tmp_path / "there"]))
