"""Live audio and codes on pipes: raw PCM, and a code stream, which sends each frame at once.

Raw PCM is little-endian samples at the model's rate with interleaved channels. It has no header.

A code stream begins like a safetensors file, with the length of its header (8 bytes, little-endian) and the
header, a JSON object:

    format         "mimi_jax.code_stream"
    version        "1"
    model_id       identity of the codebooks that made the codes
    sampling_rate  Hz
    frame_size     samples per frame
    codebook_size  codes lie in [0, codebook_size)
    num_codebooks  codes per frame, semantic first

Packets follow. Each begins with a letter:

    F  a frame: its codes, packed as in a code file, with zeros that fill the last byte
    L  the last frame, if it is shorter than frame_size: its number of samples (4 bytes, little-endian), then
       its codes, as in F; the stream ends with this packet
    E  the end of the stream, after a complete frame

So 8 codebooks of 2048 codes take 12 bytes every 80 ms. A frame can be decoded when it arrives, and a reader
can tell a stream that was cut short from one that has ended.
"""

import dataclasses
import json
import struct
from collections.abc import Callable, Iterator

import numpy as np

from mimi_jax.files.audio import to_int16
from mimi_jax.files.codes import PARTIAL_FRAME, CodeSpec, check_range, pack_bits, packed_size, unpack_bits
from mimi_jax.streams.sniff import check_floats, check_is_pcm

FORMAT = "mimi_jax.code_stream"
VERSION = "1"
MAX_HEADER_BYTES = 1 << 16
FRAMES_AT_ONCE = 32  # that a parser gives at once, however many there are, so that others get their turn
PCM_FORMATS = {"s16le": np.dtype("<i2"), "f32le": np.dtype("<f4")}  # ffmpeg's names

NO_CODE_STREAM = "the input is not a code stream from `mimi-jax encode -`; give the path of a code file"

Write = Callable[[bytes], object]
# Returns bytes as soon as there are any, at most as many as it is asked for, and b"" at the end.
Read = Callable[[int], bytes]


def read_pcm(
    read: Read, pcm_format: str | None, channels: int, frame_size: int, max_frames: int
) -> Iterator[np.ndarray]:
    """Read raw PCM as it arrives. A last sample that is not complete is left out.

    The first frame is yielded once all of it has arrived, since its bytes show whether they are PCM at all.
    This takes no time from a live stream: there are no codes before the first frame.

    Args:
        read: returns the next bytes.
        pcm_format: a name in `PCM_FORMATS`; None for s16le, unless the first bytes show that they are not.
        channels: of the audio.
        frame_size: samples per frame.
        max_frames: the most frames to yield at once.

    Yields:
        float32 [channels, samples].

    Raises:
        ValueError: the first bytes are not PCM, or samples in floats are NaN, infinite or huge.
    """
    dtype = PCM_FORMATS[pcm_format or "s16le"]
    size = dtype.itemsize * channels
    frame, most = frame_size * size, max_frames * frame_size * size  # bytes
    data = b""
    while len(data) < frame and (more := read(most - len(data))):
        data += more
    check_is_pcm(data[:frame], pcm_format)
    while True:
        whole = len(data) // size * size
        if whole:
            yield from_pcm(data[:whole], pcm_format or "s16le", channels)
        if not (more := read(most)):
            return
        data = data[whole:] + more


def from_pcm(data: bytes, pcm_format: str, channels: int) -> np.ndarray:
    """Convert raw PCM of whole samples to float32 [channels, samples].

    Raises:
        ValueError: samples in floats are NaN, infinite or huge.
    """
    dtype = PCM_FORMATS[pcm_format]
    samples = np.frombuffer(data, dtype).reshape(-1, channels).T
    if dtype.kind == "i":
        return samples / np.float32(32768)
    check_floats(samples)
    return samples.astype(np.float32)


def to_pcm(audio: np.ndarray, pcm_format: str) -> bytes:
    """Convert float [channels, samples] to raw PCM. 16-bit samples are clipped to [-1, 1]."""
    dtype = PCM_FORMATS[pcm_format]
    samples = to_int16(audio.T) if dtype.kind == "i" else audio.T
    return samples.astype(dtype).tobytes()


class CodeStreamWriter:
    """Writes a code stream, and sends each frame at once.

    Args:
        write: takes the next bytes.
        spec: what the codes mean.
    """

    def __init__(self, write: Write, spec: CodeSpec):
        self._write, self._spec, self._is_open = write, spec, True
        header = json.dumps(
            {"format": FORMAT, "version": VERSION, **dataclasses.asdict(spec)}, default=int
        ).encode()
        write(struct.pack("<Q", len(header)) + header)

    def write(self, codes: np.ndarray, num_samples: int) -> None:
        """Send codes [codebooks, frames] of `num_samples` samples.

        Raises:
            ValueError: the codes do not fit the spec, or the frame before them was shorter than a frame,
                which ended the stream.
        """
        if not self._is_open:
            raise ValueError(PARTIAL_FRAME)
        self._spec.check(codes, num_samples)
        num_last = num_samples % self._spec.frame_size
        packets = [b"F" + pack_bits(frame, self._spec.bits).tobytes() for frame in codes.T]
        if num_last:
            packets[-1] = b"L" + struct.pack("<I", num_last) + packets[-1][1:]
            self._is_open = False
        self._write(b"".join(packets))

    def close(self) -> None:
        """End the stream, unless a short last frame has ended it."""
        if self._is_open:
            self._write(b"E")
            self._is_open = False


class CodeStreamParser:
    """Takes the bytes of a code stream as they come, and gives its frames.

    Args:
        spec: the header, if another parser has taken it.
        rest: what that parser had left.

    Attributes:
        spec: the header, once it has come.
        rest: bytes that do not make a frame yet.
        has_ended: whether the end of the stream has come.
    """

    def __init__(self, spec: CodeSpec | None = None, rest: bytes = b"") -> None:
        self.spec, self.rest, self.has_ended = spec, rest, False

    @property
    def missing(self) -> int:
        """How many bytes of the header are missing, as far as is known."""
        have = len(self.rest)
        return 8 - have if have < 8 else 8 + struct.unpack("<Q", self.rest[:8])[0] - have

    def feed(self, data: bytes) -> Iterator[tuple[np.ndarray, int]]:
        """Take the next bytes.

        Yields:
            The frames that they complete, at most FRAMES_AT_ONCE: int32 [codebooks, frames], and how many
            samples these stand for.

        Raises:
            ValueError: the bytes are no code stream, are damaged, or go on after its end. All complete frames
                before that were yielded.
        """
        if self.spec is not None:
            self.rest += data
        elif not self.feed_header(data):
            return
        assert self.spec is not None
        size = 1 + packed_size(self.spec.bits, self.spec.num_codebooks)  # of a packet
        while frames := self._take_frames(size):
            yield np.concatenate(frames, axis=1), len(frames) * self.spec.frame_size
        yield from self._take_end(4 + size)

    def feed_header(self, data: bytes) -> bool:
        """Take the next bytes while `spec` is None. Returns whether the header is complete.

        What comes after the header stays in `rest`, until `feed` takes more bytes or none.

        Raises:
            ValueError: the bytes are no code stream.
        """
        self.rest += data
        return self._take_header()

    def close(self) -> None:
        """Say that no more bytes come.

        Raises:
            ValueError: the stream was cut short.
        """
        if self.spec is None:
            raise ValueError(NO_CODE_STREAM) from ValueError("it ends inside its header")
        if not self.has_ended:
            where = "inside a frame" if self.rest else "without its end mark"
            raise ValueError(f"the code stream was cut short: it ends {where}")

    def _take_frames(self, size: int) -> list[np.ndarray]:
        """Take the next whole frames, of `size` bytes each."""
        frames, start = [], 0
        while (
            not self.has_ended
            and len(frames) < FRAMES_AT_ONCE
            and self.rest[start : start + 1] == b"F"
            and len(self.rest) >= start + size
        ):
            try:
                frames.append(self._unpack(self.rest[start + 1 : start + size]))
            except ValueError:
                if not frames:
                    raise
                break  # those before it are given first
            start += size
        self.rest = self.rest[start:]
        return frames

    def _take_end(self, size: int) -> Iterator[tuple[np.ndarray, int]]:
        """Take the last packet, if it is there. A short last frame has `size` bytes."""
        kind = self.rest[:1]
        if not self.has_ended and kind == b"L" and len(self.rest) >= size:
            self.has_ended = True
            last, self.rest = self.rest[1:size], self.rest[size:]
            yield self._last_frame(last)
        elif not self.has_ended and kind == b"E":
            self.has_ended, self.rest = True, self.rest[1:]
        elif not self.has_ended and kind not in (b"", b"F", b"L"):
            raise ValueError(f"the code stream is damaged: a packet must begin with F, L or E, got {kind!r}")
        if self.has_ended and self.rest:
            raise ValueError("the code stream goes on after its end; send only one stream through a pipe")

    def _last_frame(self, data: bytes) -> tuple[np.ndarray, int]:
        assert self.spec is not None
        (num_samples,) = struct.unpack("<I", data[:4])
        if not 0 < num_samples < self.spec.frame_size:
            raise ValueError(
                f"the code stream is damaged: a short last frame must have 1 to {self.spec.frame_size - 1}"
                f" samples, got {num_samples}"
            )
        return self._unpack(data[4:]), num_samples

    def _unpack(self, data: bytes) -> np.ndarray:
        """Unpack the codes of a frame, int32 [codebooks, 1]."""
        assert self.spec is not None
        codes = unpack_bits(np.frombuffer(data, np.uint8), self.spec.bits, self.spec.num_codebooks)[:, None]
        check_range(codes, self.spec.codebook_size)
        return codes

    def _take_header(self) -> bool:
        """Take the header, if all of it is there."""
        if len(self.rest) < 8:
            return False
        (size,) = struct.unpack("<Q", self.rest[:8])
        if size <= MAX_HEADER_BYTES and len(self.rest) < 8 + size:
            return False
        try:
            fields = json.loads(self.rest[8 : 8 + size]) if size <= MAX_HEADER_BYTES else {}
            if (fields.pop("format"), fields.pop("version")) != (FORMAT, VERSION):
                raise ValueError(f"it must be {FORMAT}, version {VERSION}")
            self.spec = CodeSpec(**fields)
        except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
            raise ValueError(NO_CODE_STREAM) from error
        self.rest = self.rest[8 + size :]
        return True


class CodeStreamReader:
    """Reads a code stream, whose header is `spec`.

    A loop over it yields frames as they arrive: pairs (codes, num_samples), int32 [codebooks, frames] and how
    many samples these codes stand for.

    Args:
        read: returns the next bytes.
        max_frames: the most frames to yield at once.

    Raises:
        ValueError: the bytes are not a code stream, or it is damaged, or it ends before its end mark. The
            loop yields all complete frames before that.
    """

    def __init__(self, read: Read, max_frames: int):
        self._read, self._parser = read, CodeStreamParser()
        data = read(8)
        if not data:
            raise ValueError("the input is empty: the program before this one wrote no code stream")
        # Not a byte more than the header is read here, so that no frame is taken before the loop begins.
        while not self._parser.feed_header(data):
            if not (data := read(self._parser.missing)):
                self._parser.close()
        assert self._parser.spec is not None
        self.spec = self._parser.spec
        self._size = max_frames * (1 + packed_size(self.spec.bits, self.spec.num_codebooks))

    def __iter__(self) -> Iterator[tuple[np.ndarray, int]]:
        while data := self._read(1 if self._parser.has_ended else self._size):
            yield from self._parser.feed(data)
        self._parser.close()
