"""Do the codes of a model tell words apart whoever says them? An ABX test of its first two codebooks.

    apt-get install espeak-ng  # says the words
    python -m benchmarks.semantic MODEL [MODEL ...] [--trials 6000] [--markdown FILE]

Six voices of eSpeak NG say words that differ in one sound, such as "bat" and "cat". In each trial, one voice
says word X, and another voice says X and a second word. The codes are right if those of both X are nearer to
each other than to those of the second word. The distance is that of dynamic time warping (DTW) over the
cosines between entries of the codebook, an average over the path. A coin is wrong in 50 % of the trials.
"""

import argparse
import functools
import io
import itertools
import random
import shutil
import subprocess
from collections.abc import Callable

import jax
import numpy as np
from tqdm import tqdm

from benchmarks.report import Report, add_markdown_option
from mimi_jax import Mimi, encode
from mimi_jax.files.audio import read_audio

WORDS = [
    *("bat pat cat mat rat hat sat fat", "bit pit kit sit fit hit", "ten men pen den hen"),
    *("top mop hop cop shop", "bed red fed led", "bug mug hug rug dug", "light night right sight fight"),
    *("make take lake cake wake", "seat sit set sat sought", "bead bid bed bad", "cap cat can cab"),
    *("sing thing ring king wing", "map mat mad man"),
]
VOICES = ["en-us+m1", "en-us+m3", "en-us+f2", "en-us+f4", "en-gb+m7", "en-gb+f5"]
SILENCE = 0.2  # seconds, before and after each word
BATCH = 32

Said = tuple[str, str]  # a word and a voice


def say(word: str, voice: str, sampling_rate: int) -> np.ndarray:
    """float32 [samples], between pieces of silence."""
    command = ["espeak-ng", "-v", voice, "-s", "140", "--stdout", word]
    wav = subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout
    audio = read_audio(io.BytesIO(wav), word, sampling_rate)[0]
    return np.pad(0.7 * audio / np.abs(audio).max(), round(SILENCE * sampling_rate))


def entries_of(model: Mimi, codebook: int, said: dict[Said, np.ndarray]) -> dict[Said, np.ndarray]:
    """What a codebook says for each word: entries of unit length, [frames, dim]."""
    size, count = model.config.frame_size, model.config.num_semantic_quantizers
    semantic, acoustic = model.quantizer.semantic, model.quantizer.acoustic
    part, level = (semantic, codebook) if codebook < count else (acoustic, codebook - count)
    entries = np.asarray(part.embedding[...][level], np.float32)
    entries = entries / np.maximum(np.linalg.norm(entries, axis=1, keepdims=True), 1e-8)
    longest = -(-max(map(len, said.values())) // size) * size
    audio = np.stack([np.pad(clip, (0, longest - len(clip))) for clip in said.values()])[:, None]
    codes = [
        np.asarray(encode(model, audio[start : start + BATCH], num_quantizers=codebook + 1).audio_codes)
        for start in range(0, len(audio), BATCH)
    ]
    rows = zip(said.items(), np.concatenate(codes), strict=True)
    return {key: entries[row[codebook, : len(clip) // size]] for (key, clip), row in rows}


def distance(x: np.ndarray, y: np.ndarray) -> float:
    """Of dynamic time warping: the mean of 1 - cosine over the path with the smallest sum."""
    costs = 1 - x @ y.T
    best: dict[tuple[int, int], tuple[float, int]] = {(-1, -1): (0.0, 0)}  # the sum, and the steps to it
    nowhere = (np.inf, 0)
    for i, j in np.ndindex(costs.shape):
        before = ((i - 1, j - 1), (i - 1, j), (i, j - 1))
        total, steps = min(best.get(place, nowhere) for place in before)
        best[i, j] = total + float(costs[i, j]), steps + 1
    total, steps = best[costs.shape[0] - 1, costs.shape[1] - 1]
    return total / steps


def error(distance: Callable[[Said, Said], float], trials: int) -> float:
    """The share of trials that are wrong."""
    found = [
        (word, other, *voices)
        for group in map(str.split, WORDS)
        for word, other in itertools.permutations(group, 2)
        for voices in itertools.permutations(VOICES, 2)
    ]
    random.Random(0).shuffle(found)
    wrong = []
    for word, other, voice, second_voice in tqdm(found[:trials], disable=None):
        x = word, second_voice
        right, mistaken = distance(x, (word, voice)), distance(x, (other, voice))
        wrong.append(0.5 if right == mistaken else float(right > mistaken))
    return float(np.mean(wrong))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="+", help="as for Mimi.from_pretrained")
    parser.add_argument("--trials", type=int, default=6000)
    add_markdown_option(parser)
    options = parser.parse_args()
    if shutil.which("espeak-ng") is None:
        parser.error("espeak-ng says the words, and it is not installed; try apt-get install espeak-ng")
    words = sorted({word for group in WORDS for word in group.split()})
    report = Report(jax.devices()[0].device_kind, [f"{options.trials} trials, {len(words)} words"])
    report.table(["model", "first codebook, % wrong", "second"])
    for name in options.models:
        model = Mimi.from_pretrained(name)
        said = {
            (word, voice): say(word, voice, model.config.sampling_rate) for word in words for voice in VOICES
        }
        errors = []
        for codebook in (0, 1):
            entries = entries_of(model, codebook, said)
            between = functools.cache(lambda a, b, entries=entries: distance(entries[a], entries[b]))
            errors.append(f"{100 * error(between, options.trials):.1f}")
        report.row([name, *errors])
    report.save(options.markdown)


if __name__ == "__main__":
    main()
