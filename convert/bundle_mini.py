"""Bundle the model of a training run as `mini`.

    python -m convert.bundle_mini runs/mini runs/mini_finish runs/mini_loud

The model of the last run is bundled. Its weights are rounded to float16, which is half the size; computations
are in float32, here and in `transformers`. Each run began from the model of the one before. Their logs are
joined into docs/mini/log.jsonl and drawn as docs/mini/log.png.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import safetensors.numpy

from mimi_jax.checkpoint import BUNDLED
from mimi_jax.files.arrays import write_safetensors

DOCS = Path(__file__).parents[1] / "docs" / "mini"
CURVES = {
    "loss/mel": "mel loss",
    "loss/waveform": "waveform loss",
    "loss/commitment": "commitment loss",
    "gradient_norm": "norm of the gradient",
    "perplexity/semantic": "perplexity of the semantic codebook",
    "perplexity/acoustic": "mean perplexity of the acoustic codebooks",
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Bundle the model of a training run as `mini`.")
    parser.add_argument(
        "runs",
        metavar="RUN",
        nargs="+",
        type=Path,
        help="folders that `mimi-jax train` wrote; the model of the last one is bundled",
    )
    runs = parser.parse_args().runs
    run = runs[-1]
    tensors = safetensors.numpy.load_file(run / "model" / "model.safetensors")
    rounded = {name: tensor.astype(np.float16) for name, tensor in tensors.items()}
    for name, tensor in rounded.items():
        if not np.isfinite(tensor).all():
            raise ValueError(f"{name} holds numbers that are too large for float16")
    folder = BUNDLED / "mini"
    write_safetensors(folder / "model.safetensors", rounded, {"format": "pt"})
    # Without this field, transformers would compute in the dtype of the stored weights.
    fields = json.loads((run / "model" / "config.json").read_text()) | {"dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(fields, indent=2) + "\n")
    DOCS.mkdir(exist_ok=True)
    join_logs([run / "log.jsonl" for run in runs], DOCS / "log.jsonl")
    draw_log(DOCS / "log.jsonl", DOCS / "log.png")


def join_logs(logs: list[Path], joined: Path) -> None:
    """Write one log for several runs, with steps that count on from run to run."""
    lines, done = [], 0
    for log in logs:
        part = [json.loads(line) for line in log.read_text().splitlines()]
        lines += [line | {"step": done + line["step"]} for line in part]
        done += part[-1]["step"]
    joined.write_text("".join(json.dumps(line) + "\n" for line in lines))


def draw_log(log: Path, picture: Path) -> None:
    """Draw each curve, and its moving average over about a fiftieth of the run."""
    from matplotlib.figure import Figure

    lines = [json.loads(line) for line in log.read_text().splitlines()]
    steps = np.array([line["step"] for line in lines])
    width = max(1, len(lines) // 50)
    figure = Figure(figsize=(12, 6), layout="constrained")
    for axis, (name, title) in zip(figure.subplots(2, 3).ravel(), CURVES.items(), strict=True):
        values = np.array([line[name] for line in lines])
        smooth = np.convolve(values, np.full(width, 1 / width), mode="valid")
        axis.plot(steps, values, linewidth=0.5, alpha=0.4)
        axis.plot(steps[width - 1 :], smooth, color="tab:blue")
        axis.set(title=title, xlabel="step")
        axis.grid(alpha=0.3)
        if not name.startswith("perplexity"):
            axis.set_yscale("log")
    figure.savefig(picture, dpi=100)


if __name__ == "__main__":
    main()
