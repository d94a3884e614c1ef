"""Pictures: what the codec did to a clip, and how good it is for each number of codebooks.

They need matplotlib (`pip install 'mimi_jax[plot]'`), which is imported only when a picture is drawn.
"""

import io
from typing import TYPE_CHECKING, Any

import numpy as np

from mimi_jax.config import ceil_div
from mimi_jax.quality.spectrum import NUM_BANDS, mel_filters, to_mel

if TYPE_CHECKING:
    from mimi_jax.quality.evaluation import Evaluation

MAX_COLUMNS = 1500  # about the width of a picture in pixels; a longer clip is drawn more coarsely
DYNAMIC_RANGE = 80  # dB below the loudest band
TICKS = (200, 500, 1000, 2000, 4000, 8000, 16_000)  # Hz


def draw(
    original: np.ndarray,
    decoded: np.ndarray,
    codes: np.ndarray,
    *,
    sampling_rate: int,
    frame_size: int,
    codebook_size: int,
    title: str,
) -> bytes:
    """Draw the waveforms and mel spectrograms of a clip before and after the codec, and its codes.

    Args:
        original, decoded: float [channels, samples]. The picture shows the mean of the channels.
        codes: integers [codebooks, frames] in [0, codebook_size).
        sampling_rate: Hz.
        frame_size: samples per frame of the codes.
        codebook_size: number of codes in a codebook.
        title: one line above the picture.

    Returns:
        The bytes of a PNG file.
    """
    from matplotlib.figure import Figure  # unlike pyplot, it opens no window and has no global state

    end = codes.shape[1] * frame_size / sampling_rate
    clips = {"original": original.mean(axis=0), "decoded": decoded.mean(axis=0)}
    figure = Figure(figsize=(11, 9), layout="constrained")
    axes = figure.subplots(5, sharex=True, height_ratios=(2, 2, 3, 3, 3))
    figure.suptitle(title, parse_math=False)  # names of files may have dollars
    peak = max(np.abs(clip).max() for clip in clips.values()) or 1
    for axis, (name, clip) in zip(axes[:2], clips.items(), strict=True):
        _draw_waveform(axis, clip, sampling_rate)
        axis.set(ylabel=f"{name}\namplitude", ylim=(-1.05 * peak, 1.05 * peak))
    mels = {name: log_mel(clip, sampling_rate) for name, clip in clips.items()}
    top = max(mel.max() for mel in mels.values())
    for axis, (name, mel) in zip(axes[2:4], mels.items(), strict=True):
        image = _draw_mel(axis, mel - top, sampling_rate, original.shape[1] / sampling_rate)
        axis.set_ylabel(f"{name}\nfrequency (kHz)")
    figure.colorbar(image, ax=axes[2:4], label="power (dB, loudest = 0)", pad=0.01)
    image = _draw_codes(axes[4], codes, codebook_size, end)
    axes[4].set(ylabel="codebook\n(semantic first)", xlabel="time (s)", xlim=(0, end))
    figure.colorbar(image, ax=axes[4], label="code", pad=0.01)
    return _to_png(figure)


def _draw_waveform(axis: Any, samples: np.ndarray, sampling_rate: int) -> None:
    """Fill the range between the lowest and the highest sample of each column."""
    starts = np.unique(np.linspace(0, len(samples), MAX_COLUMNS, endpoint=False, dtype=int))
    low, high = np.minimum.reduceat(samples, starts), np.maximum.reduceat(samples, starts)
    axis.fill_between(starts / sampling_rate, low, high, step="post", color="tab:blue", linewidth=0.5)
    axis.grid(alpha=0.3)


def _draw_mel(axis: Any, mel: np.ndarray, sampling_rate: int, duration: float) -> Any:
    """Draw [columns, bands] in dB (0 is the loudest), with the bands labelled by their frequencies."""
    ticks = [hertz for hertz in TICKS if hertz <= sampling_rate / 2]
    positions = to_mel(np.array(ticks)) / to_mel(sampling_rate / 2) * NUM_BANDS
    axis.set_yticks(positions, [f"{hertz / 1000:g}" for hertz in ticks])
    limits = {"vmin": -DYNAMIC_RANGE, "vmax": 0, "extent": (0, duration, 0, NUM_BANDS)}
    return axis.imshow(mel.T, cmap="magma", origin="lower", aspect="auto", **limits)


def _draw_codes(axis: Any, codes: np.ndarray, codebook_size: int, end: float) -> Any:
    """Draw [codebooks, frames]. Colours only show which codes are equal."""
    axis.yaxis.get_major_locator().set_params(integer=True)
    limits = {"vmin": 0, "vmax": codebook_size - 1, "extent": (0, end, len(codes) + 0.5, 0.5)}
    return axis.imshow(codes, interpolation="nearest", aspect="auto", **limits)


def _to_png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()


def log_mel(samples: np.ndarray, sampling_rate: int) -> np.ndarray:
    """Compute the power of a clip in bands of equal width on the mel scale.

    Args:
        samples: float [samples].
        sampling_rate: Hz.

    Returns:
        float [columns, NUM_BANDS] in dB. There is a column every 10 ms, but a long clip has only about
        MAX_COLUMNS.
    """
    window = 2 ** round(np.log2(sampling_rate / 24))  # about 40 ms
    hop = max(sampling_rate // 100, ceil_div(len(samples), MAX_COLUMNS))
    padded = np.pad(samples, window // 2)
    columns = np.lib.stride_tricks.sliding_window_view(padded, window)[::hop]
    power = np.abs(np.fft.rfft(columns * np.hanning(window))) ** 2
    return 10 * np.log10(power @ mel_filters(window, sampling_rate, NUM_BANDS).T + 1e-10)


def draw_evaluation(evaluation: "Evaluation", title: str) -> bytes:
    """Draw the quality for each number of codebooks, and how much of each codebook is in use.

    Returns:
        The bytes of a PNG file.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 6), layout="constrained")
    figure.suptitle(f"{title}: {evaluation.num_clips} clips, {evaluation.seconds:.0f} s", parse_math=False)
    axes = figure.subplots(2, 3).ravel()
    counts = [row.num_quantizers for row in evaluation.qualities]
    measures = {
        "stoi": "STOI (higher is better)",
        "visqol": "ViSQOL, 1 to 5 (higher is better)",
        "mel_distance": "mel distance in dB (lower is better)",
        "si_sdr": "SI-SDR in dB (higher is better)",
    }
    if evaluation.qualities[0].visqol is None:
        del measures["visqol"]
    for axis, (name, label) in zip(axes, measures.items(), strict=False):
        axis.plot(counts, [getattr(row, name) for row in evaluation.qualities], marker="o")
        axis.set(title=label, xlabel="codebooks", xscale="log")
        axis.set_xticks(counts, [str(count) for count in counts])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    shares = 100 * np.array(evaluation.perplexities) / evaluation.codebook_size
    axes[len(measures)].bar(np.arange(1, len(shares) + 1), shares)
    axes[len(measures)].set(
        title=f"perplexity in % of {evaluation.codebook_size} codes", xlabel="codebook (semantic first)"
    )
    axes[len(measures)].set_ylim(0, 100)
    for axis in axes[len(measures) + 1 :]:
        axis.set_axis_off()
    return _to_png(figure)
