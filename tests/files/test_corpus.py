"""Folders and manifests give the same clips to everyone who reads them, and the same errors."""

import re
from pathlib import Path

import numpy as np
import pytest
import soundfile

from mimi_jax import MimiConfig, load_audio, save_audio
from mimi_jax.files.corpus import Entry, find_clips, find_files, read_crop, read_entries
from mimi_jax.tokenization.inputs import find_shards
from tests.files.corpora import tone, without_length, write_corpus, write_manifest

CONFIG = MimiConfig()


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write_corpus(tmp_path)
    return tmp_path


def test_files_are_found_at_any_depth_in_order(tmp_path: Path):
    (tmp_path / "b" / "c").mkdir(parents=True)
    (tmp_path / "a").mkdir()
    for name in ("z.wav", "a/y.WAV", "b/c/x.flac", "b/x.txt", "b/flac"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "a" / "back").symlink_to(tmp_path)
    (tmp_path / "linked").symlink_to(tmp_path / "b" / "c")
    found = [str(Path(path).relative_to(tmp_path)) for path in find_files(tmp_path, (".wav", ".flac"))]
    assert found == ["z.wav", "a/y.WAV", "b/c/x.flac"]
    found = list(find_files(tmp_path, (".wav",), without=tmp_path / "a"))
    assert found == [str(tmp_path / "z.wav")]


def test_a_manifest_gives_all_its_fields(tmp_path: Path):
    line = {
        "path": "a/x.flac",
        "id": 7,
        "start": 1,
        "end": 2.5,
        "source": "s",
        "speaker": "p",
        "features": "x.npy",
        "text": "ignored",
    }
    manifest = write_manifest(tmp_path, line, dict.fromkeys(line, None) | {"path": "/y.wav"})
    manifest.write_text(manifest.read_text() + "\n")
    first, second = read_entries(manifest)
    audio, features = str(tmp_path / "a/x.flac"), str(tmp_path / "x.npy")
    assert first == Entry("a/x.flac", audio, "7", 1.0, 2.5, "s", "p", features)
    assert second == Entry("/y.wav", "/y.wav")


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("nonsense", "must be a JSON object with a path, got 'nonsense'"),
        ("[" * 5000, "must be a JSON object with a path, got '["),
        ('{"file": "x"}', 'must be a JSON object with a path, got \'{"file": "x"}\''),
        ('{"path": 3}', "must be a JSON object with a path"),
        ('{"path": "x", "start": "1"}', "start must be seconds, got '1'"),
        ('{"path": "x", "start": true}', "start must be seconds, got True"),
        ('{"path": "x", "start": NaN}', "start must be seconds, got nan"),
        ('{"path": "x", "end": 1' + "0" * 400 + "}", "end must be seconds, got 1000"),
        ('{"path": "x", "start": 2, "end": 1}', "start must be at least 0 and lie before end, got 2 and 1"),
        ('{"path": "x", "start": -1}', "start must be at least 0 and lie before end, got -1 and None"),
        ('{"path": "x", "features": 3}', "features must be the path of a .npy file, got 3"),
    ],
)
def test_training_and_tokenization_refuse_the_same_lines(tmp_path: Path, line: str, error: str):
    manifest = tmp_path / "m.jsonl"
    manifest.write_text(f'{{"path": "y.wav"}}\n\n{line}\n')
    for use in (find_clips, lambda path: list(find_shards([path]))):
        with pytest.raises(ValueError) as info:
            use(manifest)
        assert str(info.value).startswith(f"{manifest}, line 3: {error}")


def test_subfolders_are_sources(data: Path):
    clips = find_clips(data).clips
    assert [(clip.source, Path(clip.path).name, clip.sampling_rate) for clip in clips] == [
        (source, f"{n}.flac", rate) for source, rate in (("high", 24_000), ("low", 16_000)) for n in range(3)
    ]
    assert [Path(clip.path).name for clip in find_clips(data, "low/1*").clips] == ["1.flac"]


def test_clips_of_a_manifest(data: Path):
    manifest = write_manifest(
        data,
        {"path": "high/0.flac", "source": "a", "speaker": "x", "start": 0.5, "end": 1.0},
        {"path": "low/1.flac"},
    )
    first, second = find_clips(manifest).clips
    assert (first.source, first.speaker, first.start, first.num_samples) == ("a", "x", 12_000, 12_000)
    assert (second.source, second.start, second.num_samples) == ("", 0, 24_000)


BAD_ENTRIES = [
    ({"path": "high/9.flac"}, r"there is no file .*high/9\.flac"),
    ({"path": "high/0.flac", "features": "no.npy"}, r"there is no file .*no\.npy"),
    ({"path": "high"}, r"there is no file .*high"),
    ({"path": "notes.txt"}, "the file is not audio|the file is not a WAV|libsndfile cannot read"),
    ({"path": "empty.wav"}, r"the file is empty \(0 bytes\)"),
    ({"path": "nothing.wav"}, "^the file has no samples$"),
    ({"path": "cut.wav"}, "the file is cut short"),
    ({"path": "high/0.flac", "start": 2.0}, "has no audio from 2 s to its end: it is 1.5 s long"),
    ({"path": "high/0.flac", "end": 2.0}, "the file is 1.5 s long, so it ends before 2 s"),
]


@pytest.fixture
def broken(data: Path) -> Path:
    """The corpus, and four files beside it that hold no audio or not all of it."""
    (data / "notes.txt").write_text("no audio")
    (data / "empty.wav").write_bytes(b"")
    soundfile.write(data / "nothing.wav", np.zeros(0), 24_000)
    save_audio(data / "whole.wav", tone(300, 1.5))
    (data / "cut.wav").write_bytes((data / "whole.wav").read_bytes()[:40_000])
    return data


@pytest.mark.parametrize(("entry", "reason"), BAD_ENTRIES)
def test_a_bad_item_costs_one_item(broken: Path, entry: dict, reason: str):
    clips, left_out = find_clips(
        write_manifest(broken, {"path": "high/0.flac"}, entry, {"path": "low/0.flac"})
    )
    assert [str(clip.path) for clip in clips] == [
        str(broken / name) for name in ("high/0.flac", "low/0.flac")
    ]
    ((name, found),) = left_out
    start = ", from 2 s" if "start" in entry else ""
    assert name == f"{broken / entry['path']}{start}" and re.search(reason, found)


def test_audio_that_cannot_be_read_is_left_out_of_a_folder(data: Path):
    (data / "high" / "x.M4A").write_bytes(b"\0\0\0\x20ftypM4A " + bytes(100))
    (data / "notes.txt").write_text("no audio")
    clips, left_out = find_clips(data)
    assert len(clips) == 6
    ((name, reason),) = left_out
    assert name == str(data / "high" / "x.M4A") and reason.startswith("the file is not a WAV")


def test_nothing_but_bad_items_is_an_error(broken: Path):
    manifest = write_manifest(broken, {"path": "cut.wav"}, {"path": "empty.wav"})
    with pytest.raises(ValueError, match=r"none of 2 clips can be used; .*/cut\.wav: the file is cut short"):
        find_clips(manifest)


@pytest.mark.parametrize("entry", [{"file": "high/0.flac"}, {"path": "high/0.flac", "end": "1"}])
def test_a_bad_line_is_an_error(data: Path, entry: dict):
    with pytest.raises(ValueError, match=r"manifest\.jsonl, line 1: "):
        find_clips(write_manifest(data, entry))


def test_an_audio_file_is_a_corpus_of_one_clip(data: Path):
    (clip,), left_out = find_clips(data / "high" / "0.flac")
    assert (clip.path, clip.start, clip.num_samples, left_out) == (f"{data}/high/0.flac", 0, 36_000, [])


def test_other_files_are_neither_audio_nor_manifests(tmp_path: Path):
    (tmp_path / "weights.bin").write_bytes(bytes(range(256)))
    with pytest.raises(
        ValueError, match=r"weights\.bin is neither an audio file \(.*\.wav.*\) nor a manifest"
    ):
        find_clips(tmp_path / "weights.bin")


def test_a_flac_file_of_unknown_length_is_counted(data: Path):
    path = without_length(data / "low" / "1.flac")
    clip = find_clips(path).clips[0]
    assert (clip.num_samples, clip.sampling_rate) == (24_000, 16_000)
    whole = load_audio(path)
    np.testing.assert_allclose(read_crop(clip, 0.0, 36_000, CONFIG), whole, atol=2e-3)
    np.testing.assert_allclose(read_crop(clip, 1.25, 9600, CONFIG)[:, :6000], whole[:, 30_000:], atol=2e-3)


def test_a_crop_beyond_the_end_of_a_flac_file_of_unknown_length_is_refused(data: Path):
    without_length(data / "high" / "0.flac")
    clip = find_clips(write_manifest(data, {"path": "high/0.flac", "end": 9.0})).clips[0]
    assert read_crop(clip, 1.0, 9600, CONFIG).any()
    with pytest.raises(ValueError, match="the file is damaged or cut short: 36000 samples were read"):
        read_crop(clip, 1.0, 24_000, CONFIG)


def test_damage_is_found_by_the_crop_that_meets_it(tmp_path: Path):
    path = tmp_path / "noise.flac"
    save_audio(path, np.random.default_rng(0).normal(0, 0.1, (1, 240_000)).astype(np.float32))
    damaged = bytearray(path.read_bytes())
    damaged[-20_000:-19_000] = bytes(1000)
    path.write_bytes(damaged)
    clip = find_clips(path).clips[0]
    assert read_crop(clip, 0.0, 9600, CONFIG).any()
    with pytest.raises(ValueError, match="the file is damaged"):
        read_crop(clip, 9.0, 24_000, CONFIG)


def test_a_crop_of_a_file_that_became_shorter_is_refused(data: Path):
    clip = find_clips(data / "high" / "0.flac").clips[0]
    save_audio(clip.path, tone(300, 0.5))
    with pytest.raises(ValueError, match=r"the file is 0\.5 s long, so it ends before 1\.5 s"):
        read_crop(clip, 0.0, 36_000, CONFIG)


def test_nothing_there(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="there is no folder or manifest"):
        find_clips(tmp_path / "missing")
    with pytest.raises(ValueError, match="no audio files"):
        find_clips(tmp_path)


@pytest.mark.parametrize("source", ["high", "low"])
@pytest.mark.parametrize("start", [0.0, 0.3, 1.1])
def test_a_crop_is_a_slice_of_the_clip(data: Path, source: str, start: float):
    clip = find_clips(data, f"{source}/1.flac").clips[0]
    crop = read_crop(clip, start, 9600, CONFIG)
    first = round(start * 24_000)
    whole = np.pad(load_audio(clip.path), [(0, 0), (0, 9600)])[:, first : first + 9600]
    assert crop.shape == (1, 9600) and crop.dtype == np.float32
    # At its ends a resampled crop lacks what the whole clip would tell it.
    np.testing.assert_allclose(crop[:, 50:-50], whole[:, 50:-50], atol=0 if source == "high" else 2e-3)


def test_a_crop_has_the_channels_of_the_model(tmp_path: Path):
    save_audio(tmp_path / "mono.wav", tone(300, 0.1))
    save_audio(tmp_path / "stereo.wav", np.concatenate([tone(300, 0.1), tone(500, 0.1)]))
    for channels in (1, 2):
        for clip in find_clips(tmp_path).clips:
            crop = read_crop(clip, 0.0, 2400, MimiConfig(audio_channels=channels))
            np.testing.assert_array_equal(crop, load_audio(clip.path, channels=channels))
