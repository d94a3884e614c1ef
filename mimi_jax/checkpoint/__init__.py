"""Load and save models, strictly and bit for bit.

    find          where a model is: bundled, a folder, a file, the Hugging Face Hub
    parameters    the parameters of a model by name; models without values, to be filled in
    int8          int8 weights in memory
    layouts       the ways to store a model: a table with one row for each; a new layout goes there
    pretrained    load and save
    identity      what the codes of a model mean, and which bundled model made them

A model is stored as a folder with a `config.json` and its weights in one of the `LAYOUTS`. Reading is
strict: every tensor of the file must belong to the model, every parameter of the model must be in the file,
and an error lists what does not fit: the first names of each kind, and how many more there are.
"""

from mimi_jax.checkpoint.find import BUNDLED, bundled_models, find
from mimi_jax.checkpoint.identity import bundled_with, check_same_codes, code_spec, model_id
from mimi_jax.checkpoint.layouts import LAYOUTS, layout_of
from mimi_jax.checkpoint.layouts.pytorch import read_tensors
from mimi_jax.checkpoint.parameters import (
    abstract_model,
    fill,
    keep_codebooks,
    num_parameters,
    parameters,
)
from mimi_jax.checkpoint.pretrained import load, save

__all__ = [
    "BUNDLED",
    "LAYOUTS",
    "abstract_model",
    "bundled_models",
    "bundled_with",
    "check_same_codes",
    "code_spec",
    "fill",
    "find",
    "keep_codebooks",
    "layout_of",
    "load",
    "model_id",
    "num_parameters",
    "parameters",
    "read_tensors",
    "save",
]
