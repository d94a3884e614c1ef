"""Code files: the codes of one clip on disk, at the bitrate that the codec promises.

A code file is a safetensors file, so it begins with the length of its header (8 bytes, little-endian)
and the header (JSON), and its metadata are strings:

    format         "mimi_jax.codes"
    version        "1"
    model_id       identity of the model whose codes these are
    sampling_rate  Hz
    num_samples    exact length of the clip, before any padding
    frame_size     samples a frame
    codebook_size  codes lie in [0, codebook_size)
    num_codebooks  codes a frame, semantic first
    num_frames     ceil(num_samples / frame_size)

It holds one tensor, `audio_codes`, uint8 [ceil(num_frames * num_codebooks * bits / 8)], where `bits` is
the width of codebook_size - 1 in binary and at least 1: 11 for 2048 codes. The bytes are one stream of
bits, the most significant bit of each byte first. In it stand all codes as unsigned numbers of `bits`
bits, most significant bit first, without gaps: the codes of frame 0 from the first codebook to the last,
those of frame 1, and so on. So code k of frame t begins at bit (t * num_codebooks + k) * bits. Zeros
fill the last byte.
"""

import dataclasses
import json
import os
import struct
from numbers import Integral

import numpy as np
from safetensors import SafetensorError, safe_open

from mimi_jax.atomic import atomic_path

FORMAT = "mimi_jax.codes"
VERSION = "1"
MAX_BITS = 16


@dataclasses.dataclass(frozen=True, eq=False)
class CodeFile:
    """What a code file holds.

    Args:
        audio_codes: integers [codebooks, frames] in [0, codebook_size), kept as int32.
        num_samples: exact length of the clip; `frames` is ceil(num_samples / frame_size).
        sampling_rate: Hz.
        codebook_size: at most 65536.
        frame_size: samples a frame.
        model_id: identity of the model whose codes these are.

    Raises:
        ValueError: a field that is not so.
    """

    audio_codes: np.ndarray
    num_samples: int
    sampling_rate: int
    codebook_size: int
    frame_size: int
    model_id: str

    def __post_init__(self):
        for name in ("num_samples", "sampling_rate", "codebook_size", "frame_size"):
            value = getattr(self, name)
            if not isinstance(value, Integral) or value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        if self.codebook_size > 2**MAX_BITS:
            raise ValueError(f"codebook_size must be at most 65536, got {self.codebook_size}")
        if not isinstance(self.model_id, str) or not self.model_id:
            raise ValueError(f"model_id must be a string, not empty, got {self.model_id!r}")
        codes = np.asarray(self.audio_codes)
        num_frames = -(-int(self.num_samples) // int(self.frame_size))
        if codes.ndim != 2 or len(codes) == 0 or codes.shape[1] != num_frames:
            raise ValueError(
                f"audio_codes must be [codebooks, {num_frames}], as {self.num_samples} samples are "
                f"{num_frames} frames of {self.frame_size}, got {list(codes.shape)}"
            )
        _check_range(codes, self.codebook_size)
        object.__setattr__(self, "audio_codes", codes.astype(np.int32))


def save_codes(path: str | os.PathLike[str], codes: CodeFile) -> None:
    """Write a code file, whole or not at all; the same codes give the same bytes.

    Raises:
        OSError: the file cannot be written.
    """
    num_codebooks, num_frames = codes.audio_codes.shape
    packed = pack_bits(codes.audio_codes.T.ravel(), code_bits(codes.codebook_size))
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "model_id": codes.model_id,
        "sampling_rate": str(codes.sampling_rate),
        "num_samples": str(codes.num_samples),
        "frame_size": str(codes.frame_size),
        "codebook_size": str(codes.codebook_size),
        "num_codebooks": str(num_codebooks),
        "num_frames": str(num_frames),
    }
    tensor = {"dtype": "U8", "shape": [packed.size], "data_offsets": [0, packed.size]}
    # Not safetensors.numpy.save, which writes the metadata in a random order.
    header = json.dumps({"__metadata__": metadata, "audio_codes": tensor}).encode()
    header += b" " * (-len(header) % 8)
    with atomic_path(path) as temporary:
        temporary.write_bytes(struct.pack("<Q", len(header)) + header + packed.tobytes())


def load_codes(path: str | os.PathLike[str]) -> CodeFile:
    """Read a code file and check everything in it.

    Raises:
        OSError: the file is missing (FileNotFoundError), a folder, or may not be read.
        ValueError: it is not a code file, was cut short, or contradicts itself.
    """
    try:
        # open() says what is wrong with a path; safe_open does not always.
        with open(path, "rb"), safe_open(path, framework="numpy") as file:
            return _read(file)
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{os.fspath(path)} is not a valid code file: {error}") from error


def _read(file) -> CodeFile:
    """The contents of an open safetensors file."""
    metadata = file.metadata() or {}
    for name, expected in (("format", FORMAT), ("version", VERSION)):
        if metadata.get(name) != expected:
            raise ValueError(f"{name} must be {expected!r}, got {metadata.get(name)!r}")
    counts = {name: _count(metadata, name) for name in ("num_codebooks", "num_frames")}
    fields = {
        name: _count(metadata, name)
        for name in ("num_samples", "sampling_rate", "codebook_size", "frame_size")
    }
    if list(file.keys()) != ["audio_codes"]:
        raise ValueError(f"it must hold one tensor, audio_codes, got {sorted(file.keys())}")
    packed = file.get_tensor("audio_codes")
    num_codebooks, num_frames = counts["num_codebooks"], counts["num_frames"]
    codes = unpack_bits(packed, code_bits(fields["codebook_size"]), num_codebooks * num_frames)
    codes = np.ascontiguousarray(codes.reshape(num_frames, num_codebooks).T)
    return CodeFile(codes, **fields, model_id=metadata.get("model_id", ""))


def _count(metadata: dict[str, str], name: str) -> int:
    text = metadata.get(name)
    if text is None or not text.isdecimal() or int(text) < 1:
        raise ValueError(f"{name} must be a positive integer, got {text!r}")
    return int(text)


def code_bits(codebook_size: int) -> int:
    """Bits that a code in [0, codebook_size) takes in a code file."""
    return max(1, (codebook_size - 1).bit_length())


def pack_bits(values: np.ndarray, bits: int) -> np.ndarray:
    """Write numbers one after the other as `bits` bits each, most significant first.

    Args:
        values: integers [count] in [0, 2**bits).
        bits: 1 to 16.

    Returns:
        uint8 [ceil(count * bits / 8)], the last byte filled up with zeros.
    """
    _check_bits(bits)
    _check_range(values, 2**bits)
    pairs_of_bytes = values.astype(">u2").view(np.uint8).reshape(-1, 2)
    return np.packbits(np.unpackbits(pairs_of_bytes, axis=1)[:, MAX_BITS - bits :])


def unpack_bits(packed: np.ndarray, bits: int, count: int) -> np.ndarray:
    """The int32 [count] numbers that `pack_bits` wrote with `bits` bits each."""
    _check_bits(bits)
    size = -(-count * bits // 8)
    if packed.dtype != np.uint8 or packed.shape != (size,):
        raise ValueError(
            f"{count} codes of {bits} bits must be uint8 [{size}], got {packed.dtype} {list(packed.shape)}"
        )
    digits = np.zeros((count, MAX_BITS), np.uint8)
    digits[:, MAX_BITS - bits :] = np.unpackbits(packed, count=count * bits).reshape(count, bits)
    return np.packbits(digits, axis=1).view(">u2").ravel().astype(np.int32)


def _check_bits(bits: int) -> None:
    if not 1 <= bits <= MAX_BITS:
        raise ValueError(f"bits must be 1 to {MAX_BITS}, got {bits}")


def _check_range(values: np.ndarray, limit: int) -> None:
    """Refuse what is not integers in [0, limit), which packing would change silently."""
    if values.dtype.kind not in "iu":
        raise ValueError(f"codes must be integers, got {values.dtype}")
    if values.size and not (values.min() >= 0 and values.max() < limit):
        raise ValueError(f"codes must lie in [0, {limit}), got {values.min()} to {values.max()}")
