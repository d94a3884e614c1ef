"""Clips are found in folders and patterns, divided into shards, and what is left out is counted."""

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from mimi_jax.files.corpus import AUDIO_SUFFIXES
from mimi_jax.tokenization import inputs
from mimi_jax.tokenization.inputs import in_words
from mimi_jax.tokenization.plan import make_plan
from mimi_jax.tokenization.sources import Item
from tests.tokenization.corpora import (
    audio_bytes,
    find_shards,
    ids,
    noise_clip,
    read,
    write_folder,
    write_parquet,
    write_tar,
)

WAV = audio_bytes(noise_clip(100))


def test_a_folder_gives_its_audio_in_shards_sorted(tmp_path: Path):
    write_folder(tmp_path, [100, 200, 300, 400, 500])
    (tmp_path / "notes.txt").write_text("not audio")
    shards = find_shards([tmp_path], clips_per_shard=2)
    assert [ids(read(shard)) for shard in shards] == [
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
    assert ids(read(shard)) == ["speaker 0/clip_000.wav", "speaker 1/clip_000.wav"]
    (shard,) = find_shards(["speaker 1/clip_000.wav"])
    assert ids(read(shard)) == ["speaker 1/clip_000.wav"]


def test_equal_names_in_an_archive_are_told_apart(tmp_path: Path):
    write_parquet(tmp_path / "b.parquet", [{"bytes": WAV, "path": "x.wav"}] * 3)
    (shard,) = find_shards([tmp_path])
    assert ids(read(shard)) == ["x.wav", "x.wav#2", "x.wav#3"]


def test_names_of_any_bytes_give_printable_ids(tmp_path: Path):
    path = os.path.join(os.fsencode(tmp_path), b"bad\xff name.wav")
    with open(path, "wb") as file:
        file.write(WAV)
    (shard,) = find_shards([tmp_path])
    (item,) = read(shard)
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
    assert ids(read(shard)) == ["x.wav"]


def test_links_are_followed_but_not_in_circles(tmp_path: Path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "x.wav").write_bytes(WAV)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "data")
    (shard,) = find_shards([tmp_path / "data"])
    assert ids(read(shard)) == ["linked/x.wav"]


def test_a_pattern_may_match_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_folder(tmp_path, [100, 200])
    monkeypatch.chdir(tmp_path)
    (shard,) = find_shards(["speaker*"])
    assert ids(read(shard)) == ["speaker 0/clip_000.wav", "speaker 1/clip_000.wav"]


def test_a_pattern_leaves_out_the_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    write_parquet(tmp_path / "a.parquet", [{"bytes": WAV, "path": "x.wav"}])
    (tmp_path / "tokens" / "codes").mkdir(parents=True)
    (tmp_path / "tokens" / "codes" / "1.parquet").write_bytes(b"codes")
    (tmp_path / "link").symlink_to("tokens")
    (shard,) = find_shards(["**/*.parquet"], without="link")
    assert shard.source == "a.parquet"


def test_a_pattern_may_match_a_folder_and_what_is_deep_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "84" / "121").mkdir(parents=True)
    (tmp_path / "84" / "121" / "84-1.wav").write_bytes(WAV)
    (shard,) = find_shards(["**/84*"])
    assert ids(read(shard)) == ["84/121/84-1.wav"]


def test_a_pattern_may_match_a_file_in_several_ways(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data" / "en" / "x" / "en").mkdir(parents=True)
    (tmp_path / "data" / "en" / "x" / "en" / "a.wav").write_bytes(WAV)
    (shard,) = find_shards(["data/**/en/**/*.wav"])
    assert ids(read(shard)) == ["data/en/x/en/a.wav"]


def test_many_equal_names_take_one_attempt_each(monkeypatch: pytest.MonkeyPatch):
    attempts, add = [], inputs._Hashes.add
    monkeypatch.setattr(inputs._Hashes, "add", lambda self, name: attempts.append(name) or add(self, name))
    names = ids(list(inputs._distinct(Item("x") for _ in range(100))))
    assert names == ["x", *(f"x#{number}" for number in range(2, 101))]
    assert len(attempts) == 1 + 2 * 99


@pytest.mark.parametrize("pattern", ["**", "data/**", "dat*/**"])
def test_a_pattern_may_match_a_folder_and_what_is_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pattern: str
):
    write_folder(tmp_path / "data", [100, 200, 300])
    (tmp_path / "data" / "speaker 0" / "x.txt").write_text("no audio")
    monkeypatch.chdir(tmp_path)
    assert left_out(Path(pattern)) == [{".txt": 1}]
    (shard,) = find_shards([pattern])
    assert ids(read(shard)) == [
        f"data/speaker {name}.wav" for name in ("0/clip_000", "0/clip_001", "1/clip_000")
    ]


def test_pipes_and_broken_links_are_reported(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe.wav")
    (tmp_path / "gone.wav").symlink_to(tmp_path / "nowhere.wav")
    (shard,) = find_shards([tmp_path])
    assert all("it is not a file, or it is a link" in item.problem for item in read(shard))
    assert len(read(shard)) == 2


def test_ids_are_distinct_across_shards_and_beside_names_like_them(tmp_path: Path):
    lines = [{"path": "x.wav", "id": name} for name in ("a", "a#2", "a", "a")]
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "x.wav").write_bytes(WAV)
    shards = find_shards([tmp_path / "m.jsonl"], clips_per_shard=1)
    assert [ids(read(shard)) for shard in shards] == [["a"], ["a#2"], ["a#3"], ["a#4"]]


def test_the_fingerprint_depends_on_the_clips_and_not_on_their_folder(tmp_path: Path):
    for name in ("here", "there"):
        write_folder(tmp_path / name, [100, 200])
    here, there = (make_plan([tmp_path / name]).fingerprint for name in ("here", "there"))
    assert here == there
    assert here != make_plan([tmp_path / "here"], clips_per_shard=1).fingerprint
    write_folder(tmp_path / "there", [100, 200, 300])
    assert here != make_plan([tmp_path / "there"]).fingerprint


def left_out(*sources: Path, **options: Any) -> list[dict[str, int]]:
    """What each shard counts as left out."""
    counts = []
    for shard in find_shards(list(sources), **options):
        counts.append(Counter())
        list(shard.read(counts[-1]))
    return counts


def test_files_that_are_no_clips_are_counted_by_suffix(tmp_path: Path):
    names = ["a.txt", "b.TXT", "c.json", "d.jsonl", "README", ".hidden", "x.001", "x.7z", "sub/y.wav.gz"]
    write_folder(tmp_path, [100, 200, 300])
    write_tar(tmp_path / "b.tar", {"1.wav": WAV, "1.json": b"{}", "2.json": b"{}", "2.txt": b""})
    (tmp_path / "sub").mkdir()
    for name in names:
        (tmp_path / name).write_bytes(b"")
    of_folder = {".txt": 2, ".json": 1, ".jsonl": 1, "other": 3, "x.7z": 1, ".gz": 1}
    assert left_out(tmp_path, clips_per_shard=2) == [of_folder, {}, {".json": 2, ".txt": 1}]
    assert left_out(tmp_path / "b.tar", tmp_path / "speaker 0") == [{".json": 2, ".txt": 1}, {}]
    assert in_words(Counter(of_folder)) == "3 other, 2 .txt, 1 .json, 1 .jsonl, 1 x.7z, 1 .gz"


def test_many_kinds_of_files_are_not_all_named():
    counts = Counter({f".{letter}": 20 - number for number, letter in enumerate("abcdefghijkl")})
    assert in_words(counts).endswith("11 .j, 19 more")


def test_a_compressed_archive_beside_its_files_is_left_out_and_named(tmp_path: Path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "x.wav").write_bytes(WAV)
    (tmp_path / "sub" / "a.tar.gz").write_bytes(b"")
    assert left_out(tmp_path) == [{"sub/a.tar.gz": 1}]
    assert left_out(tmp_path / "sub" / "*") == [{str(tmp_path / "sub" / "a.tar.gz"): 1}]
    (tmp_path / "sub" / "x.wav").unlink()
    with pytest.raises(
        ValueError, match=r"nothing to tokenize: .* only 1 sub/a.tar.gz; .* unpack compressed"
    ):
        find_shards([tmp_path])


def test_audio_that_cannot_be_read_is_listed_as_an_error(tmp_path: Path):
    for name in ("a.m4a", "b.wav", "c.WEBM"):
        (tmp_path / name).write_bytes(WAV)
    write_tar(tmp_path / "d.tar", {"1.wma": WAV, "1.txt": b""})
    (tmp_path / "m.jsonl").write_text('{"path": "a.m4a"}')
    write_parquet(tmp_path / "e.parquet", [{"bytes": None, "path": "a.m4a"}])
    folder, *others = find_shards([tmp_path, tmp_path / "m.jsonl"])
    problems = [item.problem for item in read(folder)]
    reason = "files cannot be read; convert this one to WAV or FLAC"
    assert problems == [f".m4a {reason}", "", f".webm {reason}"]
    assert [reason in item.problem for shard in others for item in read(shard)] == [True] * 3


def test_audio_of_all_suffixes_is_found(tmp_path: Path):
    for suffix in AUDIO_SUFFIXES:
        (tmp_path / f"x{suffix.upper()}").write_bytes(WAV)
    (shard,) = find_shards([tmp_path])
    assert len(read(shard)) == len(AUDIO_SUFFIXES)
    assert {".sph", ".w64", ".oga", ".au", ".caf", ".mp2", ".aiff", ".opus"} < set(AUDIO_SUFFIXES)
    assert not any(item.problem for item in read(shard))


def test_an_archive_without_clips_is_an_error(tmp_path: Path):
    write_tar(tmp_path / "a.tar", {"1.txt": b"", "2.txt": b""})
    write_tar(tmp_path / "b.tar", {})
    write_parquet(tmp_path / "c.parquet", [])
    problems = [item.problem for shard in find_shards([tmp_path]) for item in read(shard)]
    assert problems == [
        "the file has no clips, only 2 .txt",
        "the file has no clips",
        "the file has no clips",
    ]


def test_the_home_folder_may_be_written_as_a_tilde(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_folder(tmp_path / "home" / "data", [100, 200])
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    for source in ("~/data", "~/data/*", "~"):
        (shard,) = find_shards([source])
        assert len(read(shard)) == 2
    write_folder(tmp_path / "~" / "data", [100])
    (shard,) = find_shards(["~/data"])
    assert ids(read(shard)) == ["speaker 0/clip_000.wav"]


def test_a_job_keeps_its_fingerprint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Else jobs that were begun could not be continued."""
    monkeypatch.chdir(tmp_path)
    write_folder(Path("data"), [100, 200, 300])
    write_tar(Path("data/a.tar"), {"1.wav": WAV, "1.txt": b""})
    Path("data/notes.txt").write_text("words")
    Path("m.jsonl").write_text('{"path": "x.wav", "start": 1, "end": 2}\n{"path": "y.wav", "end": 2.5}\n')
    assert make_plan(["data", "m.jsonl"], clips_per_shard=2).fingerprint == "99c1843f8d2af657"
