"""Load and save models, strictly and bit for bit."""

from mimi_jax.checkpoint.store import (
    BUNDLED,
    LAYOUTS,
    abstract_model,
    bundled_models,
    fill,
    find,
    keep_codebooks,
    layout_of,
    load,
    model_id,
    read_tensors,
    save,
)

__all__ = [
    "BUNDLED",
    "LAYOUTS",
    "abstract_model",
    "bundled_models",
    "fill",
    "find",
    "keep_codebooks",
    "layout_of",
    "load",
    "model_id",
    "read_tensors",
    "save",
]
