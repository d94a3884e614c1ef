import json
from pathlib import Path

import numpy as np
import pytest

from mimi_jax import MimiConfig, load_audio, save_audio
from mimi_jax.train.data import Sampler, find_clips, fit_features, make_iterator, read_crop
from mimi_jax.train.recipe import DataRecipe

CONFIG = MimiConfig()
RECIPE = DataRecipe(seconds=0.4, batch_size=2, gain=(0.0, 0.0))


def tone(hertz: float, seconds: float, rate: int = 24_000) -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * hertz * np.arange(int(seconds * rate)) / rate)).astype(np.float32)[None]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    for source, rate in (("high", 24_000), ("low", 16_000)):
        (tmp_path / source).mkdir()
        for number in range(3):
            audio = tone(300 * (number + 1), 1.5, rate)
            save_audio(tmp_path / source / f"{number}.flac", audio, rate)
    return tmp_path


def test_subfolders_are_sources(data: Path):
    clips = find_clips(data)
    assert [(clip.source, clip.path.name, clip.sampling_rate) for clip in clips] == [
        (source, f"{n}.flac", rate) for source, rate in (("high", 24_000), ("low", 16_000)) for n in range(3)
    ]
    assert [clip.path.name for clip in find_clips(data, "low/1*")] == ["1.flac"]


def write_manifest(data: Path, *entries: dict) -> Path:
    manifest = data / "manifest.jsonl"
    manifest.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return manifest


def test_manifest(data: Path):
    manifest = write_manifest(
        data,
        {"path": "high/0.flac", "source": "a", "speaker": "x", "start": 0.5, "end": 1.0},
        {"path": "low/1.flac"},
    )
    first, second = find_clips(manifest)
    assert (first.source, first.speaker, first.start, first.num_samples) == ("a", "x", 12_000, 12_000)
    assert (second.source, second.start, second.num_samples) == ("", 0, 24_000)


@pytest.mark.parametrize(
    ("entry", "error"),
    [
        ({"path": "high/9.flac"}, "there is no file .*high/9.flac"),
        ({"path": "notes.txt"}, "is not a WAV, FLAC, OGG or MP3 file"),
        ({"file": "high/0.flac"}, "manifest.jsonl, line 1: must be a JSON object with a path"),
        ({"path": "high/0.flac", "start": 2.0}, "start must lie before end, in the file of 1.5 s"),
        ({"path": "high/0.flac", "end": None}, "line 1: end must be seconds, got None"),
        ({"path": "high/0.flac", "features": "no.npy"}, "there is no file .*no.npy"),
    ],
)
def test_bad_manifests(data: Path, entry: dict, error: str):
    (data / "notes.txt").write_text("no audio")
    with pytest.raises((ValueError, FileNotFoundError), match=error):
        find_clips(write_manifest(data, entry))


def test_nothing_there(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="there is no folder or manifest"):
        find_clips(tmp_path / "missing")
    with pytest.raises(ValueError, match="no audio files"):
        find_clips(tmp_path)


@pytest.mark.parametrize("source", ["high", "low"])
@pytest.mark.parametrize("start", [0.0, 0.3, 1.1])
def test_a_crop_is_a_slice_of_the_clip(data: Path, source: str, start: float):
    clip = find_clips(data, f"{source}/1.flac")[0]
    crop = read_crop(clip, start, 9600, CONFIG)
    first = round(start * 24_000)
    whole = np.pad(load_audio(clip.path), [(0, 0), (0, 9600)])[:, first : first + 9600]
    assert crop.shape == (1, 9600) and crop.dtype == np.float32
    # At its ends a resampled crop lacks what the whole clip would tell it.
    np.testing.assert_allclose(crop[:, 50:-50], whole[:, 50:-50], atol=0 if source == "high" else 2e-3)


def test_the_same_seed_and_position_give_the_same_examples(data: Path):
    sampler = Sampler(find_clips(data), RECIPE, CONFIG)
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


def test_sources_have_their_weights(data: Path):
    recipe = DataRecipe(seconds=0.4, gain=(0.0, 0.0), weights={"high": 0.9, "low": 0.1})
    sampler = Sampler(find_clips(data), recipe, CONFIG)
    np.testing.assert_allclose(sampler.weights, [0.9, 0.1])
    # Of the two sources only "low" is quieter here.
    for clip in find_clips(data, "low/*"):
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
        ({"high": 0.9}, "data.weights must name all sources or none: high, low"),
    ],
)
def test_bad_weights(data: Path, weights: dict, error: str):
    with pytest.raises(ValueError, match=error):
        Sampler(find_clips(data), DataRecipe(weights=weights), CONFIG)


def test_gain_is_drawn_and_never_clips(data: Path):
    sampler = Sampler(find_clips(data, "high/*"), DataRecipe(seconds=0.4, gain=(-10.0, 12.0)), CONFIG)
    peaks = [np.abs(sampler(0, np.random.default_rng(i))["audio"]).max() for i in range(60)]
    assert 0.15 < min(peaks) < 0.25 and 0.9 < max(peaks) <= 1.0


def test_a_short_clip_ends_in_silence(data: Path):
    save_audio(data / "short.wav", tone(300, 0.1))
    sampler = Sampler(find_clips(data, "short.wav"), RECIPE, CONFIG)
    audio = sampler(0, np.random.default_rng(0))["audio"]
    assert audio.shape == (1, 9600) and audio[0, :2400].any() and not audio[0, 2400:].any()


def test_features_come_with_their_crop(data: Path):
    for number in range(3):  # 50 Hz, of which a teacher drops the last step; they count
        np.save(data / f"{number}.npy", np.arange(74, dtype=np.float32)[:, None] + 1000 * number)
    entries = [{"path": f"high/{n}.flac", "features": f"{n}.npy"} for n in range(3)]
    clips = find_clips(write_manifest(data, *entries))
    sampler = Sampler(clips, RECIPE, CONFIG, with_features=True)
    starts = set()
    for seed in range(20):
        example = sampler(0, np.random.default_rng(seed))
        features = example["features"][:, 0]
        number, first = divmod(int(features[0]), 1000)
        np.testing.assert_array_equal(features, np.minimum(first + np.arange(20), 73) + 1000 * number)
        assert first % 4 == 0  # a whole frame of codes
        whole = load_audio(clips[number].path)
        np.testing.assert_array_equal(example["audio"], whole[:, first * 480 : first * 480 + 9600])
        starts.add(first)
    assert len(starts) > 5


def test_features_get_whole_frames():
    steps = np.arange(599, dtype=np.float32)[None, :, None]
    fitted = fit_features(steps, 150)
    np.testing.assert_array_equal(fitted[0, :, 0], [*range(599), 598])
    assert fit_features(steps[:, :301], 150).shape == (1, 300, 1)
    with pytest.raises(ValueError, match=r"gave 580 steps for 150 frames of codes; their rate must be"):
        fit_features(steps[:, :580], 150)


def test_features_are_of_every_clip_or_none(data: Path):
    with pytest.raises(
        ValueError, match=r"distillation needs the features of every clip; .*0\.flac has none"
    ):
        Sampler(find_clips(data), RECIPE, CONFIG, with_features=True)
