"""The layout "flax": an Orbax folder `params/` with this package's own names, which restores sharded.

An array is stored under the name of its parameter, such as "encoder.first.kernel", with axes as they are in
the model.
"""

import contextlib
from pathlib import Path

import jax
from jax.typing import DTypeLike

from mimi_jax.checkpoint.layouts.files import ORBAX_FOLDER, ModelFiles, check_fits
from mimi_jax.checkpoint.parameters import abstract_model, fill, parameters
from mimi_jax.files.arrays import ORBAX_MARK, differences, orbax_shapes, restore_orbax, write_orbax
from mimi_jax.model import Mimi


def recognizes(files: ModelFiles) -> bool:
    folder = files.orbax_folder
    return (folder / ORBAX_MARK).exists() or (folder.is_dir() and not files.weights_path.is_file())


def check_is_ours(folder: Path, replaces: bool) -> None:
    """Refuse a model folder whose `params` hold something else.

    Args:
        replaces: whether `params` would be replaced. If not, only a checkpoint there is in the way, since
            `recognizes` would take it for the weights.

    Raises:
        ValueError: naming it.
    """
    params = folder / ORBAX_FOLDER
    is_checkpoint, names = (params / ORBAX_MARK).exists(), {}
    if is_checkpoint:
        with contextlib.suppress(ValueError):
            names = orbax_shapes(params)
    is_ours = any(name.startswith("quantizer.") for name in names)
    is_full = params.is_dir() and any(params.iterdir())
    if (is_full if replaces else is_checkpoint) and not is_ours:
        raise ValueError(f"{params} is not of a Mimi, and would be lost; name another folder for the model")


def read(
    files: ModelFiles, model: Mimi, dtype: DTypeLike | None, sharding: jax.sharding.Sharding | None
) -> Mimi:
    folder, expected = files.orbax_folder, parameters(model)
    found = orbax_shapes(folder)
    both_halves = parameters(abstract_model(model.config))
    check_fits(differences(found, expected, optional=both_halves, any_float=True), folder)
    shapes = {
        name: jax.ShapeDtypeStruct(found[name].shape, found[name].dtype, sharding=sharding) for name in found
    }
    arrays = restore_orbax(folder, shapes)
    return fill(model, {name: arrays[name] for name in expected}, dtype, sharding)


def write(model: Mimi, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_orbax(folder / ORBAX_FOLDER, {name: p[...] for name, p in parameters(model).items()})
