"""The layouts "transformers" and "kyutai": `model.safetensors` with the names and axes of PyTorch's models.

Both are read in all their variants: the flat names of published transformers checkpoints and the nested
ones of transformers 5.x, Kyutai's older names, and weight normalization pairs.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from mimi_jax.checkpoint.layouts.files import WEIGHTS_FILE, ModelFiles, check_fits
from mimi_jax.checkpoint.layouts.names import (
    Arrays,
    Weight,
    canonical_name,
    fold_weight_norm,
    to_arrays,
    to_tensors,
    weight_table,
)
from mimi_jax.checkpoint.parameters import fill, parameters
from mimi_jax.files.arrays import differences, write_safetensors
from mimi_jax.model import Mimi

PYTORCH = {"format": "pt"}  # transformers loads only files whose header names the framework


def recognizes_kyutai(files: ModelFiles) -> bool:
    return _layout(files.tensors) == "kyutai"


def recognizes_transformers(files: ModelFiles) -> bool:
    return _layout(files.tensors) == "transformers"


def _layout(tensors: Mapping[str, np.ndarray]) -> str:
    return "kyutai" if any(name.startswith("quantizer.rvq_") for name in tensors) else "transformers"


def read(
    files: ModelFiles, model: Mimi, dtype: DTypeLike | None, sharding: jax.sharding.Sharding | None
) -> Mimi:
    arrays = read_tensors(files.tensors, model, source=files.source)
    return fill(model, arrays, dtype, sharding)


def read_tensors(tensors: Mapping[str, np.ndarray], model: Mimi, source: str) -> Arrays:
    """The parameters of a model, from the tensors of a PyTorch checkpoint in either layout.

    Args:
        tensors: by name. Those of a half that `model` does not have are not read.
        model: from `abstract_model`; only the shapes of its parameters are used.
        source: what to call the checkpoint in errors.

    Raises:
        ValueError: naming the tensors that are missing, unexpected, or of another shape or dtype.
    """
    layout, config, rows = _layout(tensors), model.config, _rows(model)
    # Zeros that take no memory, to learn the names and shapes of the tensors.
    zeros = {name: np.broadcast_to(np.int8(0), p.shape) for name, p in parameters(model).items()}
    expected = {
        name: jax.ShapeDtypeStruct(tensor.shape, jnp.float32)
        for name, tensor in to_tensors(zeros, rows, config, layout).items()
    }
    both_halves = {getattr(row, layout) for row in weight_table(config)}
    found = {
        name: _whole(name, parts, source)
        for name, parts in _by_canonical_name(tensors, source).items()
        if name in expected or name not in both_halves
    }
    check_fits(differences(found, expected, any_float=True), source)
    return to_arrays(found, rows, config, layout)


def _rows(model: Mimi) -> list[Weight]:
    return weight_table(model.config, model.encoder is not None, model.decoder is not None)


Parts = dict[str, Callable[[], np.ndarray]]  # by role: "" for a whole tensor, "g" and "v" for a pair


def _by_canonical_name(tensors: Mapping[str, np.ndarray], source: str) -> dict[str, Parts]:
    """The tensors under the names of the table; each is a function that reads it."""
    parts: dict[str, Parts] = {}
    for stored_name in tensors:
        name, role = canonical_name(stored_name)
        if role in parts.get(name, {}):
            raise ValueError(f"{source}: {stored_name} and another tensor are both {name}; keep one of them")
        parts.setdefault(name, {})[role] = lambda stored_name=stored_name: tensors[stored_name]
    return parts


def _whole(name: str, parts: Parts, source: str) -> np.ndarray:
    if parts.keys() == {"g", "v"}:
        return fold_weight_norm(parts["g"](), parts["v"]())
    if parts.keys() == {""}:
        return parts[""]()
    raise ValueError(
        f"{source}: {name} must be one tensor or a weight normalization pair, got {len(parts)} tensor(s)"
        f" with the roles {sorted(parts)}"
    )


def write_transformers(model: Mimi, folder: Path) -> None:
    _write(model, folder, "transformers")


def write_kyutai(model: Mimi, folder: Path) -> None:
    _write(model, folder, "kyutai")


def _write(model: Mimi, folder: Path, layout: str) -> None:
    arrays = {name: np.asarray(parameter[...]) for name, parameter in parameters(model).items()}
    tensors = to_tensors(arrays, _rows(model), model.config, layout)
    folder.mkdir(parents=True, exist_ok=True)
    write_safetensors(folder / WEIGHTS_FILE, tensors, PYTORCH)
