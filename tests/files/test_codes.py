"""Code files are read as they were saved, have the size that the bit rate promises, and are checked."""

import dataclasses
import hashlib
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from mimi_jax.files.codes import (
    CodeFile,
    CodeSpec,
    code_bits,
    is_code_file,
    load_codes,
    pack_bits,
    save_codes,
    unpack_bits,
)

SPEC = CodeSpec(
    "sha256:0123456789abcdef", sampling_rate=24_000, frame_size=1920, codebook_size=2048, num_codebooks=8
)


def make_codes(num_codebooks: int = 8, num_samples: int = 100_000, codebook_size: int = 2048) -> CodeFile:
    spec = dataclasses.replace(SPEC, num_codebooks=num_codebooks, codebook_size=codebook_size)
    codes = np.random.default_rng(0).integers(
        codebook_size, size=(num_codebooks, spec.num_frames(num_samples))
    )
    return CodeFile(spec, codes, num_samples)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "clip.safetensors"


@st.composite
def numbers_and_bits(draw: st.DrawFn) -> tuple[list[int], int]:
    bits = draw(st.integers(1, 16))
    return draw(st.lists(st.integers(0, 2**bits - 1), max_size=50)), bits


@given(numbers_and_bits())
def test_packing_writes_the_bits_one_after_the_other(case: tuple[list[int], int]):
    numbers, bits = case
    packed = pack_bits(np.array(numbers, np.int32), bits)
    text = "".join(f"{number:0{bits}b}" for number in numbers)
    assert "".join(f"{byte:08b}" for byte in packed) == text + "0" * (-len(text) % 8)
    unpacked = unpack_bits(packed, bits, len(numbers))
    assert unpacked.dtype == np.int32
    assert unpacked.tolist() == numbers


@pytest.mark.parametrize(
    ("values", "bits", "error"),
    [
        ([2048], 11, r"codes must lie in \[0, 2048\), got 2048 to 2048"),
        ([-1, 3], 11, r"codes must lie in \[0, 2048\), got -1 to 3"),
        ([0.5], 11, "codes must be integers, got float64"),
        ([0], 0, "bits must be 1 to 16, got 0"),
        ([0], 17, "bits must be 1 to 16, got 17"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(values: list, bits: int, error: str):
    with pytest.raises(ValueError, match=error):
        pack_bits(np.array(values), bits)


def test_unpacking_needs_the_exact_number_of_bytes():
    with pytest.raises(ValueError, match=r"8 codes of 11 bits must be uint8 \[11\], got uint8 \[12\]"):
        unpack_bits(np.zeros(12, np.uint8), 11, 8)


@pytest.mark.parametrize(
    ("codebook_size", "bits"), [(1, 1), (2, 1), (3, 2), (1024, 10), (1025, 11), (2048, 11), (65536, 16)]
)
def test_bits_per_code(codebook_size: int, bits: int):
    assert code_bits(codebook_size) == bits


@pytest.mark.parametrize("codebook_size", [1, 2, 1000, 2048, 65536])
@pytest.mark.parametrize("num_codebooks", [1, 8, 32])
@pytest.mark.parametrize("num_samples", [1, 1920, 1921, 100_000])
def test_codes_are_read_as_they_were_saved(
    path: Path, num_codebooks: int, num_samples: int, codebook_size: int
):
    saved = make_codes(num_codebooks, num_samples, codebook_size)
    save_codes(path, saved)
    loaded = load_codes(path)
    np.testing.assert_array_equal(loaded.audio_codes, saved.audio_codes)
    assert loaded.audio_codes.dtype == np.int32
    assert (loaded.spec, loaded.num_samples) == (saved.spec, saved.num_samples)


def test_eight_codebooks_cost_1100_bits_a_second(path: Path):
    seconds = 80
    codes = make_codes(8, seconds * 24_000)
    save_codes(path, codes)
    (header_size,) = struct.unpack("<Q", path.read_bytes()[:8])
    assert path.stat().st_size - 8 - header_size == 1100 * seconds // 8
    assert header_size < 512


def test_the_bytes_of_a_file_never_change(path: Path):
    """The format is in files that people keep. A renamed module once changed the name of the format."""
    codes = (97 * np.arange(21) % 2048).reshape(3, 7)
    spec = CodeSpec("0123456789abcdef", 24_000, 1920, 2048, 3)
    save_codes(path, CodeFile(spec, codes, 7 * 1920 - 5))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert digest == "5d72ebb6a2f2feb20dc780e382530229d3ddeaf19971b1dedebd87e7ab9f81ad"


def test_the_file_reads_without_this_package(path: Path):
    codes = make_codes(num_codebooks=3, num_samples=5 * 1920)
    save_codes(path, codes)
    data = path.read_bytes()
    header_end = 8 + int.from_bytes(data[:8], "little")
    metadata = json.loads(data[8:header_end])["__metadata__"]
    assert metadata == {
        "format": "mimi_jax.codes",
        "version": "1",
        "model_id": "sha256:0123456789abcdef",
        "sampling_rate": "24000",
        "num_samples": "9600",
        "frame_size": "1920",
        "codebook_size": "2048",
        "num_codebooks": "3",
        "num_frames": "5",
    }
    assert load_file(path)["audio_codes"].tobytes() == data[header_end:]
    bits = "".join(f"{byte:08b}" for byte in data[header_end:])
    for t in range(5):
        for k in range(3):
            start = (t * 3 + k) * 11
            assert int(bits[start : start + 11], 2) == codes.audio_codes[k, t]


def test_the_same_codes_give_the_same_bytes(tmp_path: Path):
    save_codes(tmp_path / "a", make_codes())
    save_codes(tmp_path / "b", make_codes())
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"sampling_rate": 24e3}, "sampling_rate must be a positive integer, got 24000.0"),
        ({"frame_size": -1}, "frame_size must be a positive integer, got -1"),
        ({"codebook_size": 65537}, "codebook_size must be at most 65536, got 65537"),
        ({"num_codebooks": 0}, "num_codebooks must be a positive integer, got 0"),
        ({"model_id": ""}, "model_id must be a string that is not empty, got ''"),
        ({"model_id": 3}, "model_id must be a string that is not empty, got 3"),
    ],
)
def test_a_bad_spec_is_refused(changes: dict[str, Any], error: str):
    with pytest.raises(ValueError, match=error):
        dataclasses.replace(SPEC, **changes)


def test_rates_of_a_spec():
    assert (SPEC.frame_rate, SPEC.bits) == (12.5, 11)
    assert SPEC.kbits == pytest.approx(1.1)
    assert dataclasses.replace(SPEC, num_codebooks=32, codebook_size=1024).kbits == pytest.approx(4)


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"num_samples": 0}, "num_samples must be a positive integer, got 0"),
        ({"num_samples": 1921}, r"audio_codes must be \[8, 2\], .* got \[8, 1\]"),
        ({"spec": dataclasses.replace(SPEC, num_codebooks=7)}, r"must be \[7, 1\], .* got \[8, 1\]"),
        ({"spec": dataclasses.replace(SPEC, codebook_size=2)}, r"codes must lie in \[0, 2\)"),
        ({"audio_codes": np.zeros((1, 8, 1), int)}, r"audio_codes must be .* got \[1, 8, 1\]"),
        ({"audio_codes": np.zeros((0, 1), int)}, r"audio_codes must be .* got \[0, 1\]"),
        ({"audio_codes": np.zeros((8, 1))}, "codes must be integers, got float64"),
        ({"audio_codes": np.full((8, 1), 2048)}, r"codes must lie in \[0, 2048\), got 2048 to 2048"),
    ],
)
def test_codes_that_contradict_themselves_are_refused(changes: dict[str, Any], error: str):
    good = make_codes(num_samples=1920)
    with pytest.raises(ValueError, match=error):
        dataclasses.replace(good, **changes)


def rewrite(path: Path, **changes: str | None) -> None:
    """Save good codes, then change metadata; None removes a key."""
    save_codes(path, make_codes(2, 5 * 1920, codebook_size=1000))
    header_end = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    metadata = json.loads(path.read_bytes()[8:header_end])["__metadata__"] | changes
    save_file(load_file(path), path, {key: text for key, text in metadata.items() if text is not None})


@pytest.mark.parametrize("key", ["num_samples", "frame_size", "sampling_rate", "num_codebooks"])
@pytest.mark.parametrize("text", [None, "", "many", "-1", "0", "1.5", "1e3", "²"])
def test_every_number_is_checked(path: Path, key: str, text: str | None):
    rewrite(path, **{key: text})
    with pytest.raises(ValueError, match=f"{key} must be a positive integer, got {text!r}"):
        load_codes(path)


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"format": "pt"}, "format must be 'mimi_jax.codes', got 'pt'"),
        ({"format": None}, "format must be 'mimi_jax.codes', got None"),
        ({"version": "2"}, "version must be '1', got '2'"),
        ({"model_id": None}, "model_id must be a string that is not empty, got ''"),
        ({"num_samples": "1921"}, "num_frames must be 2 for 1921 samples, got 5"),
        ({"num_samples": "9" * 5000}, "Exceeds the limit"),
        ({"num_frames": "2"}, r"4 codes of 10 bits must be uint8 \[5\], got uint8 \[13\]"),
        ({"num_codebooks": "9" * 30}, "codes of 10 bits must be uint8"),
        ({"codebook_size": "2048"}, r"10 codes of 11 bits must be uint8 \[14\], got uint8 \[13\]"),
        ({"codebook_size": "600"}, r"codes must lie in \[0, 600\)"),
        ({"codebook_size": "65537"}, "codebook_size must be at most 65536, got 65537"),
    ],
)
def test_metadata_that_contradict_the_codes_are_refused(
    path: Path, changes: dict[str, str | None], error: str
):
    rewrite(path, **changes)
    with pytest.raises(ValueError, match=error) as info:
        load_codes(path)
    assert str(info.value).startswith(f"{path} is not a valid code file: ")
    assert "\n" not in str(info.value)


def test_a_code_file_is_known_by_its_metadata(path: Path):
    assert not is_code_file(path)
    assert not is_code_file(path.parent)
    save_codes(path, make_codes())
    assert is_code_file(path)


def write_model(path: Path) -> None:
    save_file({"encoder.weight": np.zeros((2, 3), np.float32)}, path, {"format": "pt"})


def write_extra_tensor(path: Path) -> None:
    rewrite(path)
    header_end = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    metadata = json.loads(path.read_bytes()[8:header_end])["__metadata__"]
    save_file({**load_file(path), "audio": np.zeros(3)}, path, metadata)


@pytest.mark.parametrize(
    ("write", "error"),
    [
        (write_model, "format must be"),
        (write_extra_tensor, r"must hold one tensor, audio_codes, got \['audio', 'audio_codes'\]"),
        (lambda path: path.write_bytes(b""), "header"),
        (lambda path: path.write_text("not a code file\n" * 10), "header"),
        (lambda path: path.write_bytes(np.random.default_rng(0).bytes(1000)), "header"),
    ],
    ids=["model", "extra tensor", "empty", "text", "junk"],
)
def test_other_files_are_refused(path: Path, write: Callable[[Path], object], error: str):
    write(path)
    assert is_code_file(path) == (write is write_extra_tensor)
    with pytest.raises(ValueError, match=f"{path} is not a valid code file: .*{error}") as info:
        load_codes(path)
    assert "\n" not in str(info.value)


def test_a_file_cut_short_anywhere_is_refused(path: Path):
    save_codes(path, make_codes(num_samples=5 * 1920))
    data = path.read_bytes()
    for size in range(len(data)):
        path.write_bytes(data[:size])
        with pytest.raises(ValueError, match="is not a valid code file"):
            load_codes(path)
    path.write_bytes(data + b"\0")
    with pytest.raises(ValueError, match="is not a valid code file"):
        load_codes(path)


def test_missing_files_and_folders_are_os_errors(path: Path):
    with pytest.raises(FileNotFoundError, match=path.name):
        load_codes(path)
    with pytest.raises(IsADirectoryError, match=path.parent.name):
        load_codes(path.parent)
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        save_codes(path.parent / "nowhere" / "a", make_codes())
