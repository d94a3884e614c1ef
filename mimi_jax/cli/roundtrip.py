"""`mimi-jax roundtrip`: encode and decode a clip, measure it, and draw it."""

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING

from mimi_jax.cli.checks import (
    check_audio_name,
    check_input,
    check_installed,
    check_num_quantizers,
    check_output,
    check_picture,
)
from mimi_jax.cli.terminal import code_rows, no_stderr, print_table, progress, speed, summary

if TYPE_CHECKING:
    import numpy as np

    from mimi_jax.files.codes import CodeSpec
    from mimi_jax.model import Mimi


def run_roundtrip(arguments: argparse.Namespace) -> None:
    source, output = arguments.input, arguments.output
    picture = output.with_suffix(".png")
    check_installed("plot", "matplotlib")
    check_audio_name(output)
    check_input(source)
    check_output(output, source)
    check_picture(picture, output, source)
    from mimi_jax.checkpoint import code_spec
    from mimi_jax.files.atomic import atomic_path
    from mimi_jax.files.audio import save_audio
    from mimi_jax.model import Mimi
    from mimi_jax.quality.metrics import si_sdr

    model = Mimi.from_pretrained(arguments.model)
    check_num_quantizers(model, arguments.num_quantizers)
    spec = code_spec(model, arguments.num_quantizers)
    audio = _load_audio(source, model)
    num_samples = audio.shape[1]
    _warm_up(model, audio, spec)
    codes, encode_seconds = _encode(model, audio, spec)
    decoded, decode_seconds = _decode(model, codes, num_samples)
    title = f"{source.name} through {arguments.model}: {summary(spec, num_samples)}"
    png = _draw(audio, decoded, codes, spec, title)
    with atomic_path(picture) as temporary:  # around `save_audio`, so that both files appear or none
        temporary.write_bytes(png)
        save_audio(output, decoded, spec.sampling_rate)
    print_table(
        {
            "model": f"{arguments.model} ({spec.model_id})",
            **code_rows(spec, num_samples),
            "SI-SDR": f"{si_sdr(audio, decoded):.1f} dB" if audio.any() else "none, since the clip is silent",
            "encoding": speed(spec, num_samples, encode_seconds),
            "decoding": speed(spec, num_samples, decode_seconds),
        }
    )
    print(f"speeds were measured on {_device()} after a warm-up, so they do not include compilation")
    print(f"wrote {output} and {picture}")


def _load_audio(path: Path, model: "Mimi") -> "np.ndarray":
    from mimi_jax.files.audio import load_audio

    with no_stderr():
        return load_audio(path, model.config.sampling_rate, model.config.audio_channels)


def _warm_up(model: "Mimi", audio: "np.ndarray", spec: "CodeSpec") -> None:
    """Compile the programs that encode and decode `audio`."""
    if model.config.is_streamable:  # then one frame runs the same programs as the whole clip
        audio = audio[:, : spec.frame_size]
    codes, _ = _encode(model, audio, spec)
    _decode(model, codes, audio.shape[1])


def _encode(model: "Mimi", audio: "np.ndarray", spec: "CodeSpec") -> "tuple[np.ndarray, float]":
    """Return codes [codebooks, frames], and how many seconds encoding took."""
    import numpy as np

    from mimi_jax.streams.chunks import encode_chunks

    with progress("encoding", audio.shape[1], spec.sampling_rate) as update:
        start, chunks = time.perf_counter(), []
        for codes, num_samples in encode_chunks(model, [audio], spec.num_codebooks):
            chunks.append(codes)
            update(num_samples)
        return np.concatenate(chunks, axis=1), time.perf_counter() - start


def _decode(model: "Mimi", codes: "np.ndarray", num_samples: int) -> "tuple[np.ndarray, float]":
    """Return audio [channels, samples], and how many seconds decoding took."""
    import numpy as np

    from mimi_jax.streams.chunks import decode_chunks

    with progress("decoding", num_samples, model.config.sampling_rate) as update:
        start, chunks = time.perf_counter(), []
        for audio in decode_chunks(model, [codes]):
            chunks.append(audio)
            update(audio.shape[1])
        return np.concatenate(chunks, axis=1)[:, :num_samples], time.perf_counter() - start


def _draw(
    audio: "np.ndarray", decoded: "np.ndarray", codes: "np.ndarray", spec: "CodeSpec", title: str
) -> bytes:
    from mimi_jax.quality.picture import draw

    sizes = {"frame_size": spec.frame_size, "codebook_size": spec.codebook_size}
    return draw(audio, decoded, codes, sampling_rate=spec.sampling_rate, **sizes, title=title)


def _device() -> str:
    import jax

    return jax.devices()[0].device_kind
