"""A picture of what the codec did to a clip: waveforms, mel spectrograms and codes, on one time axis.

Needs matplotlib (`pip install 'mimi_jax[plot]'`), which is imported only when a picture is drawn.
"""

import io

import numpy as np

MAX_COLUMNS = 1500  # about the pixels across; longer clips are drawn, and computed, more coarsely
NUM_BANDS = 64
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
    """Draw a clip, what came back of it, and the codes in between.

    Args:
        original, decoded: float [channels, samples]; channels are mixed.
        codes: int [codebooks, frames].
        sampling_rate: Hz, of both clips.
        frame_size: samples a frame.
        codebook_size: codes lie in [0, codebook_size).
        title: one line above it all.

    Returns:
        A PNG file.
    """
    from matplotlib.figure import Figure  # not pyplot: no windows and no global state

    clips = {"original": original.mean(axis=0), "decoded": decoded.mean(axis=0)}
    mels = {name: log_mel(clip, sampling_rate) for name, clip in clips.items()}
    duration = codes.shape[1] * frame_size / sampling_rate
    figure = Figure(figsize=(11, 9), layout="constrained")
    axes = figure.subplots(5, sharex=True, height_ratios=(2, 2, 3, 3, 3))
    figure.suptitle(title)
    peak = max(float(np.abs(clip).max()) for clip in clips.values()) or 1.0
    for axis, (name, clip) in zip(axes[:2], clips.items(), strict=True):
        _draw_waveform(axis, clip, sampling_rate, peak)
        axis.set_ylabel(f"{name}\namplitude")
    top = max(float(mel.max()) for mel in mels.values())
    for axis, (name, mel) in zip(axes[2:4], mels.items(), strict=True):
        extent = (0, len(clips[name]) / sampling_rate, 0, NUM_BANDS)
        image = axis.imshow(
            mel.T,
            aspect="auto",
            origin="lower",
            extent=extent,
            cmap="magma",
            vmin=top - DYNAMIC_RANGE,
            vmax=top,
        )
        _label_bands(axis, sampling_rate)
        axis.set_ylabel(f"{name}\nfrequency (kHz)")
    figure.colorbar(image, ax=axes[2:4], label="power (dB, loudest = 0)", pad=0.01)
    _draw_codes(figure, axes[4], codes, codebook_size, duration)
    axes[4].set(xlabel="time (s)", xlim=(0, duration))
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()


def _draw_waveform(axis, samples: np.ndarray, sampling_rate: int, peak: float) -> None:
    """The band between the lowest and the highest sample of each column."""
    starts = np.unique(np.linspace(0, len(samples), MAX_COLUMNS, endpoint=False, dtype=int))
    low, high = np.minimum.reduceat(samples, starts), np.maximum.reduceat(samples, starts)
    axis.fill_between(starts / sampling_rate, low, high, step="post", color="tab:blue", linewidth=0.5)
    axis.set_ylim(-1.05 * peak, 1.05 * peak)
    axis.grid(alpha=0.3)


def _draw_codes(figure, axis, codes: np.ndarray, codebook_size: int, duration: float) -> None:
    extent = (0, duration, len(codes) + 0.5, 0.5)
    image = axis.imshow(
        codes,
        aspect="auto",
        interpolation="nearest",
        extent=extent,
        cmap="viridis",
        vmin=0,
        vmax=codebook_size - 1,
    )
    axis.set_ylabel("codebook\n(1 is semantic)")
    axis.yaxis.get_major_locator().set_params(integer=True)
    figure.colorbar(image, ax=axis, label="code", pad=0.01)


def _label_bands(axis, sampling_rate: int) -> None:
    ticks = [hertz for hertz in TICKS if hertz <= sampling_rate / 2]
    positions = _to_mel(np.array(ticks)) / _to_mel(sampling_rate / 2) * NUM_BANDS
    axis.set_yticks(positions, [f"{hertz / 1000:g}" for hertz in ticks])


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
    return 10 * np.log10(power @ mel_filters(window, sampling_rate).T + 1e-10)


def mel_filters(window: int, sampling_rate: int) -> np.ndarray:
    """Overlapping triangles, float [NUM_BANDS, window / 2 + 1], equally wide on the mel scale."""
    bins = _to_mel(np.fft.rfftfreq(window, 1 / sampling_rate))
    width = _to_mel(sampling_rate / 2) / (NUM_BANDS + 1)
    centres = width * np.arange(1, NUM_BANDS + 1)
    return np.maximum(0, 1 - np.abs(bins - centres[:, None]) / width)


def _to_mel(hertz):
    return 2595 * np.log10(1 + hertz / 700)
