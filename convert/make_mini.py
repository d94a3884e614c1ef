"""Make the bundled model `mini`: until one is trained, a small one with random weights.

    python -m convert.make_mini

The topology is that of the published model (24 kHz, 12.5 frames a second, ratios 8-6-5-4, split RVQ); the
codebooks are fitted to the latents of a synthetic signal, so that codes vary as those of a trained model.
"""

import json
from pathlib import Path

from safetensors.numpy import save_file

from convert.reference_models import flat_state, random_transformers_model
from mimi_jax.checkpoint import BUNDLED
from mimi_jax.config import MimiConfig

MINI = {
    "hidden_size": 64,
    "num_filters": 4,
    "codebook_size": 256,
    "codebook_dim": 16,
    "vector_quantization_hidden_dimension": 16,
    "num_quantizers": 8,
    "upsample_groups": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "intermediate_size": 128,
}


def main() -> None:
    model = random_transformers_model(MINI, seed=0)
    folder = Path(BUNDLED / "mini")
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.numpy() for name, tensor in flat_state(model).items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(MimiConfig(**MINI).to_dict(), indent=2) + "\n")


if __name__ == "__main__":
    main()
