"""Examples are drawn as the recipe says, and the same seed and position give the same ones."""

import dataclasses
import json
from pathlib import Path

import fsspec
import numpy as np
import pytest
import soundfile

from mimi_jax import MimiConfig, load_audio, save_audio
from mimi_jax.files.corpus import Clip, LeftOut, find_clips
from mimi_jax.train.data import Sampler, Speaker, fit_features, make_iterator, read_features
from mimi_jax.train.recipe import DataRecipe
from tests.files.corpora import tone, write_corpus, write_manifest

CONFIG = MimiConfig()
RECIPE = DataRecipe(seconds=0.4, batch_size=2, gain=(0.0, 0.0))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write_corpus(tmp_path)
    return tmp_path


def test_the_same_seed_and_position_give_the_same_examples(data: Path):
    sampler = Sampler(find_clips(data).clips, RECIPE, CONFIG)
    batches = [batch["audio"] for batch in make_iterator(sampler, 0, 2, 6)]
    assert len(batches) == 6 and batches[0].shape == (2, 1, 9600)
    iterator = make_iterator(sampler, 0, 2, 6)
    for _ in range(3):
        next(iterator)
    position = json.loads(json.dumps(iterator.get_state()))
    resumed = make_iterator(sampler, 0, 2, 6)
    resumed.set_state(position)
    np.testing.assert_array_equal([b["audio"] for b in resumed], batches[3:])
    other = [batch["audio"] for batch in make_iterator(sampler, 1, 2, 6)]
    assert not np.array_equal(other[0], batches[0])


def test_clips_in_memory_give_the_same_crops(data: Path):
    clips = find_clips(data).clips
    files, memory = (
        Sampler(clips, dataclasses.replace(RECIPE, in_memory=kept), CONFIG) for kept in (False, True)
    )
    for seed in range(12):
        crop, cut = (sampler(0, np.random.default_rng(seed))["audio"] for sampler in (files, memory))
        assert crop.shape == cut.shape
        # Crops of 16 kHz begin with a sample of the file, or at most one of the model's beside it.
        assert np.abs(crop - cut).max() < 0.5 * 2 * np.pi * 900 / 24_000
    high = find_clips(data, "high/*").clips
    files, memory = (
        Sampler(high, dataclasses.replace(RECIPE, in_memory=kept), CONFIG) for kept in (False, True)
    )
    crop, cut = (sampler(0, np.random.default_rng(1))["audio"] for sampler in (files, memory))
    np.testing.assert_array_equal(crop, cut)
    for clip in high:
        Path(clip.path).unlink()
    memory(0, np.random.default_rng(0))  # needs no file any more


def test_a_clip_is_drawn_as_numpy_draws_it():
    lengths = np.random.default_rng(0).integers(1, 10**7, 1000)
    clips = [Clip(str(i), "", "", 0, int(length), 24_000, None) for i, length in enumerate(lengths)]
    speaker, seconds = Speaker.of(clips), lengths / 24_000
    ours, numpys = np.random.default_rng(1), np.random.default_rng(1)
    for _ in range(1000):
        assert speaker.draw(ours) is clips[numpys.choice(1000, p=seconds / seconds.sum())]


def test_sources_have_their_weights(data: Path):
    recipe = DataRecipe(seconds=0.4, gain=(0.0, 0.0), weights={"high": 0.9, "low": 0.1})
    sampler = Sampler(find_clips(data).clips, recipe, CONFIG)
    np.testing.assert_allclose(sampler.weights, [0.9, 0.1])
    # Make the source "low" quieter, to tell which of the two an example is from.
    for clip in find_clips(data, "low/*").clips:
        save_audio(clip.path, 0.1 * load_audio(clip.path, 16_000), 16_000)
    loud = [np.abs(sampler(0, np.random.default_rng(i))["audio"]).max() > 0.1 for i in range(200)]
    assert 0.83 < np.mean(loud) < 0.97


@pytest.mark.parametrize(
    ("weights", "error"),
    [
        (
            {"high": 0.9, "middle": 0.1},
            "data.weights names middle, but the sources of the data are .high, low.",
        ),
        ({"high": 0.9}, "data.weights must name all sources or none, of high, low"),
    ],
)
def test_bad_weights(data: Path, weights: dict, error: str):
    with pytest.raises(ValueError, match=error):
        Sampler(find_clips(data).clips, DataRecipe(weights=weights), CONFIG)


def test_the_gain_is_random_and_never_clips(data: Path):
    sampler = Sampler(find_clips(data, "high/*").clips, DataRecipe(seconds=0.4, gain=(-10.0, 12.0)), CONFIG)
    peaks = [np.abs(sampler(0, np.random.default_rng(i))["audio"]).max() for i in range(60)]
    assert 0.15 < min(peaks) < 0.25 and 0.9 < max(peaks) <= 1.0


def test_a_short_clip_ends_in_silence(data: Path):
    save_audio(data / "short.wav", tone(300, 0.1))
    sampler = Sampler(find_clips(data, "short.wav").clips, RECIPE, CONFIG)
    audio = sampler(0, np.random.default_rng(0))["audio"]
    assert audio.shape == (1, 9600) and audio[0, :2400].any() and not audio[0, 2400:].any()


def test_features_come_with_their_crop(data: Path):
    for number in range(3):  # 50 Hz, without the last vector; the values count the vectors
        np.save(data / f"{number}.npy", np.arange(74, dtype=np.float32)[:, None] + 1000 * number)
    entries = [{"path": f"high/{n}.flac", "features": f"{n}.npy"} for n in range(3)]
    clips = find_clips(write_manifest(data, *entries)).clips
    sampler = Sampler(clips, RECIPE, CONFIG, with_features=True)
    starts = set()
    for seed in range(20):
        example = sampler(0, np.random.default_rng(seed))
        features = example["features"][:, 0]
        number, first = divmod(int(features[0]), 1000)
        np.testing.assert_array_equal(features, np.minimum(first + np.arange(20), 73) + 1000 * number)
        assert first % 4 == 0  # the crop begins with a frame
        whole = load_audio(clips[number].path)
        np.testing.assert_array_equal(example["audio"], whole[:, first * 480 : first * 480 + 9600])
        starts.add(first)
    assert len(starts) > 5


def test_examples_of_a_remote_corpus_are_those_of_a_local_one(data: Path):
    for number in range(3):
        np.save(data / f"{number}.npy", np.arange(74, dtype=np.float32)[:, None] + number)
    entries = [{"path": f"high/{n}.flac", "features": f"{n}.npy"} for n in range(3)]
    manifest = write_manifest(data, *entries)
    fsspec.filesystem("memory").put(f"{data}/", "memory://corpus/", recursive=True)
    here, there = (
        Sampler(find_clips(place).clips, RECIPE, CONFIG, with_features=True)
        for place in (manifest, f"memory://corpus/{manifest.name}")
    )
    for seed in range(5):
        mine, other = (sampler(0, np.random.default_rng(seed)) for sampler in (here, there))
        for name in ("audio", "features"):
            np.testing.assert_array_equal(mine[name], other[name])


def test_each_frame_gets_the_same_number_of_vectors():
    vectors = np.arange(599, dtype=np.float32)[None, :, None]
    fitted = fit_features(vectors, 150)
    np.testing.assert_array_equal(fitted[0, :, 0], [*range(599), 598])
    assert fit_features(vectors[:, :301], 150).shape == (1, 300, 1)
    with pytest.raises(ValueError, match=r"gave 580 vectors for 150 frames; its rate must be"):
        fit_features(vectors[:, :580], 150)


def test_every_clip_needs_features(data: Path):
    with pytest.raises(
        ValueError, match=r"distillation needs the features of every clip; .*0\.flac has none"
    ):
        Sampler(find_clips(data).clips, RECIPE, CONFIG, with_features=True)


@pytest.fixture
def damaged(data: Path) -> Path:
    """The corpus, after one of its six files was damaged behind its header."""
    path = data / "high" / "1.flac"
    whole = bytearray(path.read_bytes())
    whole[len(whole) // 4 :] = bytes(len(whole) - len(whole) // 4)
    path.write_bytes(whole)
    return path


def test_a_crop_that_cannot_be_read_is_replaced_and_named(data: Path, damaged: Path):
    left_out: list[LeftOut] = []
    clips = find_clips(data).clips
    assert str(damaged) in {clip.path for clip in clips}  # its header is whole
    sampler = Sampler(clips, RECIPE, CONFIG, leave_out=left_out.append)
    loud = [np.abs(sampler(0, np.random.default_rng(i))["audio"]).max() > 0.4 for i in range(60)]
    assert all(loud)
    assert {clip.name for clip in left_out} == {str(damaged)}
    assert len(left_out) > 5 and "the file is damaged" in left_out[0].reason


def test_replaced_crops_are_the_same_from_any_example_on(data: Path, damaged: Path):
    sampler = Sampler(find_clips(data).clips, RECIPE, CONFIG)
    batches = [batch["audio"] for batch in make_iterator(sampler, 0, 2, 30)]
    iterator = make_iterator(sampler, 0, 2, 30)
    for _ in range(7):
        next(iterator)
    resumed = make_iterator(sampler, 0, 2, 30)
    resumed.set_state(json.loads(json.dumps(iterator.get_state())))
    np.testing.assert_array_equal([batch["audio"] for batch in resumed], batches[7:])


def test_a_lost_network_does_not_change_what_is_drawn(data: Path, monkeypatch: pytest.MonkeyPatch):
    def lost(*_):
        raise ConnectionError("timed out")

    monkeypatch.setattr("mimi_jax.train.data.read_crop", lost)
    left_out = []
    sampler = Sampler(find_clips(data).clips, RECIPE, CONFIG, leave_out=left_out.append)
    with pytest.raises(ConnectionError, match="timed out"):
        sampler(0, np.random.default_rng(0))
    assert not left_out


def test_nothing_but_unreadable_crops_is_an_error(data: Path):
    (data / "nan").mkdir()
    soundfile.write(data / "nan" / "0.wav", np.full(24_000, np.nan, np.float32), 24_000, subtype="FLOAT")
    sampler = Sampler(find_clips(data, "nan/*").clips, RECIPE, CONFIG)
    error = r"1000 crops in a row cannot be read; the last is of .*0\.wav: the file has samples that are NaN"
    with pytest.raises(ValueError, match=error):
        sampler(0, np.random.default_rng(0))


def test_the_rate_of_features_of_a_very_short_clip_is_not_clear(data: Path):
    np.save(data / "0.npy", np.zeros((4, 2), np.float32))
    soundfile.write(data / "short.wav", np.zeros(1600), 16_000)
    clips = find_clips(write_manifest(data, {"path": "short.wav", "features": "0.npy"})).clips
    with pytest.raises(ValueError, match=r"is of a clip of 0\.1 s, .* is not clear below 0\.32 s"):
        read_features(clips[0], 0.0, 0.4)


@pytest.mark.parametrize(
    ("features", "error"),
    [
        (np.full((75, 2), np.nan, np.float32), "has features that are NaN or infinite"),
        (np.zeros(75, np.float32), r"must hold features \[vectors, dim\], got \[75\]"),
        (np.zeros((0, 2), np.float32), r"must hold features \[vectors, dim\], got \[0, 2\]"),
        (b"", r"0\.npy is not a \.npy file"),
        (b"PK\3\4", r"0\.npy is not a \.npy file"),
    ],
)
@pytest.mark.parametrize("is_local", [True, False])
def test_bad_features_are_refused(
    data: Path, features: np.ndarray | bytes, error: str, is_local: bool, monkeypatch: pytest.MonkeyPatch
):
    if isinstance(features, bytes):
        (data / "0.npy").write_bytes(features)
    else:
        np.save(data / "0.npy", features)
    clips = find_clips(write_manifest(data, {"path": "high/0.flac", "features": "0.npy"})).clips
    if not is_local:
        monkeypatch.setattr("mimi_jax.train.data.is_remote", lambda _: True)
        monkeypatch.setattr("mimi_jax.train.data.read_whole", lambda path: Path(path).read_bytes())
    with pytest.raises(ValueError, match=error):
        read_features(clips[0], 0.0, 0.4)
