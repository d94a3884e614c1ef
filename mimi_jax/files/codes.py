"""Code files: the codes of one clip on disk, packed to the bit rate of the codec.

A code file is a safetensors file. It begins with the length of its header (8 bytes, little-endian) and the
header (JSON). The metadata in the header are strings:

    format         "mimi_jax.codes"
    version        "1"
    model_id       identity of the codebooks that made the codes
    sampling_rate  Hz
    num_samples    exact length of the clip, before any padding
    frame_size     samples per frame
    codebook_size  codes lie in [0, codebook_size)
    num_codebooks  codes per frame, semantic first
    num_frames     ceil(num_samples / frame_size)

The file holds one tensor, `audio_codes`, uint8 [ceil(num_frames * num_codebooks * bits / 8)]. Here `bits` is
the number of binary digits of codebook_size - 1, at least 1; it is 11 for 2048 codes. The bytes form one
stream of bits, and the most significant bit of each byte comes first. The stream holds the codes as unsigned
numbers of `bits` bits each, most significant bit first, without gaps. The order is frame 0 from the first
codebook to the last, then frame 1, and so on, so code k of frame t begins at bit
(t * num_codebooks + k) * bits. Zeros fill the last byte.
"""

import contextlib
import dataclasses
import json
import math
import os
import struct
from collections.abc import Iterator, Sequence
from numbers import Integral
from typing import BinaryIO

import numpy as np
from safetensors import SafetensorError, safe_open

from mimi_jax.config import ceil_div
from mimi_jax.files.atomic import atomic_path

FORMAT = "mimi_jax.codes"
VERSION = "1"
MAX_BITS = 16
PARTIAL_FRAME = "the last frame was shorter than frame_size, so it ended the clip; nothing can follow it"
MAX_COUNT = 2**63  # the largest number that the header has room for
FRAMES_AT_ONCE = 4096  # a multiple of 8, so that what is read at once begins and ends on a whole byte


@dataclasses.dataclass(frozen=True)
class CodeSpec:
    """What the codes in a file or a stream mean.

    `mimi_jax.checkpoint.identity.code_spec(model)` makes the spec of a model's codes.

    Args:
        model_id: identity of the codebooks. Codes of the first codebooks alone have another identity.
        sampling_rate: Hz.
        frame_size: samples per frame.
        codebook_size: codes lie in [0, codebook_size); at most 65536.
        num_codebooks: codes per frame, semantic first.

    Raises:
        ValueError: a number is not a positive integer, `codebook_size` is too large, or `model_id` is not a
            string or is empty.
    """

    model_id: str
    sampling_rate: int
    frame_size: int
    codebook_size: int
    num_codebooks: int

    def __post_init__(self):
        for field in dataclasses.fields(self)[1:]:
            _check_count(field.name, getattr(self, field.name))
        if self.codebook_size > 2**MAX_BITS:
            raise ValueError(f"codebook_size must be at most 65536, got {self.codebook_size}")
        if not isinstance(self.model_id, str) or not self.model_id:
            raise ValueError(f"model_id must be a string that is not empty, got {self.model_id!r}")

    @property
    def bits(self) -> int:
        """Bits per code in a file or a stream."""
        return code_bits(self.codebook_size)

    @property
    def frame_rate(self) -> float:
        """Frames per second."""
        return self.sampling_rate / self.frame_size

    @property
    def kbits(self) -> float:
        """The bit rate in kbit/s. If codebook_size is not a power of 2, a file takes a little more."""
        return self.num_codebooks * math.log2(self.codebook_size) * self.frame_rate / 1000

    def num_frames(self, num_samples: int) -> int:
        """How many frames a clip of `num_samples` samples has."""
        return ceil_div(num_samples, self.frame_size)

    def check(self, codes: np.ndarray, num_samples: int) -> None:
        """Raise ValueError unless `codes` are [codebooks, frames] for a clip of `num_samples` samples."""
        num_frames = self.num_frames(num_samples)
        if codes.shape != (self.num_codebooks, num_frames):
            raise ValueError(
                f"audio_codes must be [{self.num_codebooks}, {num_frames}], as {num_samples} samples are "
                f"{num_frames} frames of {self.frame_size}, got {list(codes.shape)}"
            )
        check_range(codes, self.codebook_size)


@dataclasses.dataclass(frozen=True, eq=False)
class CodeFile:
    """The contents of a code file.

    Args:
        spec: what the codes mean.
        audio_codes: integers [codebooks, frames] in [0, spec.codebook_size); kept as int32.
        num_samples: exact length of the clip; `frames` is ceil(num_samples / spec.frame_size).

    Raises:
        ValueError: `num_samples` is not a positive integer, or the codes do not fit the spec and the length.
    """

    spec: CodeSpec
    audio_codes: np.ndarray
    num_samples: int

    def __post_init__(self):
        codes = np.asarray(self.audio_codes)
        _check_count("num_samples", self.num_samples)
        self.spec.check(codes, int(self.num_samples))
        object.__setattr__(self, "audio_codes", codes.astype(np.int32))


def is_code_file(path: str | os.PathLike[str]) -> bool:
    """Whether the metadata of a file say that it is a code file. False if there is no such file."""
    try:
        with safe_open(os.path.expanduser(path), framework="numpy") as file:
            return (file.metadata() or {}).get("format") == FORMAT
    except (SafetensorError, OSError):
        return False


def save_codes(path: str | os.PathLike[str], codes: CodeFile) -> None:
    """Write a code file, whole or not at all. The same codes give the same bytes.

    Raises:
        OSError: the file cannot be written.
    """
    with code_writer(path, codes.spec) as writer:
        writer.write(codes.audio_codes, int(codes.num_samples))


@contextlib.contextmanager
def code_writer(path: str | os.PathLike[str], spec: CodeSpec) -> Iterator["CodeWriter"]:
    """`save_codes` in pieces: the file appears when the `with` block ends, and not at all if it raises."""
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        writer = CodeWriter(file, spec)
        yield writer
        writer.close()


class CodeWriter:
    """Writes the codes of a clip to an open file: the codes piece by piece, then the header.

    `num_samples` and `num_frames` say how much has been written.
    """

    def __init__(self, file: BinaryIO, spec: CodeSpec):
        self._file, self._spec = file, spec
        self._pending = np.zeros(0, np.int32)  # codes that do not yet fill whole bytes
        self.num_samples = self.num_frames = self._num_bytes = 0
        self._header_size = len(_header(spec, MAX_COUNT, MAX_COUNT, MAX_COUNT))
        file.seek(8 + self._header_size)

    def write(self, codes: np.ndarray, num_samples: int) -> None:
        """Append codes [codebooks, frames] of `num_samples` samples.

        Raises:
            ValueError: the codes do not fit the spec, or the frame before them was shorter than a frame.
        """
        if self.num_samples % self._spec.frame_size:
            raise ValueError(PARTIAL_FRAME)
        self._spec.check(codes, num_samples)
        self.num_samples += num_samples
        self.num_frames += codes.shape[1]
        numbers = np.concatenate([self._pending, codes.T.ravel()])
        whole = len(numbers) // 8 * 8  # eight codes of any width fill whole bytes
        self._append(numbers[:whole])
        self._pending = numbers[whole:]

    def close(self) -> None:
        """Write the codes that are still pending, and the header."""
        if self.num_samples == 0:
            raise ValueError("a code file must hold the codes of at least one sample, got none")
        self._append(self._pending)
        header = _header(self._spec, self.num_samples, self.num_frames, self._num_bytes)
        self._file.seek(0)
        self._file.write(struct.pack("<Q", self._header_size) + header.ljust(self._header_size))

    def _append(self, numbers: np.ndarray) -> None:
        packed = pack_bits(numbers, self._spec.bits)
        self._num_bytes += packed.size
        self._file.write(packed.tobytes())


def _header(spec: CodeSpec, num_samples: int, num_frames: int, num_bytes: int) -> bytes:
    """The JSON header. Its fields always have the same order, unlike those of safetensors.numpy.save."""
    fields = {**dataclasses.asdict(spec), "num_samples": num_samples, "num_frames": num_frames}
    metadata = {"format": FORMAT, "version": VERSION, **{key: str(value) for key, value in fields.items()}}
    tensor = {"dtype": "U8", "shape": [num_bytes], "data_offsets": [0, num_bytes]}
    header = json.dumps({"__metadata__": metadata, "audio_codes": tensor}).encode()
    return header + b" " * (-len(header) % 8)


def load_codes(path: str | os.PathLike[str]) -> CodeFile:
    """Read a code file and check everything in it.

    Raises:
        OSError: the file is missing (FileNotFoundError), is a folder, or cannot be read.
        ValueError: the file is not a code file, was cut short, or contradicts itself.
    """
    with open_codes(path) as reader:
        codes = np.concatenate([piece for piece, _ in reader], axis=1)
        return CodeFile(reader.spec, codes, reader.num_samples)


@contextlib.contextmanager
def open_codes(path: str | os.PathLike[str]) -> Iterator["CodeReader"]:
    """`load_codes` in pieces, in memory that does not grow with the length of the clip."""
    path = os.path.expanduser(path)
    with contextlib.ExitStack() as stack:
        with _checking(path):
            # safe_open does not always say what is wrong with a path; open() does.
            stack.enter_context(open(path, "rb"))
            reader = CodeReader(stack.enter_context(safe_open(path, framework="numpy")), path)
        yield reader


@contextlib.contextmanager
def _checking(path: str | os.PathLike[str]) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{os.fspath(path)} is not a valid code file: {error}") from error


class CodeReader:
    """An open code file, with its `spec` and its `num_samples`.

    A loop over it yields pairs (codes, num_samples): int32 [codebooks, frames], and how many samples these
    codes stand for.
    """

    def __init__(self, file, path: str | os.PathLike[str]):
        self._path, metadata = path, file.metadata() or {}
        for name, expected in (("format", FORMAT), ("version", VERSION)):
            if metadata.get(name) != expected:
                raise ValueError(f"{name} must be {expected!r}, got {metadata.get(name)!r}")
        names = [field.name for field in dataclasses.fields(CodeSpec)[1:]]
        counts = {name: _count(metadata, name) for name in (*names, "num_samples", "num_frames")}
        self.num_samples, num_frames = counts.pop("num_samples"), counts.pop("num_frames")
        self.spec = CodeSpec(metadata.get("model_id", ""), **counts)
        if list(file.keys()) != ["audio_codes"]:
            raise ValueError(f"it must hold one tensor, audio_codes, got {sorted(file.keys())}")
        self._packed = file.get_slice("audio_codes")
        dtype, count = self._packed.get_dtype(), num_frames * self.spec.num_codebooks
        _check_packed(
            "uint8" if dtype == "U8" else str(dtype), self._packed.get_shape(), self.spec.bits, count
        )
        if num_frames != self.spec.num_frames(self.num_samples):
            raise ValueError(
                f"num_frames must be {self.spec.num_frames(self.num_samples)} for {self.num_samples} samples,"
                f" got {num_frames}"
            )

    def __iter__(self) -> Iterator[tuple[np.ndarray, int]]:
        for start in range(0, self.num_samples, FRAMES_AT_ONCE * self.spec.frame_size):
            num_samples = min(self.num_samples - start, FRAMES_AT_ONCE * self.spec.frame_size)
            with _checking(self._path):
                codes = self._read(start // self.spec.frame_size, self.spec.num_frames(num_samples))
            yield codes, num_samples

    def _read(self, start: int, num_frames: int) -> np.ndarray:
        """int32 [codebooks, frames] from frame `start` on, which must begin on a whole byte."""
        num_codebooks, bits = self.spec.num_codebooks, self.spec.bits
        first = start * num_codebooks * bits // 8
        count = num_frames * num_codebooks
        numbers = unpack_bits(self._packed[first : first + packed_size(bits, count)], bits, count)
        check_range(numbers, self.spec.codebook_size)
        return np.ascontiguousarray(numbers.reshape(num_frames, num_codebooks).T)


def _count(metadata: dict[str, str], name: str) -> int:
    text = metadata.get(name)
    if text is None or not text.isdecimal() or int(text) < 1:
        raise ValueError(f"{name} must be a positive integer, got {text!r}")
    return int(text)


def _check_count(name: str, value: object) -> None:
    if not isinstance(value, Integral) or int(value) < 1:
        raise ValueError(f"{name} must be a positive integer, got {value!r}")


def code_bits(codebook_size: int) -> int:
    """Bits per code in a code file, for codes in [0, codebook_size)."""
    return max(1, (codebook_size - 1).bit_length())


def pack_bits(values: np.ndarray, bits: int) -> np.ndarray:
    """Pack numbers into `bits` bits each, without gaps, most significant bit first.

    Args:
        values: integers [count] in [0, 2**bits).
        bits: 1 to 16.

    Returns:
        uint8 [ceil(count * bits / 8)]; zeros fill the last byte.
    """
    _check_bits(bits)
    check_range(values, 2**bits)
    pairs_of_bytes = values.astype(">u2").view(np.uint8).reshape(-1, 2)
    return np.packbits(np.unpackbits(pairs_of_bytes, axis=1)[:, MAX_BITS - bits :])


def unpack_bits(packed: np.ndarray, bits: int, count: int) -> np.ndarray:
    """The numbers that `pack_bits` packed into `bits` bits each, int32 [count]."""
    _check_bits(bits)
    _check_packed(str(packed.dtype), packed.shape, bits, count)
    digits = np.zeros((count, MAX_BITS), np.uint8)
    digits[:, MAX_BITS - bits :] = np.unpackbits(packed, count=count * bits).reshape(count, bits)
    return np.packbits(digits, axis=1).view(">u2").ravel().astype(np.int32)


def packed_size(bits: int, count: int) -> int:
    """How many bytes `count` codes take."""
    return ceil_div(count * bits, 8)


def _check_packed(dtype: str, shape: Sequence[int], bits: int, count: int) -> None:
    size = packed_size(bits, count)
    if (dtype, list(shape)) != ("uint8", [size]):
        raise ValueError(f"{count} codes of {bits} bits must be uint8 [{size}], got {dtype} {list(shape)}")


def _check_bits(bits: int) -> None:
    if not 1 <= bits <= MAX_BITS:
        raise ValueError(f"bits must be 1 to {MAX_BITS}, got {bits}")


def check_range(values: np.ndarray, limit: int) -> None:
    """Raise ValueError unless `values` are integers in [0, limit)."""
    if values.dtype.kind not in "iu":
        raise ValueError(f"codes must be integers, got {values.dtype}")
    if values.size and not (values.min() >= 0 and values.max() < limit):
        raise ValueError(f"codes must lie in [0, {limit}), got {values.min()} to {values.max()}")
