"""How listeners would rate a model, by networks that were trained on the ratings of people.

    pip install torchaudio distillmos speechmos onnxruntime librosa  # in an environment of its own
    python -m benchmarks.listening MODEL DATA [--include 'valid/*'] [--num-quantizers 4 8 11 16 32]
        [--plot FILE] [--markdown FILE]

The first seconds of each clip are encoded, and decoded from several numbers of codebooks. DistillMOS (Stahl
and Gamper, arXiv 2502.05356), DNSMOS P.808 and PLCMOS v2 (Microsoft) rate what comes out on a scale from 1 to
5. They do not compare it with the originals, which are rated too. The packages bring the weights of these
networks. They hear nothing above 8 kHz. STOI compares each clip with its original. The numbers are means over
clips.
"""

import argparse
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import soxr
from tqdm import tqdm

from benchmarks.report import Report, add_markdown_option
from mimi_jax import Mimi, decode, encode, pad_batch
from mimi_jax.files.corpus import find_clips, read_crop

RATE = 16_000  # Hz, of the networks


class Rating(NamedTuple):
    """Of one clip."""

    distillmos: float
    p808: float
    plcmos: float
    stoi: float


class Listeners:
    """The networks."""

    def __init__(self) -> None:
        import distillmos  # pyright: ignore[reportMissingImports]
        import torch  # pyright: ignore[reportMissingImports]
        from pystoi import stoi
        from speechmos import dnsmos, plcmos  # pyright: ignore[reportMissingImports]

        self._torch, self._dnsmos, self._plcmos, self._stoi = torch, dnsmos, plcmos, stoi
        self._distillmos: Any = distillmos.ConvTransformerSQAModel().eval()

    def __call__(self, original: np.ndarray, audio: np.ndarray, sampling_rate: int) -> Rating:
        """Rate a clip [1, samples]."""
        sound = soxr.resample(audio[0], sampling_rate, RATE).astype(np.float32).clip(-1, 1)
        with self._torch.no_grad():
            distillmos = float(self._distillmos(self._torch.from_numpy(sound)[None]))
        p808 = float(self._dnsmos.run(sound, RATE)["p808_mos"])
        plcmos = float(self._plcmos.run(sound, RATE)["plcmos"])
        return Rating(distillmos, p808, plcmos, float(self._stoi(original[0], audio[0], sampling_rate)))


def stretches(data: str, include: str, seconds: float, model: Mimi) -> list[np.ndarray]:
    """The first seconds of each clip, float32 [1, samples] at the rate of the model."""
    rate = model.config.sampling_rate
    found = []
    for clip in find_clips(data, include).clips:
        length = min(seconds, clip.num_samples / clip.sampling_rate)
        found.append(read_crop(clip, 0.0, round(length * rate), model.config))
    return found


def rate_model(model: Mimi, clips: list[np.ndarray], counts: list[int]) -> dict[str, list[Rating]]:
    """The ratings of all clips: the originals, and what is decoded from each number of codebooks."""
    config, listeners = model.config, Listeners()
    rated: dict[str, list[Rating]] = {name: [] for name in ("originals", *map(str, counts))}
    for clip in tqdm(clips, "listening", disable=None):
        rated["originals"].append(listeners(clip, clip, config.sampling_rate))
        batch, mask = pad_batch([clip], config.frame_size)
        codes, _ = encode(model, batch, mask)
        for count in counts:
            audio = np.asarray(decode(model, codes[:, :count], mask).audio_values)[0, :, : clip.shape[1]]
            rated[str(count)].append(listeners(clip, audio, config.sampling_rate))
    return rated


def plot(means: dict[str, Rating], path: Path, title: str) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    counts = [name for name in means if name != "originals"]
    for number, name in enumerate(("distillmos", "p808", "plcmos")):
        values = [getattr(means[count], name) for count in counts]
        axes.plot(list(map(int, counts)), values, "o-", color=f"C{number}", label=name)
        axes.axhline(getattr(means["originals"], name), color=f"C{number}", linestyle=":", linewidth=1)
    axes.set(
        title=f"{title}; dotted: the originals", xlabel="codebooks", ylabel="rating, 1 to 5", ylim=(1, 5)
    )
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(map(int, counts)), counts)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("data")
    parser.add_argument("--include", default="*", metavar="PATTERN")
    parser.add_argument("--num-quantizers", type=int, nargs="+", metavar="N", default=[4, 8, 16])
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--plot", type=Path, metavar="FILE", help="also draw the ratings")
    add_markdown_option(parser)
    options = parser.parse_args()
    model = Mimi.from_pretrained(options.model)
    config = model.config
    clips = stretches(options.data, options.include, options.seconds, model)
    total = sum(clip.shape[1] for clip in clips) / config.sampling_rate
    report = Report(jax.devices()[0].device_kind, [f"{options.model}, {len(clips)} clips, {total:.0f} s"])
    rated = rate_model(model, clips, sorted(options.num_quantizers))
    means = {name: Rating(*np.mean(rows, axis=0)) for name, rows in rated.items()}
    report.table(["codebooks", "kbit/s", "DistillMOS", "DNSMOS P.808", "PLCMOS", "STOI"])
    for name, row in means.items():
        bits = np.log2(config.codebook_size) * config.frame_rate / 1000
        kbits = "" if name == "originals" else f"{int(name) * bits:.2f}"
        report.row([name, kbits, *(f"{value:.2f}" for value in row[:3]), f"{row.stoi:.3f}"])
    report.save(options.markdown)
    if options.plot is not None:
        plot(means, options.plot, options.model)


if __name__ == "__main__":
    main()
