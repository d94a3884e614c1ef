"""Damaged files, thousands of them, with FFmpeg (PyAV) as a second opinion on what is in them.

Every file is read whole or refused by name. Run with -rP to see the numbers of files.
"""

import io
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from mimi_jax.files.audio import AudioReader
from tests.files.containers import NUM_SAMPLES, ape, id3, valid_files, with_wrong_length

pytestmark = pytest.mark.slow
FILES = valid_files()
NUM_MUTATIONS = 1000  # of each file
# A note at the beginning of an MP3 file says how many samples its encoder added at both ends. FFmpeg keeps
# them if the name of the encoder in the note is damaged.
ADDED_BY_LAME = 1105 + 575
ROUNDING = 2e-3  # FFmpeg decodes Opus and Vorbis with other rounding


@pytest.fixture(scope="module")
def av() -> Any:
    av = pytest.importorskip("av")
    av.logging.set_level(av.logging.PANIC)
    return av


def decoded_frames(av: Any, data: bytes) -> Iterator[Any]:
    """What FFmpeg decodes; it plays over damage."""
    with av.open(io.BytesIO(data)) as file:
        for packet in file.demux(file.streams.audio[0]):
            try:
                yield from packet.decode()
            except av.FFmpegError:
                continue


def second_opinion(av: Any, name: str, data: bytes) -> np.ndarray:
    """float32 [samples] at our rate, the mean of the channels, as FFmpeg decodes them."""
    resampler = av.AudioResampler(format="fltp")
    frames = [piece for frame in decoded_frames(av, data) for piece in resampler.resample(frame)]
    audio = np.concatenate([frame.to_ndarray() for frame in frames], axis=1).mean(axis=0)
    return audio[::2] if name == "opus" else audio  # FFmpeg decodes Opus at 48 kHz


def read(data: bytes) -> np.ndarray | None:
    """float32 [samples] at the file's own rate; None if the file is refused by name."""
    try:
        reader = AudioReader(io.BytesIO(data), "the file", None)
        return np.concatenate(list(reader), axis=1)[0]
    except ValueError as error:
        assert str(error).startswith("the file "), error
        assert "\n" not in str(error)
        return None


def damaged(name: str) -> Iterator[tuple[str, bytes, int]]:
    """What was done to a file, the result, and how many times its audio is in it."""
    data = FILES[name]
    for size in (0, 10, 2000, 250_000):
        yield f"a tag of {size} bytes in front", id3(size) + data, 1
        yield f"tags of {size} bytes around", id3(size) + data + ape(size + 8) + b"TAG".ljust(128, b"x"), 1
    unit = 50 if "mp3" in name else NUM_SAMPLES
    for part in (0, 0.0001, 0.001, 0.003, 0.01, 0.03, 0.1):
        for change in (max(1, round(unit * part)), -max(1, round(unit * part))):
            if (wrong := with_wrong_length(name, data, change)) is not None:
                yield f"a length that is wrong by {change}", wrong, 1
    yield "two files joined", data + data, 2
    yield "two files with tags joined", id3(99) + data + ape(99) + id3(99) + data, 2
    for cut in (1, 2, 5, 100, 1000, *(int(len(data) * part) for part in (0.1, 0.3, 0.5, 0.7, 0.9))):
        yield f"{cut} bytes cut off", data[: len(data) - cut], 1


@pytest.mark.parametrize("name", FILES)
def test_every_file_is_whole_or_refused(av: Any, name: str):
    twin = {"au little": "au", "rifx": "wav"}.get(name, name)  # FFmpeg does not read these two
    intact, counts = second_opinion(av, name, FILES[twin]), Counter()
    for what, data, times in damaged(name):
        audio = read(data)
        counts["refused" if audio is None else "read"] += 1
        if audio is None:
            continue
        if times == 2:
            assert len(audio) >= 2 * len(intact), what
            continue
        expected = intact
        if name in ("opus", "vorbis"):
            # The last page of an Ogg file states how much of it is audio, and the rest is filling.
            change = int(what.split()[-1]) if "wrong" in what else 0
            expected = intact[: NUM_SAMPLES + change // (2 if name == "opus" else 1)]
            audio = audio[: len(intact)]
        assert abs(len(audio) - len(expected)) <= 1, what
        length = min(len(audio), len(expected))
        if name == "opus":
            assert np.corrcoef(audio[:length], expected[:length])[0, 1] > 0.9, what
        else:
            np.testing.assert_allclose(audio[:length], expected[:length], atol=ROUNDING, err_msg=what)
    print(name, dict(counts))
    assert counts["read"] >= 8


def mutate(data: bytes, rng: np.random.Generator) -> bytes:
    """Change a bit, a byte or a stretch, half of the time near the beginning."""
    at = int(rng.integers(min(len(data), 200) if rng.integers(2) else len(data)))
    size = int(min(len(data) - at, 2 ** rng.integers(0, 12)))
    before, here, after = data[:at], data[at : at + size], data[at + size :]
    match rng.integers(7):
        case 0:
            return before + bytes([data[at] ^ 1 << int(rng.integers(8))]) + data[at + 1 :]
        case 1:
            return before + rng.bytes(1) + data[at + 1 :]
        case 2:
            return before + after
        case 3:
            return before + rng.bytes(size) + here + after
        case 4:
            return before + bytes(size) + after
        case 5:
            return before + here + here + after
    return before


@pytest.mark.parametrize("name", FILES)
def test_no_mutation_changes_the_length_silently(av: Any, name: str):
    rng, counts, audio = np.random.default_rng(1), Counter(), read(FILES[name])
    assert audio is not None
    intact = len(audio)
    frame = ADDED_BY_LAME if "mp3" in name else 1200
    for number in range(NUM_MUTATIONS):
        data = mutate(FILES[name], rng)
        audio = read(data)
        if audio is None:
            counts["refused"] += 1
            continue
        try:
            other = sum(piece.samples for piece in decoded_frames(av, data)) // (2 if name == "opus" else 1)
        except (av.FFmpegError, IndexError, ValueError):
            other = 0
        counts["read by both" if other else "read, but not by FFmpeg"] += 1
        if name == "wav adpcm" or not other:  # FFmpeg leaves out blocks of ADPCM in which a header is damaged
            other = intact
        assert abs(len(audio) - other) <= frame, f"mutation {number}: {len(audio)} and {other} samples"
    print(name, dict(counts))
    assert counts["refused"] >= NUM_MUTATIONS / 4
