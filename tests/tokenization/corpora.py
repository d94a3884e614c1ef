"""Small corpora for the tests, in every form that can be read, and the expected codes."""

import io
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

import mimi_jax
from mimi_jax import Mimi
from mimi_jax.tokenization import read_codes
from mimi_jax.tokenization.inputs import Shard
from mimi_jax.tokenization.plan import make_plan
from mimi_jax.tokenization.sources import Item
from tests.models import check_ties

RATE = 24_000


def noise_clip(num_samples: int, seed: int = 0, channels: int = 1) -> np.ndarray:
    """float32 [channels, samples], quiet enough for every format."""
    generator = np.random.default_rng(seed)
    return (0.1 * generator.normal(size=(channels, num_samples))).clip(-1, 1).astype(np.float32)


def audio_bytes(audio: np.ndarray, rate: int = RATE, form: str = "WAV", **options: Any) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, audio.T, rate, format=form, **options)
    return file.getvalue()


def write_folder(folder: Path, lengths: list[int]) -> None:
    """One WAV file for each length in samples, in two subfolders with the same names."""
    for number, length in enumerate(lengths):
        path = folder / f"speaker {number % 2}" / f"clip_{number // 2:03}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(audio_bytes(noise_clip(length, seed=number)))


def write_tar(path: Path, files: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


def write_parquet(path: Path, rows: list[dict[str, Any] | None]) -> None:
    """A column `audio` in the layout of Hugging Face datasets."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    audio = pa.array(rows, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"audio": audio, "text": ["words"] * len(rows)}), path)


def find_shards(sources: list[Any], **options: Any) -> list[Shard]:
    """The shards of some sources, as a plan has them."""
    return make_plan(sources, **options).shards


def read(shard: Shard) -> list[Item]:
    return list(shard.read(Counter()))


def ids(items: list[Item]) -> list[str]:
    return [item.id for item in items]


def codes_alone(model: Mimi, audio: np.ndarray, num_quantizers: int | None = None) -> np.ndarray:
    """[codebooks, frames] of a clip [channels, samples], as `encode` gives them.

    The clip is padded, so that clips of many lengths need few programs.
    """
    batch, mask = mimi_jax.pad_batch([audio], model.config.frame_size)
    codes, codes_mask = mimi_jax.encode(model, batch, mask, num_quantizers)
    return np.asarray(codes)[0][:, np.asarray(codes_mask)[0]]


def codes_by_id(folder: Path) -> dict[str, np.ndarray]:
    clips = list(read_codes(folder))
    found = {clip.id: clip.codes for clip in clips}
    assert len(found) == len(clips), "a clip was encoded twice"
    return found


def errors_of(folder: Path) -> dict[str, str]:
    """Reasons by id."""
    import pyarrow.parquet as pq

    tables = [pq.read_table(path).to_pylist() for path in sorted((folder / "errors").glob("*.parquet"))]
    return {row["id"] or row["source"]: row["reason"] for rows in tables for row in rows}


def check_folder(out: Path, data: Path, model: Mimi) -> None:
    """Check that `out` has each WAV file of `data` once, with the codes that it gets alone, but for ties."""
    found = codes_by_id(out)
    paths = {str(path.relative_to(data)): path for path in data.rglob("*.wav")}
    assert found.keys() == paths.keys()
    for name, path in paths.items():
        audio = mimi_jax.load_audio(path)
        expected = codes_alone(model, audio)
        assert found[name].shape == expected.shape
        if (found[name] != expected).any():
            check_ties(model, np.asarray(model.encode_latents(audio[None]))[0], found[name], expected)
