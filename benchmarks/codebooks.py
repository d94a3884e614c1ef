"""What other codebooks would make of a model: few large ones beside many small ones, at equal bit rates.

    pip install torchaudio distillmos speechmos onnxruntime librosa  # in an environment of its own
    python -m benchmarks.codebooks MODEL DATA [--sizes 256x32 1024x16] [--kbits 1.1] [--markdown FILE]

The encoder and the decoder stay as they are. Codebooks of each size are fitted by k-means to the latents of
DATA's clips in `train/`. Those in `valid/` are encoded and decoded with as many codebooks as the bit rate
allows, and rated as in `benchmarks.listening`.
"""

import argparse
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tqdm import tqdm

from benchmarks.listening import Rating, rate_model, stretches
from benchmarks.report import Report, add_markdown_option
from mimi_jax import Mimi
from mimi_jax.files.arrays import with_values
from mimi_jax.files.corpus import find_clips, read_crop
from mimi_jax.train import codebooks as vq
from mimi_jax.train.weights import weights_of, with_weights

CROP, BATCH = 4.0, 16  # seconds, and how many are encoded at once


def latents_of(model: Mimi, data: str, vectors: int) -> np.ndarray:
    """So many latents of clips for training, float32 [vectors, hidden_size], in random order."""
    config = model.config
    clips = find_clips(data, "train/*").clips
    crops = [
        (clip, start)
        for clip in clips
        for start in np.arange(0, clip.num_samples / clip.sampling_rate - CROP, CROP)
    ]
    np.random.default_rng(0).shuffle(crops)
    frames = CROP * config.sampling_rate / config.frame_size  # of a crop
    crops = crops[: int(np.ceil(vectors / frames / BATCH)) * BATCH]
    found = []
    for first in tqdm(range(0, len(crops) - BATCH + 1, BATCH), "latents", disable=None):
        audio = [
            read_crop(clip, start, round(CROP * config.sampling_rate), config)
            for clip, start in crops[first : first + BATCH]
        ]
        found.append(np.asarray(model.encode_latents(np.stack(audio))).reshape(-1, config.hidden_size))
    return np.concatenate(found)[:vectors]


def with_codebooks(model: Mimi, size: int, count: int, latents: np.ndarray) -> Mimi:
    """A copy with other codebooks, which are fitted to the latents."""
    config = dataclasses.replace(model.config, codebook_size=size, num_quantizers=count)
    other = with_weights(Mimi(config, rngs=nnx.Rngs(0)), weights_of(model))
    values = {}
    for part, books in vq.fit(other.quantizer, jnp.asarray(latents), jax.random.key(0), len(latents)).items():
        values[f"quantizer.{part}.cluster_usage"] = books.usage
        values[f"quantizer.{part}.embedding_sum"] = books.sums
    other = with_values(other, values)
    other.quantizer.derive()
    return other


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("data")
    parser.add_argument("--sizes", nargs="+", default=["256x32", "512x20", "1024x16", "2048x12"])
    parser.add_argument("--kbits", type=float, default=1.1, help="kbit/s, at most")
    parser.add_argument("--vectors", type=int, default=40_000, help="latents that k-means sees")
    parser.add_argument("--seconds", type=float, default=6.0, help="of each clip that is rated")
    add_markdown_option(parser)
    options = parser.parse_args()
    model = Mimi.from_pretrained(options.model)
    latents = latents_of(model, options.data, options.vectors)
    clips = stretches(options.data, "valid/*", options.seconds, model)
    report = Report(jax.devices()[0].device_kind, [f"{options.model}, {len(clips)} clips"])
    report.table(["codebooks", "used", "kbit/s", "DistillMOS", "DNSMOS P.808", "PLCMOS", "STOI"])
    for name in ("as trained", *options.sizes):
        config, changed = model.config, model
        size, total = config.codebook_size, config.num_quantizers
        if name != "as trained":
            size, total = map(int, name.split("x"))
            changed = with_codebooks(model, size, total, latents)
        bits = np.log2(size) * config.frame_rate / 1000
        count = int(options.kbits / bits + 1e-9)
        row = Rating(*np.mean(rate_model(changed, clips, [count])[str(count)], axis=0))
        values = (f"{value:.2f}" for value in row[:3])
        report.row([name, str(count), f"{count * bits:.2f}", *values, f"{row.stoi:.3f}"])
    report.save(options.markdown)


if __name__ == "__main__":
    main()
