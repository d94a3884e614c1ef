"""Draw the harmonics of a stretch of speech, and what models make of them.

    python -m benchmarks.harmonics CLIP MODEL [MODEL ...] -o FILE [--start 1.0] [--seconds 1.5]
        [--num-quantizers 11]

The whole clip is encoded and decoded, so that the stretch has a past. The picture shows frequencies up to
4 kHz on a linear scale, where the harmonics of a voice are equally far apart.
"""

import argparse
from pathlib import Path

import numpy as np

from mimi_jax import Mimi, decode, encode, load_audio

WINDOW, HIGHEST = 1024, 4_000  # samples, and Hz


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("clip", type=Path)
    parser.add_argument("models", nargs="+", metavar="MODEL")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--start", type=float, default=1.0, help="seconds")
    parser.add_argument("--seconds", type=float, default=1.5)
    parser.add_argument("--num-quantizers", type=int, default=11)
    options = parser.parse_args()
    from matplotlib.figure import Figure

    audio = load_audio(options.clip)[None]
    heard = {"original": audio}
    for name in options.models:
        model = Mimi.from_pretrained(name)
        codes = encode(model, audio, num_quantizers=options.num_quantizers).audio_codes
        heard[name] = np.asarray(decode(model, codes).audio_values)[..., : audio.shape[2]]
    rate = Mimi.from_pretrained(options.models[0]).config.sampling_rate
    begin, end = (round(second * rate) for second in (options.start, options.start + options.seconds))
    figure = Figure(figsize=(9, 2.6 * len(heard)), layout="constrained")
    axes = figure.subplots(len(heard), sharex=True, sharey=True, squeeze=False)[:, 0]
    for axis, (name, samples) in zip(axes, heard.items(), strict=True):
        axis.specgram(
            samples[0, 0, begin:end], NFFT=WINDOW, Fs=rate, noverlap=WINDOW * 7 // 8, vmin=-130, vmax=-40
        )
        axis.set(title=Path(name).name, ylim=(0, HIGHEST), ylabel="Hz")
    axes[-1].set_xlabel("seconds")
    figure.savefig(options.output, dpi=90)


if __name__ == "__main__":
    main()
