"""Draw docs/architecture.png: the codec, with the three clocks.

    python docs/architecture.py [FILE]

All numbers come from the default configuration. It needs matplotlib (the extra `plot`).
"""

import math
import sys
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patches import FancyBboxPatch

from mimi_jax import MimiConfig

CONFIG = MimiConfig()
SIZE = (11.5, 7.2)  # inches
LEFT, MIDDLE, RIGHT = 2.55, 5.5, 8.45
HEIGHT, WIDTH = 0.62, 2.5  # of a box
ENCODER, QUANTIZER, DECODER = "#dbe9f8", "#fdeccd", "#dff0d8"
GREY = "#555555"
# Of each clock: the bottom and the top of its band, and its colour.
BANDS = {
    "samples": (5.55, 7.0, "#fafafa"),
    "steps": (2.95, 4.85, "#fafafa"),
    "frames": (0.3, 2.25, "#fafafa"),
}


def box(axes: Any, x: float, y: float, title: str, detail: str, color: str, width: float = WIDTH) -> None:
    corner = x - width / 2, y - HEIGHT / 2
    style = "round,pad=0.02,rounding_size=0.06"
    axes.add_patch(FancyBboxPatch(corner, width, HEIGHT, boxstyle=style, fc=color, ec=GREY, lw=1, zorder=3))
    axes.text(x, y + 0.13, title, ha="center", va="center", weight="bold", fontsize=10, zorder=4)
    axes.text(x, y - 0.14, detail, ha="center", va="center", fontsize=8.5, zorder=4)


def arrow(axes: Any, start: tuple[float, float], end: tuple[float, float], shape: str = "") -> None:
    axes.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": GREY, "lw": 1.4}, zorder=2)
    if shape:
        x, y = (start[0] + end[0]) / 2, (start[1] + end[1]) / 2
        axes.text(x + 0.1, y, shape, ha="left", va="center", fontsize=8.5, family="monospace", zorder=4)


def draw_clocks(axes: Any) -> None:
    rate = CONFIG.sampling_rate
    samples_per_step = math.prod(CONFIG.upsampling_ratios)
    texts = {
        "samples": f"{rate / 1000:g} kHz",
        "steps": f"{rate / samples_per_step:g} Hz\n{samples_per_step} samples\n40 ms",
        "frames": f"{rate / CONFIG.frame_size:g} Hz\n{CONFIG.frame_size} samples\n80 ms",
    }
    for name, (bottom, top, color) in BANDS.items():
        axes.axhspan(bottom, top, color=color, zorder=0)
        axes.axhline(bottom, color="#cccccc", lw=0.8, ls=":", zorder=1)
        axes.axhline(top, color="#cccccc", lw=0.8, ls=":", zorder=1)
        axes.text(0.12, top - 0.12, name, weight="bold", va="top", fontsize=11)
        axes.text(0.12, top - 0.42, texts[name], va="top", fontsize=8.5, color=GREY)


def draw_waveform(axes: Any, x: float, y: float) -> None:
    time = np.linspace(0, 1, 400)
    wave = np.sin(2 * np.pi * 31 * time) * np.sin(np.pi * time) * (0.5 + 0.5 * np.sin(2 * np.pi * 2.3 * time))
    axes.plot(x + (time - 0.5) * 2.2, y + 0.27 * wave, color="#1f77b4", lw=1)


def draw_codes(axes: Any, x: float, y: float) -> None:
    codes = np.random.default_rng(0).integers(0, CONFIG.codebook_size, (6, 12))
    axes.imshow(codes, extent=(x - 0.75, x + 0.75, y - 0.36, y + 0.36), aspect="auto", zorder=3)


def draw_halves(axes: Any) -> None:
    hidden, layers = CONFIG.hidden_size, CONFIG.num_hidden_layers
    ratios = [str(ratio) for ratio in CONFIG.upsampling_ratios]
    stride = CONFIG.latent_stride
    steps, frames = f"[steps, {hidden}]", f"latents [frames, {hidden}]"
    window = f"{layers} layers, window of {CONFIG.sliding_window} steps"
    down, up = " x ".join(reversed(ratios)), " x ".join(ratios)
    samples = f"[samples, {CONFIG.audio_channels}]"
    ys = 6.2, 5.2, 3.9, 2.6, 1.3
    for x, color, names, details in (
        (
            LEFT,
            ENCODER,
            ("SEANet encoder", "Transformer", "Downsample"),
            (f"{down} times fewer", window, f"{stride} times fewer"),
        ),
        (
            RIGHT,
            DECODER,
            ("SEANet decoder", "Transformer", "Upsample"),
            (f"{up} times more", window, f"{stride} times more"),
        ),
    ):
        for y, name, detail in zip(ys[1:4], names, details, strict=True):
            box(axes, x, y, name, detail, color)
        draw_waveform(axes, x, ys[0] + 0.4)
        gaps = [(ys[0] + 0.08, ys[1] + HEIGHT / 2, samples)]
        gaps += [(ys[i] - HEIGHT / 2, ys[i + 1] + HEIGHT / 2, shape) for i, shape in ((1, steps), (2, steps))]
        gaps += [(ys[3] - HEIGHT / 2, ys[4] + HEIGHT / 2, frames)]
        for high, low, shape in gaps:
            arrow(axes, *(((x, high), (x, low)) if x == LEFT else ((x, low), (x, high))), shape)
    axes.text(LEFT, 7.12, "encode", ha="center", weight="bold", fontsize=12)
    axes.text(RIGHT, 7.12, "decode", ha="center", weight="bold", fontsize=12)


def draw_quantizer(axes: Any) -> None:
    count, semantic = CONFIG.num_quantizers, CONFIG.num_semantic_quantizers
    detail = f"{semantic} semantic + {count - semantic} acoustic"
    box(axes, LEFT, 1.3, "Split RVQ: quantize", detail, QUANTIZER)
    box(axes, RIGHT, 1.3, "Split RVQ: dequantize", "sum of the entries", QUANTIZER)
    draw_codes(axes, MIDDLE, 1.3)
    arrow(axes, (LEFT + WIDTH / 2, 1.3), (MIDDLE - 0.8, 1.3))
    arrow(axes, (MIDDLE + 0.8, 1.3), (RIGHT - WIDTH / 2, 1.3))
    axes.text(MIDDLE, 0.72, f"codes [{count}, frames]", ha="center", fontsize=9, family="monospace")
    bits = math.log2(CONFIG.codebook_size)
    rate = 8 * bits * CONFIG.sampling_rate / CONFIG.frame_size / 1000
    text = f"{CONFIG.codebook_size} codes a codebook; 8 codebooks: {rate:g} kbit/s"
    axes.text(MIDDLE, 0.46, text, ha="center", fontsize=8.5, color=GREY)


def draw_state(axes: Any) -> None:
    ring = "a ring of keys\nand values in each layer"
    for y, text in ((5.2, "the last inputs\nof each convolution"), (3.9, ring), (2.6, "the last inputs")):
        axes.text(MIDDLE, y, text, ha="center", va="center", fontsize=8.5, style="italic", color="#8a4b08")
        for x in (LEFT + WIDTH / 2 + 0.05, RIGHT - WIDTH / 2 - 0.05):
            axes.plot(
                [x, MIDDLE - 0.95 if x < MIDDLE else MIDDLE + 0.95], [y, y], color="#c98f4e", lw=0.8, ls="--"
            )
    text = "state: what a stream remembers"
    axes.text(MIDDLE, 5.75, text, ha="center", fontsize=9.5, weight="bold", color="#8a4b08")


def main() -> None:
    figure, axes = plt.subplots(figsize=SIZE)
    draw_clocks(axes)
    draw_halves(axes)
    draw_quantizer(axes)
    draw_state(axes)
    axes.set(xlim=(0, 11), ylim=(0.3, 7.35))
    axes.set_axis_off()
    path = sys.argv[1] if len(sys.argv) > 1 else Path(__file__).with_suffix(".png")
    figure.savefig(path, dpi=110, bbox_inches="tight", pad_inches=0.1)


if __name__ == "__main__":
    main()
