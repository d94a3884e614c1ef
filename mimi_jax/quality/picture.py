"""A picture of what the codec did to a clip: waveforms, mel spectrograms and codes, on one time axis.

Needs matplotlib (`pip install 'mimi_jax[plot]'`), which is imported only when a picture is drawn.
"""

import io
from typing import TYPE_CHECKING

import numpy as np

from mimi_jax.files.codes import CodeFile
from mimi_jax.quality.spectrum import NUM_BANDS, mel_filters, to_mel

if TYPE_CHECKING:
    from mimi_jax.quality.evaluation import Evaluation

MAX_COLUMNS = 1500  # about the pixels across; longer clips are drawn, and computed, more coarsely
DYNAMIC_RANGE = 80  # dB below the loudest band
TICKS = (200, 500, 1000, 2000, 4000, 8000, 16_000)  # Hz


def draw(original: np.ndarray, decoded: np.ndarray, file: CodeFile, title: str) -> bytes:
    """Draw a clip, what came back of it, and the codes in between.

    Args:
        original, decoded: float [channels, samples]; channels are mixed.
        file: the codes, and the rates of all three.
        title: one line above it all.

    Returns:
        A PNG file.
    """
    from matplotlib.figure import Figure  # not pyplot: no windows, and no global state

    rate, end = (
        file.spec.sampling_rate,
        file.audio_codes.shape[1] * file.spec.frame_size / file.spec.sampling_rate,
    )
    clips = {"original": original.mean(axis=0), "decoded": decoded.mean(axis=0)}
    figure = Figure(figsize=(11, 9), layout="constrained")
    axes = figure.subplots(5, sharex=True, height_ratios=(2, 2, 3, 3, 3))
    figure.suptitle(title)
    peak = max(np.abs(clip).max() for clip in clips.values()) or 1
    for axis, (name, clip) in zip(axes[:2], clips.items(), strict=True):
        _draw_waveform(axis, clip, rate)
        axis.set(ylabel=f"{name}\namplitude", ylim=(-1.05 * peak, 1.05 * peak))
    mels = {name: log_mel(clip, rate) for name, clip in clips.items()}
    top = max(mel.max() for mel in mels.values())
    for axis, (name, mel) in zip(axes[2:4], mels.items(), strict=True):
        image = _draw_mel(axis, mel - top, rate, original.shape[1] / rate)
        axis.set_ylabel(f"{name}\nfrequency (kHz)")
    figure.colorbar(image, ax=axes[2:4], label="power (dB, loudest = 0)", pad=0.01)
    image = _draw_codes(axes[4], file, end)
    axes[4].set(ylabel="codebook\n(semantic first)", xlabel="time (s)", xlim=(0, end))
    figure.colorbar(image, ax=axes[4], label="code", pad=0.01)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()


def _draw_waveform(axis, samples: np.ndarray, sampling_rate: int) -> None:
    """The band between the lowest and the highest sample of each column."""
    starts = np.unique(np.linspace(0, len(samples), MAX_COLUMNS, endpoint=False, dtype=int))
    low, high = np.minimum.reduceat(samples, starts), np.maximum.reduceat(samples, starts)
    axis.fill_between(starts / sampling_rate, low, high, step="post", color="tab:blue", linewidth=0.5)
    axis.grid(alpha=0.3)


def _draw_mel(axis, mel: np.ndarray, sampling_rate: int, duration: float):
    """An image of [columns, bands] in dB below 0, the bands labelled by their frequencies."""
    ticks = [hertz for hertz in TICKS if hertz <= sampling_rate / 2]
    positions = to_mel(np.array(ticks)) / to_mel(sampling_rate / 2) * NUM_BANDS
    axis.set_yticks(positions, [f"{hertz / 1000:g}" for hertz in ticks])
    extent = (0, duration, 0, NUM_BANDS)
    return axis.imshow(
        mel.T, cmap="magma", vmin=-DYNAMIC_RANGE, vmax=0, extent=extent, origin="lower", aspect="auto"
    )


def _draw_codes(axis, file: CodeFile, end: float):
    """An image of the codes, whose colours say no more than which are equal."""
    extent = (0, end, len(file.audio_codes) + 0.5, 0.5)
    axis.yaxis.get_major_locator().set_params(integer=True)
    limits = {"vmin": 0, "vmax": file.spec.codebook_size - 1}
    return axis.imshow(file.audio_codes, extent=extent, interpolation="nearest", aspect="auto", **limits)


def log_mel(samples: np.ndarray, sampling_rate: int) -> np.ndarray:
    """The power of a clip in bands of equal width on the mel scale.

    Args:
        samples: float [samples].
        sampling_rate: Hz.

    Returns:
        float [columns, NUM_BANDS] in dB, a column every 10 ms or, in a long clip, at most MAX_COLUMNS.
    """
    window = 2 ** round(np.log2(sampling_rate / 24))  # about 40 ms
    hop = max(sampling_rate // 100, -(-len(samples) // MAX_COLUMNS))
    padded = np.pad(samples, window // 2)
    columns = np.lib.stride_tricks.sliding_window_view(padded, window)[::hop]
    power = np.abs(np.fft.rfft(columns * np.hanning(window))) ** 2
    return 10 * np.log10(power @ mel_filters(window, sampling_rate, NUM_BANDS).T + 1e-10)


def draw_evaluation(evaluation: "Evaluation", title: str) -> bytes:
    """Quality over the number of codebooks, and how many codes of each codebook are in use: a PNG file."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 6), layout="constrained")
    figure.suptitle(f"{title}: {evaluation.num_clips} clips, {evaluation.seconds:.0f} s")
    axes = figure.subplots(2, 3).ravel()
    counts = [row.num_quantizers for row in evaluation.qualities]
    measures = {
        "stoi": "STOI (higher is better)",
        "visqol": "ViSQOL, 1 to 5 (higher is better)",
        "mel_distance": "mel distance in dB (lower is better)",
        "si_sdr": "SI-SDR in dB (higher is better)",
    }
    for axis, (name, label) in zip(axes, measures.items(), strict=False):
        axis.plot(counts, [getattr(row, name) for row in evaluation.qualities], marker="o")
        axis.set(title=label, xlabel="codebooks", xscale="log")
        axis.set_xticks(counts, [str(count) for count in counts])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    shares = 100 * np.array(evaluation.perplexities) / evaluation.codebook_size
    axes[4].bar(np.arange(1, len(shares) + 1), shares)
    axes[4].set(
        title=f"perplexity in % of {evaluation.codebook_size} codes", xlabel="codebook (semantic first)"
    )
    axes[4].set_ylim(0, 100)
    axes[5].set_axis_off()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()
