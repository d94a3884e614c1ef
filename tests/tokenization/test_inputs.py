"""Clips are found in folders, patterns, archives and manifests, and damage is reported."""

import json
import os
import tarfile
from pathlib import Path

import pytest

from mimi_jax.tokenization.inputs import find_shards, fingerprint
from mimi_jax.tokenization.sources import Item
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


def test_a_manifest_can_name_stretches_of_files(tmp_path: Path):
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


# Two members of 512 bytes of header and 512 of data each, then blocks of zeros.
@pytest.mark.parametrize(
    ("cut", "good", "reason"),
    [
        (512 + 50, [], "cut short inside this file"),
        (1024, ["1.wav"], "has no end mark"),
        (1024 + 100, ["1.wav"], "has no end mark"),
        (1536 + 50, ["1.wav"], "cut short inside this file"),
        (2048, ["1.wav", "2.wav"], "has no end mark"),
    ],
)
def test_a_tar_cut_short_gives_its_whole_clips_and_the_damage(
    tmp_path: Path, cut: int, good: list[str], reason: str
):
    write_tar(tmp_path / "a.tar", {"1.wav": WAV, "2.wav": WAV})
    whole = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(whole[:cut])
    (shard,) = find_shards([tmp_path])
    items = list(shard.read())
    assert [item.id for item in items if not item.problem] == good
    assert reason in items[-1].problem


def test_damage_inside_a_tar_is_reported(tmp_path: Path):
    write_tar(tmp_path / "a.tar", {"1.wav": WAV, "2.wav": WAV})
    data = bytearray((tmp_path / "a.tar").read_bytes())
    data[1024 : 1024 + 512] = b"x" * 512  # the second header
    (tmp_path / "a.tar").write_bytes(data)
    (shard,) = find_shards([tmp_path])
    first, second = shard.read()
    assert (first.id, first.problem) == ("1.wav", "")
    assert "damaged after byte 1024" in second.problem


def test_rows_without_audio_and_broken_parquet_are_reported(tmp_path: Path):
    write_parquet(tmp_path / "a.parquet", [{"bytes": WAV, "path": "x"}, None, {"bytes": None, "path": "no"}])
    (tmp_path / "b.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-20])
    rows, broken = find_shards([tmp_path])
    items = list(rows.read())
    assert ids(items) == ["x", "1", "no"]
    assert [bool(item.problem) for item in items] == [False, True, True]
    assert "neither bytes nor the path" in items[1].problem
    (item,) = broken.read()
    assert "cannot be read from row 0 on" in item.problem


def test_a_parquet_file_without_audio_is_reported(tmp_path: Path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "a.parquet")
    (shard,) = find_shards([tmp_path])
    (item,) = shard.read()
    assert "needs a column audio of {bytes, path}, got text" in item.problem


def test_names_of_any_bytes_give_printable_ids(tmp_path: Path):
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
        ("nothing*.wav", "there is no folder or file .*nothing.*, and nothing matches it"),
        ("empty", "has nothing to tokenize"),
        ("empty.jsonl", "has nothing to tokenize"),
        ("a.tar.gz", "is a compressed archive"),
    ],
)
def test_sources_that_cannot_be_used_are_refused(tmp_path: Path, name: str, error: str):
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.tar.gz").write_bytes(b"")
    (tmp_path / "empty.jsonl").write_bytes(b"\n")
    with pytest.raises((ValueError, FileNotFoundError), match=error):
        find_shards([tmp_path / name])


def test_a_compressed_archive_in_a_folder_is_refused(tmp_path: Path):
    (tmp_path / "x.wav").write_bytes(WAV)
    (tmp_path / "a.tar.gz").write_bytes(b"")
    with pytest.raises(ValueError, match="is a compressed archive"):
        find_shards([tmp_path])


@pytest.mark.parametrize("second", [".", "a.tar", "x.wav", "*.wav", "sub", "sub/y.wav"])
def test_a_file_that_is_named_twice_is_refused(tmp_path: Path, second: str):
    write_tar(tmp_path / "a.tar", {"1.wav": WAV})
    (tmp_path / "sub").mkdir()
    for name in ("x.wav", "sub/y.wav"):
        (tmp_path / name).write_bytes(WAV)
    with pytest.raises(ValueError, match="is named twice; name each input once"):
        find_shards([tmp_path, tmp_path / second])


def test_the_output_is_not_an_input(tmp_path: Path):
    write_parquet(tmp_path / "tokens" / "codes" / "a.parquet", [{"bytes": WAV, "path": "x"}])
    (tmp_path / "x.wav").write_bytes(WAV)
    (shard,) = find_shards([tmp_path], without=tmp_path / "tokens")
    assert ids(list(shard.read())) == ["x.wav"]


def test_links_are_followed_but_not_in_circles(tmp_path: Path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "x.wav").write_bytes(WAV)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "data")
    (shard,) = find_shards([tmp_path / "data"])
    assert ids(list(shard.read())) == ["linked/x.wav"]


def test_a_pattern_may_match_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_folder(tmp_path, [100, 200])
    monkeypatch.chdir(tmp_path)
    (shard,) = find_shards(["speaker*"])
    assert ids(list(shard.read())) == ["speaker 0/clip_000.wav", "speaker 1/clip_000.wav"]


def test_pipes_and_broken_links_are_reported(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe.wav")
    (tmp_path / "gone.wav").symlink_to(tmp_path / "nowhere.wav")
    (shard,) = find_shards([tmp_path])
    assert all("it is not a file, or it is a link" in item.problem for item in shard.read())
    assert len(list(shard.read())) == 2


def test_links_in_a_tar_are_reported(tmp_path: Path):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name, kind in (("hard.wav", tarfile.LNKTYPE), ("soft.wav", tarfile.SYMTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "1.wav"
            archive.addfile(member)
    (shard,) = find_shards([tmp_path])
    assert [(item.id, "a link inside the archive" in item.problem) for item in shard.read()] == [
        ("hard.wav", True),
        ("soft.wav", True),
    ]


def test_a_second_archive_after_the_first_is_reported(tmp_path: Path):
    write_tar(tmp_path / "a.tar", {"1.wav": WAV})
    data = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(data + data)
    (shard,) = find_shards([tmp_path])
    first, second = shard.read()
    assert (first.id, first.problem) == ("1.wav", "")
    assert "such as a second archive" in second.problem


def test_a_negative_size_in_a_tar_does_not_loop_for_ever(tmp_path: Path):
    header = bytearray(tarfile.TarInfo("2.wav").tobuf())
    header[124:136] = b"\xff" * 10 + b"\xf0\x00"  # -4096 in base 256
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    write_tar(tmp_path / "a.tar", {"1.wav": WAV})
    data = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(data[:1024] + bytes(header) + data[1024:])
    (shard,) = find_shards([tmp_path])
    first, second = list(shard.read())
    assert (first.id, first.problem) == ("1.wav", "")
    assert "cannot be read after byte 1024" in second.problem


def test_ids_of_a_manifest_are_printable(tmp_path: Path):
    lines = [{"path": "x.wav", "id": None}, {"path": "x.wav", "id": 0}, {"path": "bad\udcff.wav"}]
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "x.wav").write_bytes(WAV)
    (shard,) = find_shards([tmp_path / "m.jsonl"])
    assert ids(list(shard.read())) == ["x.wav", "0", "bad\\udcff.wav"]


def test_ids_are_distinct_across_shards_and_beside_names_like_them(tmp_path: Path):
    lines = [{"path": "x.wav", "id": name} for name in ("a", "a#2", "a", "a")]
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "x.wav").write_bytes(WAV)
    shards = find_shards([tmp_path / "m.jsonl"], clips_per_shard=1)
    assert [ids(list(shard.read())) for shard in shards] == [["a"], ["a#2"], ["a#3"], ["a#4"]]


def test_the_fingerprint_depends_on_the_clips_and_not_on_their_folder(tmp_path: Path):
    for name in ("here", "there"):
        write_folder(tmp_path / name, [100, 200])
    here, there = (fingerprint(find_shards([tmp_path / name])) for name in ("here", "there"))
    assert here == there
    assert here != fingerprint(find_shards([tmp_path / "here"], clips_per_shard=1))
    write_folder(tmp_path / "there", [100, 200, 300])
    assert here != fingerprint(find_shards([tmp_path / "there"]))
