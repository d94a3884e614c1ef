"""Bundle what a training run made as the model `mini`.

    python -m convert.bundle_mini runs/mini

Weights are rounded to float16, half the size; they are computed with in float32, here and in `transformers`.
The run's log goes to docs/mini/.
"""

import argparse
import json
import shutil
from pathlib import Path

import numpy as np
import safetensors.numpy

from mimi_jax.checkpoint import BUNDLED

DOCS = Path(__file__).parents[1] / "docs" / "mini"


def main() -> None:
    parser = argparse.ArgumentParser(description="Bundle what a training run made as the model `mini`.")
    parser.add_argument("run", metavar="RUN", type=Path, help="a folder that `mimi-jax train` wrote")
    run = parser.parse_args().run
    tensors = safetensors.numpy.load_file(run / "model" / "model.safetensors")
    rounded = {name: tensor.astype(np.float16) for name, tensor in tensors.items()}
    for name, tensor in rounded.items():
        if not np.isfinite(tensor).all():
            raise ValueError(f"{name} holds numbers that float16 cannot")
    folder = BUNDLED / "mini"
    (folder / "model.safetensors").write_bytes(safetensors.numpy.save(rounded, metadata={"format": "pt"}))
    # Without it transformers would compute in the dtype that the weights are stored in.
    fields = json.loads((run / "model" / "config.json").read_text()) | {"dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(fields, indent=2) + "\n")
    DOCS.mkdir(exist_ok=True)
    shutil.copy(run / "log.jsonl", DOCS)


if __name__ == "__main__":
    main()
