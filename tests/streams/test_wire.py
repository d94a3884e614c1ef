"""Audio and codes on pipes: every complete frame comes through at once, and damage is refused."""

import dataclasses
import io
import itertools
import json
import struct
from typing import Any

import numpy as np
import pytest

from mimi_jax.files.codes import CodeSpec
from mimi_jax.streams.wire import (
    CodeStreamParser,
    CodeStreamReader,
    CodeStreamWriter,
    Read,
    read_pcm,
    to_pcm,
)

SPEC = CodeSpec(
    "0123456789abcdef", sampling_rate=24_000, frame_size=1920, codebook_size=2048, num_codebooks=8
)
READS = [(1,), (3,), (1, 7, 2), (1 << 20,)]  # the most bytes that a read returns, in turn


def pipe(data: bytes, *sizes: int) -> Read:
    """A pipe whose reads return at most these numbers of bytes, in turn."""
    file, turns = io.BytesIO(data), itertools.cycle(sizes)
    return lambda size: file.read(min(size, next(turns)))


# raw PCM


@pytest.mark.parametrize(
    ("pcm_format", "data", "samples"),
    [
        ("s16le", "0080 ff7f 0100 ff00", [-1, 32767 / 32768, 1 / 32768, 255 / 32768]),
        ("f32le", "0000803f 000000c0 00000000 0000003f", [1, -2, 0, 0.5]),
    ],
)
@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("sizes", READS)
def test_the_bytes_of_pcm(pcm_format: str, data: str, samples: list[float], channels: int, sizes: tuple):
    pieces = list(
        read_pcm(pipe(bytes.fromhex(data), *sizes), pcm_format, channels, frame_size=1, max_frames=3)
    )
    audio = np.concatenate(pieces, axis=1)
    assert audio.dtype == np.float32
    assert audio.tolist() == [samples[channel::channels] for channel in range(channels)]
    assert all(1 <= piece.shape[1] <= 3 for piece in pieces)
    assert to_pcm(audio, pcm_format) == bytes.fromhex(data)


def test_the_first_frame_is_yielded_whole_and_then_what_arrives():
    arrived = [b"\1\0\2", b"\0\3\0\4\0", b"\5", b"\0"]
    pieces = read_pcm(lambda _: arrived.pop(0), "s16le", 1, frame_size=3, max_frames=100)
    assert (next(pieces) * 32768).tolist() == [[1, 2, 3, 4]]
    assert len(arrived) == 2
    assert (next(pieces) * 32768).tolist() == [[5]]


@pytest.mark.parametrize("sizes", READS)
@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("pcm_format", ["s16le", "f32le"])
def test_a_sample_that_is_not_complete_is_left_out(pcm_format: str, channels: int, sizes: tuple[int, ...]):
    audio = np.arange(6, dtype=np.float32).reshape(channels, -1) / 8
    data = to_pcm(audio, pcm_format)
    size = len(data) // audio.shape[1]
    for end in range(len(data) + 1):
        given = list(read_pcm(pipe(data[:end], *sizes), pcm_format, channels, 2, max_frames=2))
        np.testing.assert_array_equal(np.hstack([audio[:, :0], *given]), audio[:, : end // size])


@pytest.mark.parametrize("sizes", READS)
@pytest.mark.parametrize("pcm_format", [None, "s16le", "f32le"])
def test_an_audio_file_is_refused_as_raw_audio(pcm_format: str | None, sizes: tuple[int, ...]):
    with pytest.raises(ValueError, match="raw audio must have no header, got a FLAC file; give its path"):
        next(read_pcm(pipe(b"fLaC" + bytes(100), *sizes), pcm_format, 1, frame_size=10, max_frames=10))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e30, -101])
def test_floats_that_are_not_audio_are_refused_where_they_come(bad: float):
    data = np.array([0.5, 100, -0.5, bad], "<f4").tobytes()
    pieces = read_pcm(pipe(data, 100), "f32le", 1, frame_size=3, max_frames=1)
    assert next(pieces).tolist() == [[0.5, 100, -0.5]]
    with pytest.raises(ValueError, match=r"f32le must be finite and near \[-1, 1\], got .*; check the"):
        next(pieces)


def test_16_bit_pcm_is_written_as_it_was_read():
    data = np.arange(-32768, 32768).astype("<i2").tobytes()
    assert b"".join(to_pcm(piece, "s16le") for piece in read_pcm(pipe(data, 999), "s16le", 1, 512, 8)) == data


def test_loud_audio_is_clipped_to_16_bits():
    audio = np.array([[-2, -1, -0.5, 0, 0.5, 1, 1e6]], np.float32)
    samples = np.frombuffer(to_pcm(audio, "s16le"), "<i2")
    assert samples.tolist() == [-32768, -32768, -16384, 0, 16384, 32767, 32767]
    assert to_pcm(audio, "f32le") == audio.astype("<f4").tobytes()


# code streams


def make_codes(spec: CodeSpec, num_samples: int) -> np.ndarray:
    """[codebooks, frames]. The codes of a shorter stream are the first ones of a longer stream."""
    shape = (spec.num_frames(num_samples), spec.num_codebooks)
    return np.random.default_rng(0).integers(spec.codebook_size, size=shape).T


def write_stream(spec: CodeSpec, codes: np.ndarray, num_samples: int, frames: int = 1000) -> list[bytes]:
    """What each call writes: the header, the given number of frames at a time, and perhaps the end mark."""
    written: list[bytes] = []
    writer = CodeStreamWriter(written.append, spec)
    size = frames * spec.frame_size
    for i, start in enumerate(range(0, num_samples, size)):
        writer.write(codes[:, i * frames : (i + 1) * frames], min(size, num_samples - start))
    writer.close()
    return written


def make_stream(num_frames: int, num_last: int = 0) -> bytes:
    """A stream of `num_frames` complete frames, and a last one of `num_last` samples."""
    num_samples = num_frames * SPEC.frame_size + num_last
    return b"".join(write_stream(SPEC, make_codes(SPEC, num_samples), num_samples))


def read_stream(read: Read, max_frames: int = 3) -> tuple[list[list[int]], int, str]:
    """The codes of each frame, the number of samples, and the error at the end."""
    frames, num_samples, reader = [], 0, CodeStreamReader(read, max_frames)
    try:
        for codes, count in reader:
            assert codes.dtype == np.int32
            assert codes.shape == (reader.spec.num_codebooks, reader.spec.num_frames(count))
            assert 1 <= codes.shape[1] <= max_frames
            frames += codes.T.tolist()
            num_samples += count
    except ValueError as error:
        return frames, num_samples, str(error)
    return frames, num_samples, ""


def header_end(data: bytes) -> int:
    return 8 + int.from_bytes(data[:8], "little")


def parse(data: bytes) -> tuple[dict, list[list[int]], int]:
    """Read the header, the codes of each frame and the number of samples, as the documentation says."""
    start = header_end(data)
    header = json.loads(data[8:start])
    count, bits = header["num_codebooks"], len(f"{header['codebook_size'] - 1:b}")
    size, frames, num_samples, letter = -(-count * bits // 8), [], 0, ""
    while letter != "L" and (letter := chr(data[start])) != "E":
        assert letter in "FL"
        last = data[start + 1 : start + 5] if letter == "L" else b""
        num_samples += int.from_bytes(last, "little") if last else header["frame_size"]
        start += 1 + len(last)
        digits = "".join(f"{byte:08b}" for byte in data[start : start + size])
        frames.append([int(digits[k * bits : (k + 1) * bits], 2) for k in range(count)])
        assert "1" not in digits[count * bits :]
        start += size
    assert data[start:] == (b"E" if letter == "E" else b"")
    return header, frames, num_samples


def test_the_bytes_of_a_stream():
    spec = dataclasses.replace(SPEC, num_codebooks=2)
    header, *packets = write_stream(spec, np.array([[1, 2047, 0], [2, 0, 1024]]), 2 * 1920 + 259, frames=1)
    fields = {
        "format": "mimi_jax.code_stream",
        "version": "1",
        "model_id": "0123456789abcdef",
        "sampling_rate": 24_000,
        "frame_size": 1920,
        "codebook_size": 2048,
        "num_codebooks": 2,
    }
    assert header[:8] == (len(header) - 8).to_bytes(8, "little")
    assert json.loads(header[8:]) == fields
    # 00000000 001.00000 000010.00, 11111111 111.00000 000000.00 and 00000000 000.10000 000000.00
    assert packets == [b"F\x00\x20\x08", b"F\xff\xe0\x00", b"L\x03\x01\x00\x00\x00\x10\x00"]


@pytest.mark.parametrize(("frames", "sizes"), [(1, [12, 12, 12, 1]), (2, [24, 12, 1]), (3, [36, 1])])
def test_a_frame_of_8_codebooks_is_12_bytes(frames: int, sizes: list[int]):
    """What one call writes is sent with one write."""
    _, *written = write_stream(SPEC, make_codes(SPEC, 3 * 1920), 3 * 1920, frames)
    assert [len(data) for data in written] == sizes


def test_a_stream_ends_once():
    written: list[bytes] = []
    writer = CodeStreamWriter(written.append, SPEC)
    writer.close()
    writer.close()
    assert b"".join(written) == make_stream(num_frames=0)


@pytest.mark.parametrize("num_samples", [1, 1919, 1920, 1921, 7 * 1920, 7 * 1920 + 300])
@pytest.mark.parametrize("num_codebooks", [1, 8])
@pytest.mark.parametrize("codebook_size", [2, 1000, 2048, 65536])
def test_codes_are_read_as_they_were_written(codebook_size: int, num_codebooks: int, num_samples: int):
    spec = dataclasses.replace(SPEC, codebook_size=codebook_size, num_codebooks=num_codebooks)
    codes = make_codes(spec, num_samples)
    data = b"".join(write_stream(spec, codes, num_samples))
    for frames in (1, 2):
        assert b"".join(write_stream(spec, codes, num_samples, frames)) == data
    header, *parsed = parse(data)
    assert header == {"format": "mimi_jax.code_stream", "version": "1", **dataclasses.asdict(spec)}
    assert parsed == [codes.T.tolist(), num_samples]
    for sizes in READS:
        assert CodeStreamReader(pipe(data, *sizes), 1).spec == spec
        assert read_stream(pipe(data, *sizes)) == (codes.T.tolist(), num_samples, "")


def test_a_stream_without_frames():
    assert read_stream(pipe(make_stream(num_frames=0), 1)) == ([], 0, "")


def test_a_frame_is_yielded_when_its_last_byte_arrives():
    file = io.BytesIO(make_stream(num_frames=5, num_last=700))
    reader = CodeStreamReader(lambda _: file.read(1), max_frames=8)
    start = file.tell()
    assert start == header_end(file.getvalue())
    arrivals = [(file.tell() - start, num_samples) for _, num_samples in reader]
    assert arrivals == [(12, 1920), (24, 1920), (36, 1920), (48, 1920), (60, 1920), (76, 700)]


def test_complete_frames_are_yielded_before_more_is_read():
    data = make_stream(num_frames=3)
    file = io.BytesIO(data[: header_end(data) + 30])  # two frames and a half
    reader = CodeStreamReader(lambda size: file.read(size) or pytest.fail("it waits for more"), max_frames=8)
    codes, num_samples = next(iter(reader))
    assert (codes.shape, num_samples) == ((8, 2), 2 * 1920)


@pytest.mark.parametrize("sizes", READS)
@pytest.mark.parametrize("num_last", [0, 700])
def test_a_stream_cut_short_at_any_byte(num_last: int, sizes: tuple[int, ...]):
    data = make_stream(num_frames=4, num_last=num_last)
    frames, start = parse(data)[1], header_end(data)
    for end in range(1, start):
        with pytest.raises(ValueError, match="the input is not a code stream"):
            CodeStreamReader(pipe(data[:end], *sizes), 3)
    for end in range(start, len(data)):
        whole, rest = divmod(end - start, 12)
        whole = min(whole, 4)  # the last packet of one with a tail is longer
        where = "inside a frame" if rest or end - start > 4 * 12 else "without its end mark"
        error = f"the code stream was cut short: it ends {where}"
        assert read_stream(pipe(data[:end], *sizes)) == (frames[:whole], whole * 1920, error)


# damaged streams


def frames_before(error: str, data: bytes, sizes: tuple[int, ...]) -> int:
    """How many frames are read from damaged data before this error."""
    frames, num_samples, found = read_stream(pipe(data, *sizes))
    assert error in found
    assert frames == make_codes(SPEC, 4 * 1920).T.tolist()[: len(frames)]
    assert num_samples == len(frames) * 1920
    return len(frames)


@pytest.mark.parametrize("sizes", READS)
@pytest.mark.parametrize("letter", [b"X", b"f", b"\0", b"\xff"])
def test_a_damaged_letter(letter: bytes, sizes: tuple[int, ...]):
    data = make_stream(num_frames=4)
    for i in range(5):
        start = header_end(data) + 12 * i
        damaged = data[:start] + letter + data[start + 1 :]
        assert (
            frames_before(f"damaged: a packet must begin with F, L or E, got {letter!r}", damaged, sizes) == i
        )


@pytest.mark.parametrize("sizes", READS)
@pytest.mark.parametrize("num_last", [0, 1920, 1921, 2**32 - 1])
def test_a_last_frame_of_an_impossible_length(num_last: int, sizes: tuple[int, ...]):
    data = make_stream(num_frames=2)[:-1] + b"L" + struct.pack("<I", num_last) + bytes(11)
    assert frames_before(f"a short last frame must have 1 to 1919 samples, got {num_last}", data, sizes) == 2


@pytest.mark.parametrize("sizes", READS)
@pytest.mark.parametrize("is_last", [False, True])
def test_a_code_out_of_range(is_last: bool, sizes: tuple[int, ...]):
    spec = dataclasses.replace(SPEC, codebook_size=1000, num_codebooks=1)
    header, *_ = write_stream(spec, np.zeros((1, 0), int), 0)
    good, bad = 999 << 6, 1000 << 6  # 10 bits, and 6 zeros that fill the byte
    packets = [struct.pack(">cH", b"F", number) for number in (good, good, bad)] + [b"E"]
    if is_last:
        packets[2:] = [b"L" + struct.pack("<I", 5) + struct.pack(">H", bad)]
    error = "codes must lie in [0, 1000), got 1000 to 1000"
    assert read_stream(pipe(header + b"".join(packets), *sizes)) == ([[999], [999]], 2 * 1920, error)


@pytest.mark.parametrize("sizes", READS)
@pytest.mark.parametrize("num_last", [0, 700])
def test_data_after_the_end(num_last: int, sizes: tuple[int, ...]):
    data = make_stream(num_frames=2, num_last=num_last)
    _, frames, num_samples = parse(data)
    error = "the code stream goes on after its end; send only one stream through a pipe"
    for more in (b"\0", b"E", data):
        assert read_stream(pipe(data + more, *sizes)) == (frames, num_samples, error)


def test_a_frame_after_the_end_is_refused_later_too():
    data, parser = make_stream(num_frames=2), CodeStreamParser()
    list(parser.feed(data))
    with pytest.raises(ValueError, match="the code stream goes on after its end"):
        list(parser.feed(data[-14:-1]))


FIELDS = {"format": "mimi_jax.code_stream", "version": "1", **dataclasses.asdict(SPEC)}


def with_header(header: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header + b"E"


def refused(data: bytes) -> str:
    """The reason why these bytes are not a code stream."""
    with pytest.raises(ValueError, match=r"^the input is not a code stream from .* a code file$") as info:
        CodeStreamReader(pipe(data, 100), 1)
    return str(info.value.__cause__)


GARBAGE = {
    "text": b"This is no code stream.\nIt goes on.\n",
    "audio": b"RIFF\x24\0\0\0WAVEfmt ",
    "noise": np.random.default_rng(0).bytes(1000),
    "zeros": bytes(1000),
    "endless": struct.pack("<Q", 2**64 - 1) + b"{" * 1000,
    "too long": with_header(json.dumps(FIELDS).encode().ljust(1 << 17)),
    "empty": with_header(b""),
    "not closed": with_header(b"{"),
    "deep": with_header(b"[" * 60_000),
    "no text": with_header(b"\xff{}"),
    "list": with_header(b"[]"),
    "null": with_header(b"null"),
    "string": with_header(b'"format"'),
    "number": with_header(b"NaN"),
    "no fields": with_header(b"{}"),
}


def test_an_empty_input_is_refused():
    with pytest.raises(
        ValueError, match="the input is empty: the program before this one wrote no code stream"
    ):
        CodeStreamReader(pipe(b"", 1), 1)


@pytest.mark.parametrize("name", GARBAGE)
def test_garbage_is_refused(name: str):
    refused(GARBAGE[name])


@pytest.mark.parametrize("name", FIELDS)
@pytest.mark.parametrize("value", [None, [], {}, "", -1, 1.5])
def test_a_header_with_a_wrong_field(name: str, value: Any):
    assert CodeStreamReader(pipe(with_header(json.dumps(FIELDS).encode()), 1), 1).spec == SPEC
    reason = refused(with_header(json.dumps({**FIELDS, name: value}).encode()))
    if name in ("format", "version"):
        assert reason == "it must be mimi_jax.code_stream, version 1"
    else:
        assert reason.startswith(f"{name} must be a ")


@pytest.mark.parametrize("name", FIELDS)
def test_a_header_without_a_field(name: str):
    fields = {key: value for key, value in FIELDS.items() if key != name}
    assert name in refused(with_header(json.dumps(fields).encode()))


@pytest.mark.parametrize(
    ("field", "reason"),
    [
        ({"format": "mimi_jax.codes"}, "it must be mimi_jax.code_stream, version 1"),
        ({"version": "2"}, "it must be mimi_jax.code_stream, version 1"),
        ({"version": 1}, "it must be mimi_jax.code_stream, version 1"),
        ({"loudness": 3}, "unexpected keyword argument 'loudness'"),
        ({"num_codebooks": "8"}, "num_codebooks must be a positive integer, got '8'"),
        ({"num_codebooks": 0}, "num_codebooks must be a positive integer, got 0"),
        ({"codebook_size": 65537}, "codebook_size must be at most 65536, got 65537"),
        ({"codebook_size": 10**30}, "codebook_size must be at most 65536, got 1000000"),
        ({"sampling_rate": float("inf")}, "sampling_rate must be a positive integer, got inf"),
    ],
)
def test_a_header_of_something_else(field: dict[str, Any], reason: str):
    assert reason in refused(with_header(json.dumps({**FIELDS, **field}).encode()))


def test_huge_numbers_cost_no_memory():
    fields = {**FIELDS, "frame_size": 10**30, "num_codebooks": 10**30, "sampling_rate": 10**30}
    data = with_header(json.dumps(fields).encode())[:-1] + b"F"
    assert read_stream(pipe(data, 100)) == ([], 0, "the code stream was cut short: it ends inside a frame")


# the writer


def test_nothing_can_follow_a_short_last_frame():
    written: list[bytes] = []
    writer = CodeStreamWriter(written.append, SPEC)
    writer.write(make_codes(SPEC, 1921), 1921)
    before = list(written)
    with pytest.raises(ValueError, match="the last frame was shorter than frame_size, so it ended the clip"):
        writer.write(make_codes(SPEC, 1920), 1920)
    writer.close()
    assert written == before


@pytest.mark.parametrize(
    ("codes", "error"),
    [
        (np.zeros((7, 1), int), r"audio_codes must be \[8, 1\], .* got \[7, 1\]"),
        (np.zeros((8, 2), int), r"audio_codes must be \[8, 1\], .* got \[8, 2\]"),
        (np.full((8, 1), 2048), r"codes must lie in \[0, 2048\), got 2048 to 2048"),
        (np.full((8, 1), -1), r"codes must lie in \[0, 2048\), got -1 to -1"),
        (np.zeros((8, 1)), "codes must be integers, got float64"),
    ],
)
def test_wrong_codes_do_not_change_a_stream(codes: np.ndarray, error: str):
    written: list[bytes] = []
    writer = CodeStreamWriter(written.append, SPEC)
    for num_samples in (1920, 5):
        with pytest.raises(ValueError, match=error):
            writer.write(codes, num_samples)
    writer.write(make_codes(SPEC, 1920), 1920)
    writer.close()
    assert b"".join(written) == make_stream(num_frames=1)
