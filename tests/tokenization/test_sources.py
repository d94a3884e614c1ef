"""Clips are found in archives, Parquet files and manifests, and damage is reported."""

import bz2
import gzip
import io
import json
import lzma
import os
import shutil
import subprocess
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.tokenization.corpora import (
    audio_bytes,
    find_shards,
    ids,
    noise_clip,
    read,
    write_parquet,
    write_tar,
)

WAV = audio_bytes(noise_clip(100))


def test_an_archive_is_a_shard_of_its_audio(tmp_path: Path):
    write_tar(tmp_path / "a.tar", {"1.wav": WAV, "1.json": b"{}", "sub/2.flac": WAV, "1.mp3": WAV})
    write_parquet(tmp_path / "b.parquet", [{"bytes": WAV, "path": "x.wav"}, {"bytes": WAV, "path": None}])
    tar, parquet = find_shards([tmp_path], clips_per_shard=1)
    assert ids(read(tar)) == ["1.wav", "sub/2.flac", "1.mp3"]
    assert ids(read(parquet)) == ["x.wav", "1"]
    for item in read(tar):
        data = Path(item.path).read_bytes()
        assert item.size is not None
        assert data[item.offset : item.offset + item.size] == WAV


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
    items = read(shard)
    assert ids(items) == ["x.wav", "x.wav@1.5-2", "mine", "gone.wav"]
    assert [(item.start, item.end) for item in items] == [(0, None), (1.5, 2), (2, None), (0, None)]
    assert items[3].problem == f"there is no file {tmp_path / 'gone.wav'}"


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
    items = read(shard)
    assert [item.id for item in items if not item.problem] == good
    assert reason in items[-1].problem


def test_damage_inside_a_tar_is_reported(tmp_path: Path):
    write_tar(tmp_path / "a.tar", {"1.wav": WAV, "2.wav": WAV})
    data = bytearray((tmp_path / "a.tar").read_bytes())
    data[1024 : 1024 + 512] = b"x" * 512  # the second header
    (tmp_path / "a.tar").write_bytes(data)
    (shard,) = find_shards([tmp_path])
    first, second = read(shard)
    assert (first.id, first.problem) == ("1.wav", "")
    assert "damaged after byte 1024" in second.problem


def test_rows_without_audio_and_broken_parquet_are_reported(tmp_path: Path):
    write_parquet(tmp_path / "a.parquet", [{"bytes": WAV, "path": "x"}, None, {"bytes": None, "path": "no"}])
    (tmp_path / "b.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-20])
    rows, broken = find_shards([tmp_path])
    items = read(rows)
    assert ids(items) == ["x", "1", "no"]
    assert [bool(item.problem) for item in items] == [False, True, True]
    assert "neither bytes nor the path" in items[1].problem
    (item,) = read(broken)
    assert "cannot be read from row 0 on" in item.problem


def test_text_in_parquet_that_is_not_utf_8_costs_its_row(tmp_path: Path):
    names = pa.array([b"a", b"\xff", b"c"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"id": names, "audio": [WAV] * 3}), tmp_path / "a.parquet")
    (shard,) = find_shards([tmp_path / "a.parquet"])
    items = read(shard)
    assert ids(items) == ["a", "1", "c"]
    assert ["is not UTF-8" in item.problem for item in items] == [False, True, False]


@pytest.mark.parametrize("place", [0.2, 0.5, 0.8])
def test_damage_in_parquet_lasts(tmp_path: Path, place: float):
    """pyarrow raises OSError, as a disk that fails would."""
    write_parquet(
        tmp_path / "a.parquet", [{"bytes": bytes(range(256)) * 40, "path": f"{n}"} for n in range(50)]
    )
    data = bytearray((tmp_path / "a.parquet").read_bytes())
    first = int(place * len(data))
    data[first : first + 20] = bytes(20)
    (tmp_path / "a.parquet").write_bytes(data)
    (shard,) = find_shards([tmp_path / "a.parquet"])
    items = read(shard)
    assert "the file cannot be read from row" in items[-1].problem
    assert not items[-1].is_transient


def test_a_parquet_file_without_audio_is_reported(tmp_path: Path):
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "a.parquet")
    (shard,) = find_shards([tmp_path])
    (item,) = read(shard)
    assert "needs a column audio of {bytes, path}, got text" in item.problem


def test_links_in_a_tar_are_reported(tmp_path: Path):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name, kind in (("hard.wav", tarfile.LNKTYPE), ("soft.wav", tarfile.SYMTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "1.wav"
            archive.addfile(member)
    (shard,) = find_shards([tmp_path])
    assert [(item.id, "a link inside the archive" in item.problem) for item in read(shard)] == [
        ("hard.wav", True),
        ("soft.wav", True),
    ]


def test_a_second_archive_after_the_first_is_reported(tmp_path: Path):
    write_tar(tmp_path / "a.tar", {"1.wav": WAV})
    data = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(data + data)
    (shard,) = find_shards([tmp_path])
    first, second = read(shard)
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
    first, second = read(shard)
    assert (first.id, first.problem) == ("1.wav", "")
    assert "cannot be read after byte 1024" in second.problem


def test_ids_of_a_manifest_are_printable(tmp_path: Path):
    lines = [{"path": "x.wav", "id": None}, {"path": "x.wav", "id": 0}, {"path": "bad\udcff.wav"}]
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "x.wav").write_bytes(WAV)
    (shard,) = find_shards([tmp_path / "m.jsonl"])
    assert ids(read(shard)) == ["x.wav", "0", "bad\\udcff.wav"]


def test_half_a_surrogate_pair_in_a_path_costs_one_clip(tmp_path: Path):
    """JSON may have it, and no file system does."""
    (tmp_path / "x.wav").write_bytes(WAV)
    (tmp_path / "m.jsonl").write_text('{"path": "\\ud800.wav"}\n{"path": "x.wav"}\n')
    (bad, good) = read_file(tmp_path / "m.jsonl")
    assert bad == ("\\ud800.wav", f"there is no file {tmp_path}/\\ud800.wav") and good == ("x.wav", "")


def read_file(path: Path, **options: Any) -> list[tuple[str, str]]:
    """The id and the problem of each clip."""
    (shard,) = find_shards([path], **options)
    return [(item.id, item.problem) for item in read(shard)]


@pytest.mark.skipif(not shutil.which("tar"), reason="GNU tar makes the archives")
@pytest.mark.parametrize(
    "options",
    ["--format=gnu", *(f"--format=posix --sparse-version={version}" for version in ("0.0", "0.1", "1.0"))],
)
def test_sparse_files_in_a_tar_are_refused_and_the_next_is_found(tmp_path: Path, options: str):
    """Such an archive has only the parts between the holes, so its bytes are not the file."""
    if "GNU" not in subprocess.run(["tar", "--version"], capture_output=True, text=True, check=True).stdout:
        pytest.skip("this is not GNU tar")
    with open(tmp_path / "hole.wav", "wb") as file:
        file.write(WAV)
        file.seek(1 << 20)
        file.write(WAV)
    (tmp_path / "next.wav").write_bytes(WAV)
    words = ["tar", "-cSf", "a.tar", *options.split(), "--hole-detection=raw", "hole.wav", "next.wav"]
    subprocess.run(words, cwd=tmp_path, check=True)
    assert (tmp_path / "a.tar").stat().st_size < 1 << 20
    (shard,) = find_shards([tmp_path / "a.tar"])
    hole, after = read(shard)
    assert hole.id == "hole.wav"
    assert "stored as a sparse file; make the archive without the option --sparse" in hole.problem
    assert (after.id, after.problem, after.size) == ("next.wav", "", len(WAV))
    archive = (tmp_path / "a.tar").read_bytes()
    assert archive[after.offset : after.offset + len(WAV)] == WAV


def test_a_tar_cut_inside_a_file_that_is_no_clip_is_reported(tmp_path: Path):
    write_tar(tmp_path / "a.tar", {"1.wav": WAV, "1.txt": b"words" * 200, "2.wav": WAV})
    whole = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(whole[:2000])
    assert read_file(tmp_path / "a.tar") == [("1.wav", ""), ("", "the archive is cut short inside 1.txt")]


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_in_a_tar_are_read(tmp_path: Path, form: Any):
    name = "folder/" * 40 + "ñ" * 100 + ".wav"
    with tarfile.open(tmp_path / "a.tar", "w", format=form) as archive:
        member = tarfile.TarInfo(name)
        member.size = len(WAV)
        archive.addfile(member, io.BytesIO(WAV))
    assert read_file(tmp_path / "a.tar") == [(name, "")]


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_clip_after_one_of_9_gigabytes_is_found(tmp_path: Path, form: Any):
    """Its size does not fit in the usual field of the header."""
    long, short = tarfile.TarInfo("long.wav"), tarfile.TarInfo("short.wav")
    long.size, short.size = 9 << 30, len(WAV)
    with open(tmp_path / "a.tar", "wb") as file:
        file.write(long.tobuf(form))
        begin = file.tell()
        file.seek(begin + long.size)
        file.write(short.tobuf(form))
        file.write(WAV + bytes(-len(WAV) % 512 + 1024))
    (shard,) = find_shards([tmp_path / "a.tar"])
    first, second = read(shard)
    assert (first.id, first.offset, first.size, first.problem) == ("long.wav", begin, 9 << 30, "")
    assert (second.id, second.size, second.problem) == ("short.wav", len(WAV), "")
    assert second.offset == os.path.getsize(tmp_path / "a.tar") - len(WAV) - (-len(WAV) % 512 + 1024)


def test_the_rest_of_a_file_from_another_volume_is_refused(tmp_path: Path):
    write_tar(tmp_path / "a.tar", {"rest.wav": WAV, "whole.wav": WAV})
    data = bytearray((tmp_path / "a.tar").read_bytes())
    data[156:157] = b"M"
    data[148:156] = b" " * 8
    data[148:156] = b"%06o\0 " % sum(data[:512])
    (tmp_path / "a.tar").write_bytes(data)
    reason = "it began in another volume of the archive; store whole files in each archive"
    assert read_file(tmp_path / "a.tar") == [("rest.wav", reason), ("whole.wav", "")]


def zipped(data: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a.wav", data)
    return file.getvalue()


@pytest.mark.parametrize(
    ("compress", "name"),
    [
        (gzip.compress, "gzip"),
        (bz2.compress, "bzip2"),
        (lzma.compress, "xz"),
        (zipped, "zip"),
        (lambda data: pa.compress(data, codec="zstd", asbytes=True), "zstd"),
    ],
)
def test_a_compressed_file_named_tar_is_called_so(
    tmp_path: Path, compress: Callable[[bytes], bytes], name: str
):
    write_tar(tmp_path / "a.tar", {"1.wav": WAV})
    (tmp_path / "a.tar").write_bytes(compress((tmp_path / "a.tar").read_bytes()))
    reason = f"it is a {name} file, which cannot be searched; unpack it"
    assert read_file(tmp_path / "a.tar") == [("", reason)]


def test_a_name_in_a_tar_may_begin_as_a_compressed_file_does(tmp_path: Path):
    write_tar(tmp_path / "a.tar", {"BZh.wav": WAV})
    assert read_file(tmp_path / "a.tar") == [("BZh.wav", "")]


def test_a_column_of_paths_is_read_beside_the_parquet_file(tmp_path: Path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "x.wav").write_bytes(WAV)
    pq.write_table(pa.table({"audio": ["sub/x.wav", "no.wav", None]}), tmp_path / "a.parquet")
    (shard,) = find_shards([tmp_path / "a.parquet"])
    first, second, third = read(shard)
    assert (first.id, first.path, first.size) == ("sub/x.wav", str(tmp_path / "sub" / "x.wav"), len(WAV))
    assert (second.id, second.problem) == ("no.wav", f"there is no file {tmp_path / 'no.wav'}")
    assert "neither bytes nor the path" in third.problem


def test_a_column_of_bytes_is_read(tmp_path: Path):
    pq.write_table(pa.table({"id": ["a", "b"], "audio": [WAV, WAV[:-2]]}), tmp_path / "a.parquet")
    (shard,) = find_shards([tmp_path / "a.parquet"])
    assert [(item.id, item.data) for item in read(shard)] == [("a", WAV), ("b", WAV[:-2])]


def test_the_column_of_audio_can_have_another_name(tmp_path: Path):
    pq.write_table(pa.table({"speech": [WAV], "audio": ["no.wav"]}), tmp_path / "a.parquet")
    assert read_file(tmp_path / "a.parquet", audio_column="speech") == [("0", "")]
    ((_, problem),) = read_file(tmp_path / "a.parquet", audio_column="sound")
    assert "needs a column sound of {bytes, path}, got speech, audio; set audio_column" in problem


@pytest.mark.parametrize("name", ["m.jsonl", "m.json"])
def test_manifests_of_nemo_are_read(tmp_path: Path, name: str):
    (tmp_path / "x.wav").write_bytes(WAV)
    lines = [
        {"audio_filepath": "x.wav", "duration": 1.5, "offset": 0.25, "text": "words"},
        {"audio_filepath": "x.wav", "duration": 2},
        {"audio_filepath": "x.wav", "duration": None, "offset": 3},
        {"audio_filepath": "x.wav"},
        {"path": "x.wav", "duration": 2, "offset": 1},  # fields of our manifests that mean nothing
    ]
    (tmp_path / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    (shard,) = find_shards([tmp_path / name])
    assert [(item.id, item.start, item.end, item.problem) for item in read(shard)] == [
        ("x.wav@0.25-1.75", 0.25, 1.75, ""),
        ("x.wav@0-2", 0, 2, ""),
        ("x.wav@3-", 3, None, ""),
        ("x.wav", 0, None, ""),
        ("x.wav#2", 0, None, ""),
    ]


def test_a_manifest_may_have_a_byte_order_mark_and_line_ends_of_windows(tmp_path: Path):
    (tmp_path / "ñ.wav").write_bytes(WAV)
    text = '\ufeff{"path": "ñ.wav"}\r\n\r\n{"path": "ñ.wav", "id": "a"}\r\n'
    (tmp_path / "m.jsonl").write_bytes(text.encode())
    assert read_file(tmp_path / "m.jsonl") == [("ñ.wav", ""), ("a", "")]
