"""Random crops of audio files: the same seed gives the same crops, from any example on.

The number of an example decides which clip is drawn for it, where the crop lies and how loud it is. So a run
that continues at example n sees what it would have seen without the break. Grain's threads read and resample.
A crop that cannot be read is replaced by another one, which the number of the example decides too.
"""

import io
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from mimi_jax.config import MimiConfig
from mimi_jax.files.corpus import Clip, LeftOut, read_crop, reason_of
from mimi_jax.files.remote import is_remote, read_whole
from mimi_jax.train.recipe import DataRecipe

MAX_DRAWS = 1000  # that fail one after another; then nearly all clips are bad
SHORTEST_WITH_FEATURES = 0.32  # seconds, in which two vectors are half of 12.5 Hz


class Speaker(NamedTuple):
    """The clips of a speaker, of which a longer one is drawn more often."""

    clips: list[Clip]
    ends: np.ndarray  # float64 [clips]; each clip has the part of [0, 1) from the end before to its own

    @classmethod
    def of(cls, clips: list[Clip]) -> "Speaker":
        lengths = np.array([clip.num_samples / clip.sampling_rate for clip in clips])
        ends = np.cumsum(lengths / lengths.sum())
        return cls(clips, ends / ends[-1])

    def draw(self, rng: np.random.Generator) -> Clip:
        """What `rng.choice` draws, which would add up all lengths each time."""
        return self.clips[np.searchsorted(self.ends, rng.random(), side="right")]


class Sampler:
    """Draws an example: a source by its weight, one of its speakers, one of their clips by its length, a
    crop.

    Args:
        clips: from `mimi_jax.files.corpus.find_clips`.
        recipe: the length of a crop, its gain, and the weights of the sources. Without weights, each source
            counts by its length.
        config: of the model.
        with_features: whether an example holds a teacher's features of its crop. The crop then begins with a
            frame.
        leave_out: is called for each crop that cannot be read, from several threads.

    Raises:
        ValueError: the weights do not name exactly the sources of the clips, or a clip has no features.
    """

    def __init__(
        self,
        clips: list[Clip],
        recipe: DataRecipe,
        config: MimiConfig,
        with_features: bool = False,
        leave_out: Callable[[LeftOut], None] = lambda _: None,
    ):
        self.recipe, self.config, self.with_features = recipe, config, with_features
        self.leave_out, self._memory = leave_out, dict[Clip, np.ndarray]()
        self.num_samples = round(recipe.seconds * config.sampling_rate)
        speakers: dict[str, dict[str, list[Clip]]] = {}
        for clip in clips:
            speakers.setdefault(clip.source, {}).setdefault(clip.speaker, []).append(clip)
        if unknown := recipe.weights.keys() - speakers.keys():
            has = ", ".join(sorted(speakers))
            raise ValueError(
                f"data.weights names {', '.join(sorted(unknown))}, but the sources of the data are {has!r};"
                " name those, or leave data.weights out"
            )
        if missing := [clip.path for clip in clips if with_features and clip.features is None]:
            raise ValueError(
                f"distillation needs the features of every clip; {missing[0]} has none;"
                " name its .npy file in the manifest"
            )
        self.speakers = {
            source: [Speaker.of(one) for one in by.values()] for source, by in sorted(speakers.items())
        }
        seconds = {
            source: sum(clip.num_samples / clip.sampling_rate for one in by for clip in one.clips)
            for source, by in self.speakers.items()
        }
        weights = np.array([recipe.weights.get(source, seconds[source]) for source in self.speakers])
        if recipe.weights and recipe.weights.keys() != speakers.keys():
            raise ValueError(f"data.weights must name all sources or none, of {', '.join(sorted(speakers))}")
        self.weights = weights / weights.sum()

    def __call__(self, _: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """float32 `audio` [channels, samples] and, with features, float32 `features` [vectors, dim].

        Raises:
            ConnectionError: a clip on the network cannot be reached.
            ValueError: MAX_DRAWS crops in a row cannot be read.
        """
        for _ in range(MAX_DRAWS):
            clip, seconds = self._draw(rng)
            try:
                return self._read(clip, seconds, rng)
            except ConnectionError:
                raise  # the clip is fine, and the run can be resumed with the same crops
            except (OSError, ValueError) as error:
                left_out = LeftOut(clip.name, reason_of(error))
                self.leave_out(left_out)
        raise ValueError(
            f"{MAX_DRAWS} crops in a row cannot be read; the last is of {left_out.name}: {left_out.reason}"
        )

    def _draw(self, rng: np.random.Generator) -> tuple[Clip, float]:
        """Draw a clip, and where its crop begins, in seconds."""
        source = list(self.speakers.values())[rng.choice(len(self.weights), p=self.weights)]
        clip = source[rng.integers(len(source))].draw(rng)
        seconds = max(clip.num_samples / clip.sampling_rate - self.recipe.seconds, 0) * rng.random()
        if self.with_features:
            frame = self.config.frame_size / self.config.sampling_rate
            seconds = seconds // frame * frame
        return clip, seconds

    def _read(self, clip: Clip, seconds: float, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """Read a crop, and draw its gain."""
        audio = self._read_audio(clip, seconds)
        gain = 10 ** (rng.uniform(*self.recipe.gain) / 20)
        audio *= min(gain, 1 / max(float(np.abs(audio).max()), 1e-9))  # never so loud that it clips
        example = {"audio": audio}
        if self.with_features:
            example["features"] = read_features(clip, seconds, self.recipe.seconds)
        return example

    def _read_audio(self, clip: Clip, seconds: float) -> np.ndarray:
        """Read a crop, or cut it out of what was read before."""
        if not self.recipe.in_memory:
            return read_crop(clip, seconds, self.num_samples, self.config)
        rate = self.config.sampling_rate
        if (whole := self._memory.get(clip)) is None:
            length = max(round(clip.num_samples * rate / clip.sampling_rate), self.num_samples)
            whole = self._memory[clip] = read_crop(clip, 0.0, length, self.config)
        start = min(round(seconds * rate), whole.shape[1] - self.num_samples)
        return whole[:, start : start + self.num_samples].copy()


def read_features(clip: Clip, start: float, seconds: float) -> np.ndarray:
    """Read a teacher's features of a crop.

    Args:
        clip: a clip that has features.
        start: seconds from the beginning of the clip.
        seconds: length of the crop.

    Returns:
        float32 [vectors, dim]; the last vector is repeated after the end of the clip.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file does not hold such features, they are not finite, or the clip is too short.
    """
    assert clip.features is not None
    try:
        if is_remote(clip.features):
            features = np.lib.format.read_array(io.BytesIO(read_whole(clip.features)))
        else:
            features = np.lib.format.open_memmap(clip.features, mode="r")
    except ValueError as error:
        raise ValueError(f"{clip.features} is not a .npy file of numbers: {error}") from error
    if features.ndim != 2 or len(features) == 0:
        raise ValueError(f"{clip.features} must hold features [vectors, dim], got {list(features.shape)}")
    length = clip.num_samples / clip.sampling_rate
    if length < SHORTEST_WITH_FEATURES:
        raise ValueError(
            f"{clip.features} is of a clip of {length:.2g} s, and the rate of its features is not clear below"
            f" {SHORTEST_WITH_FEATURES:g} s"
        )
    # A teacher leaves out a vector or two at the end, so its true rate is the nearest multiple of 12.5 Hz.
    rate = round(len(features) / length / 12.5) * 12.5
    numbers = np.arange(round(seconds * rate)) + round(start * rate)
    vectors = np.asarray(features[np.minimum(numbers, len(features) - 1)], np.float32)
    if not np.isfinite(vectors).all():
        raise ValueError(f"{clip.features} has features that are NaN or infinite")
    return vectors


def fit_features(features: np.ndarray, frames: int) -> np.ndarray:
    """Give each frame the same number of a teacher's vectors, by adding or removing some at the end.

    Args:
        features: float [batch, vectors, dim].
        frames: how many frames the audio of these features has.

    Raises:
        ValueError: more than two vectors are missing or too many, so the rate is not a multiple of 12.5 Hz.
    """
    found = features.shape[1]
    wanted = max(round(found / frames), 1) * frames
    if abs(wanted - found) > 2:
        raise ValueError(
            f"the teacher gave {found} vectors for {frames} frames; its rate must be a multiple of 12.5 Hz,"
            " and at most two vectors may be missing at the end"
        )
    return features[:, np.minimum(np.arange(wanted), found - 1)]


def make_iterator(sampler: Sampler, seed: int, batch_size: int, num_steps: int) -> Any:
    """A Grain iterator over batches: dicts of arrays [batch, ...]. Checkpoints hold its state.

    Threads read the crops, since decoding and resampling let other threads run.
    """
    import grain

    threads = max(4, min(16, os.cpu_count() or 1))
    examples = grain.MapDataset.range(num_steps * batch_size).seed(seed).random_map(sampler)
    batches = examples.to_iter_dataset(
        grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * batch_size)
    )
    return iter(batches.batch(batch_size, drop_remainder=True))
