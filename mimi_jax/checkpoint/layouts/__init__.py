"""The layouts that a model can be stored in: how its arrays are named, and in which files they are.

To add a layout, write a module like `flax` with three functions, `recognizes`, `read` and `write`
(`files.Layout` says what each does), and add it to the table `LAYOUTS`.

    files       the files of a model, and the type `Layout`
    names       the names of tensors in `transformers` and in Kyutai's `moshi`, and the order of their axes
    pytorch     model.safetensors with these names
    flax        the Orbax folder params/ with this package's own names
    int8        model.safetensors with this package's own names and int8 kernels
"""

from pathlib import Path

from mimi_jax.checkpoint.layouts import flax, int8, pytorch
from mimi_jax.checkpoint.layouts.files import Layout, ModelFiles

# A model is in the first of these layouts that recognizes its files.
LAYOUTS = {
    "int8": Layout(int8.recognizes, int8.read, int8.write),
    "flax": Layout(flax.recognizes, flax.read, flax.write),
    "kyutai": Layout(pytorch.recognizes_kyutai, pytorch.read, pytorch.write_kyutai),
    "transformers": Layout(pytorch.recognizes_transformers, pytorch.read, pytorch.write_transformers),
}


def layout_of(path: Path) -> str:
    """The name in `LAYOUTS` of the layout of a model that `find` found.

    Raises:
        ValueError: the model's safetensors file is damaged.
    """
    return recognize(ModelFiles(path))


def recognize(files: ModelFiles) -> str:
    """As `layout_of`, for files that are open already."""
    return next(name for name, layout in LAYOUTS.items() if layout.recognizes(files))
