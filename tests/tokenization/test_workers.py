"""Worker processes read what `load_audio` reads, even if some of them die."""

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import mimi_jax
from mimi_jax.tokenization import workers
from mimi_jax.tokenization.sources import Item
from mimi_jax.tokenization.workers import PIECE_SECONDS, ClipError, ClipReader, Readers, Target
from tests.tokenization.corpora import RATE, audio_bytes, noise_clip, write_tar

MAX_SECONDS = 200


@pytest.fixture(scope="module")
def readers() -> Iterator[Readers]:
    with Readers(Target(RATE, 1, MAX_SECONDS), num_workers=2) as readers:
        yield readers


def whole(clip: ClipReader) -> np.ndarray:
    pieces = []
    while True:
        piece = clip.next()
        pieces.append(piece.audio)
        if piece.is_last:
            return np.concatenate(pieces, axis=1)


@pytest.mark.parametrize("seconds", [0.001, 1.0, PIECE_SECONDS, PIECE_SECONDS * 2.5])
@pytest.mark.parametrize("rate", [RATE, 16_000])
def test_the_pieces_together_are_the_file(tmp_path: Path, readers: Readers, seconds: float, rate: int):
    path = tmp_path / "a.flac"
    path.write_bytes(audio_bytes(noise_clip(round(seconds * rate), channels=2), rate, "FLAC"))
    clip = readers.open(Item("a", str(path), size=path.stat().st_size))
    np.testing.assert_array_equal(whole(clip), mimi_jax.load_audio(path))


def test_files_inside_archives_and_in_memory_are_read(tmp_path: Path, readers: Readers):
    clips = {f"{n}.wav": audio_bytes(noise_clip(1000 * n, seed=n)) for n in (1, 2)}
    write_tar(tmp_path / "a.tar", clips)
    data = (tmp_path / "a.tar").read_bytes()
    for name, clip in clips.items():
        offset = data.index(clip)
        expected = whole(readers.open(Item(name, data=clip)))
        found = whole(readers.open(Item(name, str(tmp_path / "a.tar"), offset, len(clip))))
        np.testing.assert_array_equal(found, expected)
        assert found.shape[1] == 1000 * int(name[0])


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (b"", "the file is empty"),
        (b"no audio at all", "the file is not a WAV, .* FLAC, OGG or MP3 file"),
        (audio_bytes(np.zeros((1, 5000), np.float32)), "the clip is silent"),
        (audio_bytes(np.zeros((1, 0), np.float32)), "the file has no samples"),
        (audio_bytes(noise_clip(1000))[:-500], "cut short"),
        (audio_bytes(np.full((1, 9), np.nan, np.float32), subtype="FLOAT"), "NaN or infinite"),
        (audio_bytes(noise_clip(8000 * 201), 8000), "the clip is too long"),
    ],
)
def test_a_clip_that_cannot_be_used_is_refused_with_the_reason(readers: Readers, data: bytes, error: str):
    with pytest.raises(ValueError, match=error):
        whole(readers.open(Item("it", data=data)))


def test_a_missing_file_is_refused_with_the_reason(readers: Readers):
    with pytest.raises(ValueError, match="the row has no audio"):
        readers.open(Item("it", problem="the row has no audio")).next()
    missing = readers.open(Item("it", "/nowhere/x.wav", size=3))
    with pytest.raises(ValueError, match="No such file"):
        missing.next()


def kill_worker(readers: Readers) -> None:
    os.kill(readers._workers[0]._process._pid.result(), signal.SIGKILL)
    time.sleep(0.3)


@pytest.fixture
def one() -> Iterator[Readers]:
    with Readers(Target(RATE, 1, MAX_SECONDS), num_workers=1) as readers:
        yield readers


def test_clips_continue_where_they_were_after_their_worker_dies(one: Readers):
    item = Item("good", data=audio_bytes(noise_clip((PIECE_SECONDS * 2 + 1) * RATE)))
    begun = one.open(item)
    first = begun.next().audio  # the worker already reads the next piece
    kill_worker(one)
    behind = [one.open(item) for _ in range(3)]
    expected = whole(one.open(item))
    for clip in behind:
        np.testing.assert_array_equal(whole(clip), expected)
    np.testing.assert_array_equal(np.concatenate([first, whole(begun)], axis=1), expected)


def test_a_file_that_kills_its_worker_twice_is_blamed_alone(one: Readers, tmp_path: Path):
    os.mkfifo(tmp_path / "stuck.wav")  # a process that opens it waits until it is killed
    stuck = Item("stuck", str(tmp_path / "stuck.wav"))
    good = Item("good", data=audio_bytes(noise_clip(1000)))
    clips = [one.open(item) for item in (stuck, good, stuck, good)]

    def kill_often() -> None:
        for _ in range(4):
            time.sleep(1)
            kill_worker(one)

    killer = threading.Thread(target=kill_often)
    killer.start()
    for clip in clips:
        if clip.item is good:
            assert whole(clip).shape == (1, 1000)
        else:
            with pytest.raises(ValueError, match="the audio library crashed on this file"):
                clip.next()
    killer.join()


def test_no_worker_is_stopped_for_too_many_open_files(one: Readers, monkeypatch: pytest.MonkeyPatch):
    good = Item("good", data=audio_bytes(noise_clip(RATE)))
    before = one._workers[0]._process

    def fail(*_: object) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    with monkeypatch.context() as patch:
        patch.setattr(workers, "open_shared", fail)
        with pytest.raises(ClipError, match="Too many open files"):
            one.open(good).next()
    assert whole(one.open(good)).shape == (1, RATE)
    assert one._workers[0]._process is before


def test_no_file_is_blamed_if_workers_cannot_start(tmp_path: Path):
    """As with a script that calls `tokenize` when it is imported."""
    (tmp_path / "x.wav").write_bytes(audio_bytes(noise_clip(1000)))
    script = f"""
from mimi_jax.tokenization import tokenize
tokenize([{str(tmp_path / "x.wav")!r}], {str(tmp_path / "out")!r})
"""
    (tmp_path / "script.py").write_text(script)
    result = subprocess.run([sys.executable, str(tmp_path / "script.py")], capture_output=True, text=True)
    assert result.returncode == 1
    assert 'do its work under if __name__ == "__main__":' in result.stderr
    assert list((tmp_path / "out" / "codes").iterdir()) == []


def test_a_process_ends_although_its_worker_is_stuck(tmp_path: Path):
    os.mkfifo(tmp_path / "stuck.wav")
    script = f"""
import time
from mimi_jax.tokenization.workers import Readers, Target
from mimi_jax.tokenization.sources import Item
if __name__ == "__main__":
    with Readers(Target(24_000, 1, 100), 1) as readers:
        readers.open(Item("stuck", {str(tmp_path / "stuck.wav")!r}))
        time.sleep(2)
    print("ends")
"""
    (tmp_path / "script.py").write_text(script)
    line = [sys.executable, str(tmp_path / "script.py")]
    assert subprocess.run(line, capture_output=True, text=True, timeout=30).stdout == "ends\n"
