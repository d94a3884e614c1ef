"""Bundle the model of a training run as `mini`.

    python -m convert.bundle_mini runs/mini_adversarial

Its weights are rounded to float16, which is half the size; computations are in float32, here and in
`transformers`. The run began from the model that was bundled before (`init = "mini"`), so its log is added to
docs/mini/log.jsonl, which is drawn as docs/mini/log.png.
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
    "loss/features": "feature loss",
    "loss/discriminator": "loss of the discriminator",
    "gradient_norm": "norm of the gradient",
    "perplexity/semantic": "perplexity, semantic codebook",
    "perplexity/acoustic": "mean perplexity, acoustic codebooks",
}
WIDTH = 50  # lines of the log in a running mean


def main() -> None:
    parser = argparse.ArgumentParser(description="Bundle the model of a training run as `mini`.")
    parser.add_argument("run", metavar="RUN", type=Path, help="a folder that `mimi-jax train` wrote")
    run = parser.parse_args().run
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
    add_log(run / "log.jsonl", DOCS / "log.jsonl")
    draw_log(DOCS / "log.jsonl", DOCS / "log.png")


def add_log(log: Path, joined: Path) -> None:
    """Add the log of a run to those before it. Its steps count on.

    The file holds no more than its picture needs: four digits, and no shares of losses, which are close to
    those that the recipe asks for.
    """
    lines, part = (read_log(path) for path in (joined, log))
    done = lines[-1]["step"]
    for line in part:
        rounded = {
            name: float(f"{value:.4g}") for name, value in line.items() if not name.startswith("share/")
        }
        lines.append(rounded | {"step": done + line["step"]})
    joined.write_text("".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines))


def read_log(path: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def draw_log(log: Path, picture: Path) -> None:
    """Draw each curve, which may begin or end with a run, and its running mean."""
    from matplotlib.figure import Figure

    lines = read_log(log)
    figure = Figure(figsize=(12, 6), layout="constrained")
    for axis, (name, title) in zip(figure.subplots(2, 3).ravel(), CURVES.items(), strict=True):
        steps, values = np.array([(line["step"], line[name]) for line in lines if name in line]).T
        means = np.convolve(values, np.full(WIDTH, 1 / WIDTH), mode="valid")
        axis.plot(steps, values, linewidth=0.5, alpha=0.4)
        axis.plot(steps[WIDTH // 2 :][: len(means)], means, color="tab:blue")
        axis.locator_params(axis="x", nbins=5)
        axis.set(title=title, xlabel="step")
        axis.grid(alpha=0.3)
        if name in ("loss/mel", "gradient_norm"):
            axis.set_yscale("log")
    figure.savefig(picture, dpi=100)


if __name__ == "__main__":
    main()
