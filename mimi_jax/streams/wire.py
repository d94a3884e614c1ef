"""Live audio and codes on pipes: raw PCM, and a stream of codes that gives each frame at once.

Raw PCM has no header: little-endian samples at the model's rate, its channels interleaved.

A code stream begins like a safetensors file: with the length of its header (8 bytes, little-endian) and
the header, one JSON object:

    format         "mimi_jax.code_stream"
    version        "1"
    model_id       identity of the codebooks that these are codes of
    sampling_rate  Hz
    frame_size     samples a frame
    codebook_size  codes lie in [0, codebook_size)
    num_codebooks  codes a frame, semantic first

Packets follow, each of them one letter and what belongs to it:

    F  a frame: its codes, packed as in a code file, the last byte filled up with zeros
    L  the last frame, where it is no whole one: its number of samples (4 bytes, little-endian), then its
       codes; the stream ends with it
    E  the end, after a whole frame

So 8 codebooks of 2048 codes are 12 bytes every 80 ms, each frame can be decoded when it arrives, and a
stream that was cut short is told from one that has ended.
"""

import dataclasses
import json
import struct
from collections.abc import Callable, Iterator

import numpy as np

from mimi_jax.files.audio import to_int16
from mimi_jax.files.codes import PARTIAL_FRAME, CodeSpec, check_range, pack_bits, packed_size, unpack_bits

FORMAT = "mimi_jax.code_stream"
VERSION = "1"
MAX_HEADER_BYTES = 1 << 16
PCM_FORMATS = {"s16le": np.dtype("<i2"), "f32le": np.dtype("<f4")}  # ffmpeg's names
FILE_MARKS = (b"RIFF", b"RF64", b"RIFX", b"FORM", b"fLaC", b"OggS", b"ID3\x03", b"ID3\x04")

Write = Callable[[bytes], object]
# Gives some bytes as soon as there are any, at most as many as it is asked for, and none at the end.
Read = Callable[[int], bytes]


def read_pcm(read: Read, pcm_format: str, channels: int, max_samples: int) -> Iterator[np.ndarray]:
    """Raw PCM as it arrives. A last sample that is not complete is left out.

    Args:
        read: gives its bytes.
        pcm_format: a name in `PCM_FORMATS`.
        max_samples: given at once, where more have arrived.

    Yields:
        float32 [channels, samples].

    Raises:
        ValueError: it begins like an audio file, whose header would be heard as a click.
    """
    dtype = PCM_FORMATS[pcm_format]
    size = dtype.itemsize * channels
    data = read(max_samples * size)
    while 0 < len(data) < 4 and (more := read(4 - len(data))):
        data += more
    if data[:4] in FILE_MARKS:
        raise ValueError(
            f"raw audio has no header, and this is a file that begins with {data[:4]!r}; name it instead"
        )
    while True:
        whole = len(data) // size * size
        samples = np.frombuffer(data[:whole], dtype).reshape(-1, channels).T
        if whole:
            yield samples / np.float32(32768) if dtype.kind == "i" else samples.astype(np.float32)
        if not (more := read(max_samples * size)):
            return
        data = data[whole:] + more


def to_pcm(audio: np.ndarray, pcm_format: str) -> bytes:
    """Raw PCM of float [channels, samples]; 16-bit is clipped to [-1, 1]."""
    dtype = PCM_FORMATS[pcm_format]
    samples = to_int16(audio.T) if dtype.kind == "i" else audio.T
    return samples.astype(dtype).tobytes()


class CodeStreamWriter:
    """Writes a code stream, each frame at once."""

    def __init__(self, write: Write, spec: CodeSpec):
        self._write, self._spec, self._is_open = write, spec, True
        header = json.dumps(
            {"format": FORMAT, "version": VERSION, **dataclasses.asdict(spec)}, default=int
        ).encode()
        write(struct.pack("<Q", len(header)) + header)

    def write(self, codes: np.ndarray, num_samples: int) -> None:
        """Append codes [codebooks, frames] of so many samples; a last frame of fewer ends the stream."""
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
        """End the stream, if its last frame has not done so."""
        if self._is_open:
            self._write(b"E")
            self._is_open = False


class CodeStreamReader:
    """Reads a code stream: `spec` is its header, and a loop over it gives frames as they arrive.

    That is (codes, num_samples) pairs: int32 [codebooks, frames] and the samples that they are of.

    Args:
        read: gives the bytes of the stream.
        max_frames: given at once, where several have arrived.

    Raises:
        ValueError: it is no code stream, or is damaged, or ends before its end mark; whole frames before
            that are given first.
    """

    def __init__(self, read: Read, max_frames: int):
        self._read = read
        self.spec = self._read_header()
        self._packet_size = 1 + packed_size(self.spec.bits, self.spec.num_codebooks)
        self._read_size = max_frames * self._packet_size

    def __iter__(self) -> Iterator[tuple[np.ndarray, int]]:
        data = b""
        while True:
            frames, damage = [], None
            while data[:1] == b"F" and len(data) >= self._packet_size and damage is None:
                try:
                    frames.append(self._unpack(data[1 : self._packet_size]))
                except ValueError as error:
                    damage = error  # raised when what came before it is out
                data = data[self._packet_size :]
            if frames:
                yield np.concatenate(frames, axis=1), len(frames) * self.spec.frame_size
            if damage is not None:
                raise damage
            if data[:1] == b"E":
                break
            if data[:1] == b"L" and len(data) >= 4 + self._packet_size:
                yield self._last_frame(data[1 : 4 + self._packet_size])
                data = data[3 + self._packet_size :]
                break
            if data[:1] not in (b"", b"F", b"L"):
                raise ValueError(f"the code stream is damaged: no packet begins with {data[:1]!r}")
            if not (more := self._read(self._read_size)):
                where = "inside a frame" if data else "without its end mark"
                raise ValueError(f"the code stream was cut short: it ends {where}")
            data += more
        if data[1:] or self._read(1):
            raise ValueError("the code stream goes on after its end; pipe one stream, not several")

    def _last_frame(self, data: bytes) -> tuple[np.ndarray, int]:
        (num_samples,) = struct.unpack("<I", data[:4])
        if not 0 < num_samples < self.spec.frame_size:
            raise ValueError(
                f"the code stream is damaged: its last frame is said to be {num_samples} samples"
            )
        return self._unpack(data[4:]), num_samples

    def _unpack(self, data: bytes) -> np.ndarray:
        """The codes of a frame, int32 [codebooks, 1]."""
        codes = unpack_bits(np.frombuffer(data, np.uint8), self.spec.bits, self.spec.num_codebooks)[:, None]
        check_range(codes, self.spec.codebook_size)
        return codes

    def _read_header(self) -> CodeSpec:
        if not (first := self._read(8)):
            raise ValueError("nothing came in: what comes before in the pipeline has written no code stream")
        try:
            (size,) = struct.unpack("<Q", first + self._read_exactly(8 - len(first)))
            fields = json.loads(self._read_exactly(size)) if size <= MAX_HEADER_BYTES else {}
            if (fields.pop("format"), fields.pop("version")) != (FORMAT, VERSION):
                raise ValueError(f"it is not {FORMAT}, version {VERSION}")
            return CodeSpec(**fields)
        except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
            raise ValueError("the input is not a code stream, which `mimi-jax encode -` makes") from error

    def _read_exactly(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            if not (more := self._read(size - len(data))):
                raise ValueError("it ends inside its header")
            data += more
        return data
