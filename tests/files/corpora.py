"""A small corpus for the tests: two folders with clips of different rates."""

import json
from pathlib import Path

import numpy as np

from mimi_jax import save_audio


def tone(hertz: float, seconds: float, rate: int = 24_000) -> np.ndarray:
    """float32 [1, samples]."""
    return (0.5 * np.sin(2 * np.pi * hertz * np.arange(int(seconds * rate)) / rate)).astype(np.float32)[None]


def write_corpus(folder: Path) -> None:
    """Three clips of 1.5 s in each of the folders "high", at 24 kHz, and "low", at 16 kHz."""
    for source, rate in (("high", 24_000), ("low", 16_000)):
        (folder / source).mkdir()
        for number in range(3):
            audio = tone(300 * (number + 1), 1.5, rate)
            save_audio(folder / source / f"{number}.flac", audio, rate)


def write_manifest(folder: Path, *entries: dict) -> Path:
    manifest = folder / "manifest.jsonl"
    manifest.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return manifest


def without_length(path: Path) -> Path:
    """Make a FLAC file one of unknown length, as programs write it to a pipe."""
    data = bytearray(path.read_bytes())
    data[21] &= 0xF0  # the total has 36 bits
    data[22:26] = bytes(4)
    path.write_bytes(data)
    return path
