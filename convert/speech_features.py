"""Features of a speech network for a folder of speech with a manifest, as a teacher of the semantic codebook.

    pip install pyopen-wakeword  # 7 MB, Apache-2.0: the network, and TensorFlow Lite
    python -m convert.speech_features speech features

The network is Google's speech embedding (arXiv 2002.01322) as openWakeWord gives it away: 96 numbers for each
80 ms, from a window of 775 ms. Each window is centred on its frame, so it looks ahead. Over all clips for
training, each number has mean 0 and variance 1. `features` becomes a folder with .npy files and a manifest
that names them, beside links to the clips.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from mimi_jax.files.atomic import atomic_path
from mimi_jax.files.audio import load_audio

RATE, CHUNK = 16_000, 1280  # Hz; samples of 80 ms
DIM = 96
LAG = 5  # frames from a frame to the end of a window that is centred on it


def features_of(network: Any, audio: np.ndarray) -> np.ndarray:
    """Features float32 [frames, 96] of audio [samples] at 16 kHz."""
    frames = -(-len(audio) // CHUNK)
    silence = np.zeros(RATE, np.float32)  # fills the first window
    after = np.zeros((frames + LAG + 2) * CHUNK - len(audio), np.float32)
    network.reset()
    network.new_audio_samples = network.new_mels = 0
    for piece in (silence, np.concatenate([audio, after])):  # the vectors of the silence are not used
        samples = (32_767 * np.clip(piece, -1, 1)).astype(np.int16)
        chunks = [samples[start : start + CHUNK].tobytes() for start in range(0, len(samples), CHUNK)]
        vectors = [x.reshape(-1, DIM) for chunk in chunks for x in network.process_streaming(chunk)]
    return np.concatenate(vectors)[LAG : LAG + frames]


def write(network: Any, speech: Path, folder: Path) -> None:
    """Make a folder with the features of all clips, links to the clips, and a manifest of both."""
    lines = [json.loads(line) for line in (speech / "manifest.jsonl").read_text().splitlines()]
    found = [
        features_of(network, load_audio(speech / line["path"], RATE)[0]) for line in tqdm(lines, disable=None)
    ]
    pairs = zip(found, lines, strict=True)
    train = np.concatenate([x for x, line in pairs if line["path"].startswith("train/")])
    mean, deviation = train.mean(axis=0), train.std(axis=0)
    folder.mkdir()
    for name in sorted({Path(line["path"]).parts[0] for line in lines}):
        (folder / name).symlink_to((speech / name).resolve())
    for number, (line, x) in enumerate(zip(lines, found, strict=True)):
        line["features"] = f"{number}.npy"
        np.save(folder / line["features"], ((x - mean) / deviation).astype(np.float32))
    (folder / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    print(f"{len(lines)} clips, {len(np.concatenate(found))} vectors of {DIM} numbers")


def main() -> None:
    parser = argparse.ArgumentParser(description="Compute a teacher's features for a folder of speech.")
    parser.add_argument("speech", type=Path, help="a folder with manifest.jsonl and its clips")
    parser.add_argument("features", type=Path, help="a new folder to write")
    options = parser.parse_args()
    if options.features.exists():
        parser.error(f"{options.features} is there already; name a new folder")
    from pyopen_wakeword import OpenWakeWordFeatures

    with atomic_path(options.features) as folder:
        write(OpenWakeWordFeatures.from_builtin(), options.speech, folder)


if __name__ == "__main__":
    main()
