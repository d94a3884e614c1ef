"""Make the bundled model `mini`: until one is trained, a small one with random weights.

    python -m convert.make_mini

The topology is that of the published model (24 kHz, 12.5 frames a second, ratios 8-6-5-4, split RVQ); the
codebooks are fitted to the latents of a synthetic signal, so that codes vary as those of a trained model.
"""

import tempfile

from convert.reference_models import random_transformers_model
from mimi_jax import Mimi
from mimi_jax.checkpoint import BUNDLED

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
    with tempfile.TemporaryDirectory() as folder:
        random_transformers_model(MINI, seed=0).save_pretrained(folder)
        Mimi.from_pretrained(folder).save_pretrained(BUNDLED / "mini")


if __name__ == "__main__":
    main()
