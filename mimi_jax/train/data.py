"""Random crops of audio files, the same ones for the same seed, from any position on.

Which clip, where in it and how loud is drawn for each example from its number alone: a run that goes on
from example n sees what it would have seen. Reading and resampling happens in Grain's threads.
"""

import fnmatch
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import soundfile
import soxr
from tqdm import tqdm

from mimi_jax.config import MimiConfig
from mimi_jax.files.audio import FORMATS
from mimi_jax.train.recipe import DataRecipe

MARGIN = 64  # samples around a crop, for the filter of the resampler


class Clip(NamedTuple):
    """A stretch of an audio file."""

    path: Path
    source: str  # a corpus
    speaker: str
    start: int  # at the file's own rate
    num_samples: int  # at the file's own rate
    sampling_rate: int
    features: Path | None  # a teacher's, .npy [time, dim], of the stretch


def find_clips(data: Path, include: str = "*") -> list[Clip]:
    """The clips of a folder or a manifest.

    Args:
        data: a folder, whose audio files are found at any depth, each subfolder a source; or a JSONL file
            of objects {path, source, speaker, start, end, features}, paths beside it, times in seconds, all
            but the path optional.
        include: a pattern that the path, as the manifest has it or relative to the folder, must match.

    Raises:
        FileNotFoundError: there is no such folder, manifest or file.
        ValueError: a line that is no such object, or nothing was found.
    """
    entries = _manifest(data) if data.is_file() else _folder(data)
    clips = []
    for entry in tqdm(entries, desc="reading headers", disable=None, leave=False):
        if fnmatch.fnmatch(entry["path"], include):
            clips.append(_clip(data.parent if data.is_file() else data, entry))
    if not clips:
        raise ValueError(f"{data}: no audio files ({', '.join(FORMATS)}) that match include={include!r}")
    return clips


def _folder(data: Path) -> list[dict[str, Any]]:
    if not data.is_dir():
        raise FileNotFoundError(f"there is no folder or manifest {data}")
    paths = sorted(path for path in data.rglob("*") if path.suffix.lower() in FORMATS)
    names = [path.relative_to(data) for path in paths]
    return [{"path": str(name), "source": name.parts[0] if len(name.parts) > 1 else ""} for name in names]


def _manifest(data: Path) -> list[dict[str, Any]]:
    entries = []
    for number, line in enumerate(data.read_text().splitlines(), 1):
        try:
            entry = json.loads(line)
        except ValueError:
            entry = None
        if not isinstance(entry, dict) or not isinstance(entry.get("path"), str):
            raise ValueError(f"{data}, line {number}: must be a JSON object with a path, got {line[:80]!r}")
        for name in ("start", "end"):
            if name in entry and type(entry[name]) not in (int, float):
                raise ValueError(f"{data}, line {number}: {name} must be seconds, got {entry[name]!r}")
        entries.append(entry)
    return entries


def _clip(folder: Path, entry: dict[str, Any]) -> Clip:
    path = folder / entry["path"]
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        info = soundfile.info(path)
    except soundfile.LibsndfileError as error:
        raise ValueError(f"{path} is not a WAV, FLAC, OGG or MP3 file, or it is damaged") from error
    start = round(entry.get("start", 0) * info.samplerate)
    end = min(round(entry["end"] * info.samplerate), info.frames) if "end" in entry else info.frames
    if not 0 <= start < end:
        raise ValueError(f"{path}: start must lie before end, in the file of {info.duration:.1f} s")
    source, speaker = str(entry.get("source", "")), str(entry.get("speaker", ""))
    features = folder / entry["features"] if "features" in entry else None
    if features is not None and not features.is_file():
        raise FileNotFoundError(f"there is no file {features}")
    return Clip(path, source, speaker, start, end - start, info.samplerate, features)


class Sampler:
    """Draws one example: a source by its weight, one of its speakers, a clip by its length, and a crop.

    Args:
        with_features: whether examples hold the teacher's features of their crop, which then begins on a
            whole frame.
    """

    def __init__(
        self, clips: list[Clip], recipe: DataRecipe, config: MimiConfig, with_features: bool = False
    ):
        self.recipe, self.config, self.with_features = recipe, config, with_features
        self.num_samples = round(recipe.seconds * config.sampling_rate)
        speakers: dict[str, dict[str, list[Clip]]] = {}
        for clip in clips:
            speakers.setdefault(clip.source, {}).setdefault(clip.speaker, []).append(clip)
        if unknown := recipe.weights.keys() - speakers.keys():
            has = ", ".join(sorted(speakers))
            raise ValueError(
                f"data.weights names {', '.join(sorted(unknown))}, but the sources of the data are {has!r};"
                " name those, or leave the table out"
            )
        if missing := [clip.path for clip in clips if with_features and clip.features is None]:
            raise ValueError(f"distillation needs the features of every clip; {missing[0]} has none")
        self.speakers = {source: list(by.values()) for source, by in sorted(speakers.items())}
        seconds = {
            source: sum(clip.num_samples / clip.sampling_rate for one in by for clip in one)
            for source, by in self.speakers.items()
        }
        weights = np.array([recipe.weights.get(source, seconds[source]) for source in self.speakers])
        if recipe.weights and recipe.weights.keys() != speakers.keys():
            raise ValueError(f"data.weights must name all sources or none: {', '.join(sorted(speakers))}")
        self.weights = weights / weights.sum()

    def __call__(self, _: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """float32 audio [channels, samples], and perhaps features [time, dim]."""
        source = list(self.speakers.values())[rng.choice(len(self.weights), p=self.weights)]
        clips = source[rng.integers(len(source))]
        lengths = np.array([clip.num_samples / clip.sampling_rate for clip in clips])
        clip = clips[rng.choice(len(clips), p=lengths / lengths.sum())]
        seconds = max(clip.num_samples / clip.sampling_rate - self.recipe.seconds, 0) * rng.random()
        if self.with_features:
            frame = self.config.frame_size / self.config.sampling_rate
            seconds = seconds // frame * frame
        audio = read_crop(clip, seconds, self.num_samples, self.config)
        gain = 10 ** (rng.uniform(*self.recipe.gain) / 20)
        audio *= min(gain, 1 / max(float(np.abs(audio).max()), 1e-9))  # nothing is clipped
        example = {"audio": audio}
        if self.with_features:
            example["features"] = read_features(clip, seconds, self.recipe.seconds)
        return example


def read_crop(clip: Clip, start: float, num_samples: int, config: MimiConfig) -> np.ndarray:
    """float32 [channels, num_samples] from `start` seconds on; zeros where the clip is over."""
    rate, channels = clip.sampling_rate, config.audio_channels
    first = clip.start + round(start * rate)
    before = min(MARGIN, first - clip.start)
    count = min(
        -(-num_samples * rate // config.sampling_rate) + MARGIN, clip.start + clip.num_samples - first
    )
    samples, _ = soundfile.read(clip.path, before + count, first - before, dtype="float32", always_2d=True)
    if channels == 1:
        samples = samples.mean(axis=1, keepdims=True)
    elif samples.shape[1] == 1:
        samples = samples.repeat(channels, axis=1)
    if rate != config.sampling_rate:
        samples = soxr.resample(samples, rate, config.sampling_rate)
    skip = round(before * config.sampling_rate / rate)
    crop = samples[skip : skip + num_samples].T
    return np.pad(crop, [(0, 0), (0, num_samples - crop.shape[1])]).astype(np.float32)


def read_features(clip: Clip, start: float, seconds: float) -> np.ndarray:
    """float32 [time, dim] of a crop; the last step is repeated where the clip is over."""
    assert clip.features is not None
    features = np.load(clip.features, mmap_mode="r")
    rate = len(features) / (clip.num_samples / clip.sampling_rate)
    # Teachers drop a step or two at the end, so the true rate is the next multiple of 12.5 above.
    rate = round(rate / 12.5) * 12.5
    steps = np.arange(round(seconds * rate)) + round(start * rate)
    return np.asarray(features[np.minimum(steps, len(features) - 1)], np.float32)


def fit_features(features: np.ndarray, frames: int) -> np.ndarray:
    """A teacher's features [batch, time, dim] with a whole number of steps for each frame of codes.

    Raises:
        ValueError: more than two steps are missing or too many: the rate is no multiple of 12.5 Hz.
    """
    time = features.shape[1]
    wanted = max(round(time / frames), 1) * frames
    if abs(wanted - time) > 2:
        raise ValueError(
            f"the teacher gave {time} steps for {frames} frames of codes; their rate must be a multiple of"
            " 12.5 Hz, of which at most two may be missing at the end"
        )
    return features[:, np.minimum(np.arange(wanted), time - 1)]


def make_iterator(sampler: Sampler, seed: int, batch_size: int, num_steps: int, threads: int = 4) -> Any:
    """A Grain iterator over batches, dicts of arrays [batch, ...]; its state is saved with the model."""
    import grain

    examples = grain.MapDataset.range(num_steps * batch_size).seed(seed).random_map(sampler)
    batches = examples.to_iter_dataset(
        grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * batch_size)
    )
    return iter(batches.batch(batch_size, drop_remainder=True))
