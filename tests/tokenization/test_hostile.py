"""Files that somebody might have in a corpus: each is encoded or listed with a reason."""

from pathlib import Path

import numpy as np

import mimi_jax
from mimi_jax import Mimi
from mimi_jax.tokenization import Settings, read_codes, tokenize
from tests.tokenization.corpora import audio_bytes, errors_of, noise_clip, write_parquet, write_tar


def hostile(number: int, random: np.random.Generator) -> tuple[str, bytes]:
    """The name and the bytes of a file that somebody might have in a corpus."""
    audio = noise_clip(int(random.integers(50, 3000)), seed=number, channels=int(random.choice([1, 1, 2, 6])))
    form = str(random.choice(["WAV", "FLAC", "OGG", "MP3"]))
    rate = int(random.choice([8000, 16_000, 24_000, 44_100, 192_000]))
    if form == "MP3":
        audio, rate = audio[:2], min(rate, 44_100)
    elif form == "OGG":
        rate = min(rate, 44_100)
    data = bytearray(audio_bytes(audio, rate, form))
    match number % 10:
        case 0:  # random bytes in the header
            for place in random.integers(0, 60, 4):
                data[place] = random.integers(256)
        case 1:
            data = data[: random.integers(len(data))]
        case 2:  # 0 to 3 samples
            data = bytearray(audio_bytes(noise_clip(int(random.integers(4)), seed=number)))
        case 3:
            data = bytearray(audio_bytes(noise_clip(200, seed=number), 192_000, "FLAC"))
        case 4:
            data = bytearray(audio_bytes(noise_clip(200, seed=number, channels=6)))
        case 5:
            broken = noise_clip(200, seed=number)
            broken[0, random.integers(200)] = random.choice([np.nan, np.inf])
            data = bytearray(audio_bytes(broken, subtype="FLOAT"))
        case 6:  # random bytes anywhere
            for place in random.integers(0, len(data), 8):
                data[place] = random.integers(256)
        case 7:
            data = bytearray(random.bytes(int(random.integers(2000))))
    suffix = form.lower()
    names = [
        f"{number}.{suffix}",
        f"with space {number}.{suffix}",
        f'it\'s "{number}".{suffix}',
        f"ñ語{number}.wav",
    ]
    return f"{number % 3}/{names[number % 4]}", bytes(data)


def test_each_of_500_hostile_inputs_is_encoded_or_listed(tmp_path: Path, tiny: Path, model: Mimi):
    generator = np.random.default_rng(0)
    files = dict(hostile(number, generator) for number in range(500))
    folders, tarred, rows = list(files.items())[:300], list(files.items())[300:400], list(files.items())[400:]
    for name, data in folders:
        path = tmp_path / "data" / "files" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    write_tar(tmp_path / "data" / "a.tar", dict(tarred))
    whole = (tmp_path / "data" / "a.tar").read_bytes()
    (tmp_path / "data" / "cut.tar").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "data" / "zeros.tar").write_bytes(b"")
    entries = [None, *({"bytes": data, "path": "same name"} for _, data in rows)]
    write_parquet(tmp_path / "data" / "b.parquet", entries)
    summary = tokenize([tmp_path / "data"], tmp_path / "out", tiny, Settings(clips_per_shard=100))
    assert summary.num_done == summary.num_shards
    found, errors = codes_by_id_and_source(tmp_path / "out"), errors_of(tmp_path / "out")
    assert all(reason and "\n" not in reason for reason in errors.values())
    assert len(found) > 150 and len(errors) > 100
    for name, _ in folders:
        assert (f"files/{name}" in errors) != (("data", f"files/{name}") in found), name
    assert (
        sum(source == "b.parquet" for source, _ in found) + sum("same name" in name for name in errors) == 100
    )
    assert "neither bytes nor the path" in errors["0"]
    assert "cut short" in " ".join(errors.values())
    names = [name for source, name in found if source == "data"]
    clips = {name: mimi_jax.load_audio(tmp_path / "data" / name) for name in names}
    longest = max(
        clips.values(), key=np.size
    )  # all are padded to it, or each length would need its own program
    for name, clip in clips.items():
        codes, expected = found["data", name], mimi_jax.encode(model, *mimi_jax.pad_batch([clip, longest]))
        np.testing.assert_array_equal(codes, expected.audio_codes[0, :, : codes.shape[1]])
        assert codes.shape[1] == model.encoded_length(clip.shape[1])


def codes_by_id_and_source(folder: Path) -> dict[tuple[str, str], np.ndarray]:
    clips = list(read_codes(folder))
    found = {(Path(clip.source).name, clip.id): clip.codes for clip in clips}
    assert len(found) == len(clips)
    return found
