"""Files in a bucket: an S3 server on this machine, behind a proxy that fails on purpose."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mimi_jax import MimiConfig
from mimi_jax.files import remote
from mimi_jax.files.blocks import ARCHIVE, CLIP, CROP, Blocks, open_binary
from mimi_jax.files.corpus import find_clips, is_transient, read_crop
from mimi_jax.files.remote import Listed
from tests.buckets import FAULTS, Proxy, account, proxy, s3_server
from tests.tokenization.corpora import audio_bytes, noise_clip

URL = "s3://bucket/numbers.bin"
SMALL = Blocks(1000, ahead=4, kept=12)
DATA = np.random.default_rng(0).bytes(10_500)


@pytest.fixture(scope="module")
def front() -> Iterator[Proxy]:
    with s3_server() as behind, proxy(behind) as front, account(front.address):
        yield front


@pytest.fixture(autouse=True)
def small_and_fast(front: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "DELAYS", (0.01,) * 3)
    remote.write_whole(URL, DATA)
    front.requests.clear()


@pytest.fixture(scope="module")
def filesystem(front: Proxy) -> Any:
    return remote.resolve("s3://bucket")[0]


@pytest.mark.parametrize("blocks", [SMALL, Blocks(1000, 0, 2), ARCHIVE, CLIP, CROP])
def test_any_part_can_be_read(blocks: Blocks):
    generator = np.random.default_rng(1)
    with open_binary(URL, blocks) as file:
        assert file.seek(0, 2) == len(DATA)
        for _ in range(10):
            start, size = map(int, generator.integers(0, [len(DATA), 4000]))
            file.seek(start)
            assert file.read(size) == DATA[start : start + size]
        file.seek(0)
        assert file.read() == DATA


def test_each_block_of_a_file_is_read_once(front: Proxy):
    with open_binary(URL, SMALL) as file:
        assert file.read() == DATA
    assert front.requests["GET"] == 11
    front.requests.clear()
    with open_binary(URL, Blocks(9000, ahead=0, kept=2)) as file:
        assert file.read(100) == DATA[:100]
    assert front.requests["GET"] == 1


@pytest.mark.parametrize("kept", [6, 12])  # as in CLIP and ARCHIVE
def test_a_block_is_not_forgotten_before_it_is_read(front: Proxy, kept: int):
    with open_binary(URL, Blocks(len(DATA) // 20, ahead=4, kept=kept)) as file:
        assert file.read() == DATA
    assert front.requests["GET"] in (20, 21)


def test_several_places_can_be_read_by_turns(front: Proxy):
    with open_binary(URL, SMALL) as file:
        for offset in range(0, 3000, 100):
            for start in (0, 5000, 7000):
                file.seek(start + offset)
                assert file.read(100) == DATA[start + offset : start + offset + 100]
    assert front.requests["GET"] == 11


@pytest.mark.parametrize("fault", FAULTS[:-1])
@pytest.mark.parametrize("read", [remote.read_whole, lambda url: _through(url)])
def test_a_request_that_fails_is_made_again(front: Proxy, fault: str, read: Any):
    front.planned = [fault, fault]
    assert read(URL) == DATA
    assert front.planned == []


def _through(url: str) -> bytes:
    with open_binary(url, SMALL) as file:
        return file.read()


@pytest.mark.parametrize("read", [remote.read_whole, lambda url: _through(url)])
def test_a_request_that_fails_always_is_an_error_that_may_pass(
    front: Proxy, monkeypatch: pytest.MonkeyPatch, read: Any
):
    monkeypatch.setattr(front, "broken", "numbers")
    # The library compares checksums itself, if a whole file is asked for.
    reason = r"s3://bucket/numbers.bin cannot be reached: (500 of 1000 bytes came|Expected checksum)"
    with pytest.raises(ConnectionError, match=reason) as raised:
        read(URL)
    assert is_transient(raised.value)


def test_a_missing_file_is_an_error_that_stays():
    for read in (remote.read_whole, _through):
        with pytest.raises(FileNotFoundError, match="there is no file s3://bucket/none") as raised:
            read("s3://bucket/none")
        assert not is_transient(raised.value)
    assert not remote.exists("s3://bucket/none")
    with pytest.raises(FileNotFoundError, match="nothing matches it"):
        remote.find("s3://bucket/*.wav")


@pytest.mark.parametrize(("size", "come"), [(20_000, 10_500), (10_499, 10_500)])
def test_a_file_of_another_size_than_listed_is_refused(size: int, come: int):
    with pytest.raises(ConnectionError, match=f"{come} of {size} bytes came"):
        remote.read_whole(URL, size)


@pytest.mark.parametrize("failures", range(5))
def test_attempts_are_made_until_one_succeeds(failures: int):
    calls = []

    def call() -> str:
        calls.append(None)
        if len(calls) <= failures:
            raise RuntimeError("on  purpose\n")
        return "answer"

    if failures == 4:
        with pytest.raises(ConnectionError, match=r"^url cannot be reached: on purpose$"):
            remote.attempt("url", call)
    else:
        assert remote.attempt("url", call) == "answer"
    assert len(calls) == min(failures + 1, 4)


class NoCredentialsError(Exception):
    """As botocore has it."""


@pytest.mark.parametrize("error", [PermissionError("no"), NoCredentialsError("none"), TypeError("a bug")])
def test_what_would_fail_again_is_attempted_once(error: Exception):
    calls = []

    def call() -> None:
        calls.append(None)
        raise error

    with pytest.raises(TypeError if isinstance(error, TypeError) else ConnectionError):
        remote.attempt("url", call)
    assert len(calls) == 1


@pytest.mark.parametrize("place", [2000, 10_000])
def test_a_file_that_is_replaced_while_it_is_read_is_refused(place: int):
    with pytest.raises(ConnectionError, match=r"numbers.bin") as raised, open_binary(URL, SMALL) as file:
        file.read(place)
        remote.write_whole(URL, DATA[::-1])
        file.read()
    assert is_transient(raised.value)


def test_the_memory_of_a_large_file_is_bounded():
    with open_binary(URL, Blocks(1000, ahead=2, kept=4)) as file:
        kept = file.raw._kept  # pyright: ignore
        while file.read(100):
            assert len(kept) <= 4


def test_folders_are_listed_in_order(filesystem: Any):
    names = ["a/deep/3.wav", "b/1.wav", "b/2.wav", "b.wav", "top.wav"]
    for name in reversed(names):
        filesystem.pipe_file(f"bucket/listed/{name}", name.encode())
    filesystem.pipe_file("bucket/listed/empty/", b"")
    found = list(remote.list_files("s3://bucket/listed"))
    assert found == [Listed(f"s3://bucket/listed/{name}", len(name)) for name in names]
    assert remote.names_in("s3://bucket/listed") == {"a", "b", "b.wav", "empty", "top.wav"}
    assert remote.names_in("s3://bucket/nothing") == set()
    assert remote.is_folder("s3://bucket/listed/b/")
    assert not remote.is_folder("s3://bucket/listed/b.wav")
    assert remote.find("s3://bucket/listed") == ([Listed("s3://bucket/listed", None, True)], False)
    matches = [Listed("s3://bucket/listed/b/1.wav", 7), Listed("s3://bucket/listed/b/2.wav", 7)]
    assert remote.find("s3://bucket/listed/b/*.wav") == (matches, True)


def test_a_file_named_like_a_pattern_is_found(filesystem: Any):
    filesystem.pipe_file("bucket/odd/clip[1].wav", b"1234")
    assert remote.find("s3://bucket/odd/clip[1].wav") == ([Listed("s3://bucket/odd/clip[1].wav", 4)], False)


def test_a_file_is_no_folder():
    with pytest.raises(NotADirectoryError, match="is a file"):
        remote.names_in(URL)


def test_a_missing_bucket_is_named():
    with pytest.raises(FileNotFoundError, match="s3://nobody/x cannot be written: there is no such bucket"):
        remote.write_whole("s3://nobody/x", b"1")


def test_only_uploads_to_the_folder_are_aborted(filesystem: Any):
    for key in ("out/codes/1.parquet", "out2/codes/1.parquet"):
        upload = filesystem.call_s3("create_multipart_upload", Bucket="bucket", Key=key)
        filesystem.call_s3(
            "upload_part", Bucket="bucket", Key=key, UploadId=upload["UploadId"], PartNumber=1, Body=b"part"
        )
    remote.abort_uploads("s3://bucket/out")
    assert [upload["Key"] for upload in filesystem.list_multipart_uploads("bucket")] == [
        "out2/codes/1.parquet"
    ]


def test_services_without_uploads_in_parts_have_none_to_abort():
    remote.abort_uploads("memory://out")


def test_unknown_services_are_refused():
    with pytest.raises(ValueError, match="nothing://"):
        remote.read_whole("nothing://x")
    with pytest.raises(ValueError, match="`::`"):
        remote.read_whole("s3://bucket/a::b")


@pytest.mark.parametrize(
    ("folder", "name", "joined"),
    [
        ("data", "a.wav", "data/a.wav"),
        ("data", "s3://b/a.wav", "s3://b/a.wav"),
        ("s3://b/data", "c/a.wav", "s3://b/data/c/a.wav"),
        ("s3://b/data", "/local/a.wav", "/local/a.wav"),
        ("s3://b/data", "gs://c/a.wav", "gs://c/a.wav"),
        ("s3://b/data", "./a.wav", "s3://b/data/a.wav"),
        ("s3://b/data/", "../other/a.wav", "s3://b/other/a.wav"),
        ("s3://b", "a.wav", "s3://b/a.wav"),
    ],
)
def test_names_in_a_manifest_are_joined_to_its_folder(folder: str, name: str, joined: str):
    assert remote.join(folder, name) == joined


def test_crops_of_a_remote_corpus_are_those_of_a_local_one(tmp_path: Path, filesystem: Any):
    files = {f"speaker/{n}.{form}": noise_clip(24_000 + n, seed=n) for n, form in enumerate(["wav", "flac"])}
    (tmp_path / "speaker").mkdir()
    for name, audio in files.items():
        (tmp_path / name).write_bytes(audio_bytes(audio, form=name[-4:].strip(".").upper()))
    np.save(tmp_path / "x.npy", np.zeros((3, 2)))
    entry = {"path": "speaker/1.flac", "start": 0.25, "end": 0.75, "features": "x.npy"}
    (tmp_path / "m.jsonl").write_text(json.dumps(entry) + '\n{"path": "none.wav"}\n')
    filesystem.put(f"{tmp_path}/", "bucket/crops/", recursive=True)
    config = MimiConfig()
    for name in ("", "/m.jsonl", "/speaker/0.wav"):
        here, there = find_clips(f"{tmp_path}{name}"), find_clips(f"s3a://bucket/crops{name}")
        assert len(here.clips) == len(there.clips) > 0
        for mine, other in zip(here.clips, there.clips, strict=True):
            assert mine[1:6] == other[1:6]
            assert mine.path.replace(str(tmp_path), "s3://bucket/crops") == other.path.replace("s3a:", "s3:")
            crop = read_crop(mine, 0.1, 4000, config)
            np.testing.assert_array_equal(crop, read_crop(other, 0.1, 4000, config))
        assert [one.name.rsplit("/")[-1] for one in here.left_out] == [
            one.name.rsplit("/")[-1] for one in there.left_out
        ]


def test_a_corpus_that_cannot_be_reached_is_not_used_in_part(front: Proxy, filesystem: Any):
    for name in ("good", "lost"):
        filesystem.pipe_file(f"bucket/part/{name}.wav", audio_bytes(noise_clip(3000)))
    front.broken = "lost"
    with pytest.raises(ConnectionError, match=r"lost\.wav"):
        find_clips("s3://bucket/part")
    front.broken = ""
