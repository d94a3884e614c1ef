"""States of streams on disk, so that one server can stop and another can continue its streams.

The arrays of a state are stored under their paths in it, such as "1/0/key", in one safetensors file or in an
Orbax folder, which can be restored over several devices.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mimi_jax.boundary import transfers_allowed
from mimi_jax.files.arrays import (
    ORBAX_MARK,
    SafetensorsFile,
    differences,
    named_leaves,
    orbax_shapes,
    restore_orbax,
    write_orbax,
    write_safetensors,
)
from mimi_jax.nn.streaming import State

FORMAT = "mimi_jax.state"


@transfers_allowed()
def save_state(path: str | os.PathLike[str], state: Any) -> None:
    """Write the state of a batch of streams, whole or not at all.

    Args:
        path: a file if it ends in ".safetensors", otherwise an Orbax folder. The parent folder must exist.
        state: from `init_encoder_state`, `init_decoder_state`, a step or `take_rows`. A tuple of states,
            such as an encoder's and a decoder's, is saved as one.

    Raises:
        ValueError: `path` is a folder with other files in it, which would be lost.
        OSError: the file or folder cannot be written.
    """
    path = os.path.expanduser(path)
    arrays, folder = named_leaves(state, "/"), Path(path)
    if folder.is_dir() and any(folder.iterdir()) and not (folder / ORBAX_MARK).exists():
        raise ValueError(f"{folder} is a folder of other files; name a new folder, or a .safetensors file")
    if _is_file(path):
        write_safetensors(path, arrays, {"format": FORMAT})
    else:
        write_orbax(path, arrays)


@transfers_allowed()
def load_state(path: str | os.PathLike[str], like: State) -> State:
    """Read a state that `save_state` wrote.

    The file does not say which weights the state belongs to: use it with the model that made it.

    Args:
        path: the file or the folder.
        like: a state of the same structure, such as `model.init_encoder_state(batch_size)`, or one made of
            `jax.ShapeDtypeStruct`s. Each array goes where the one in `like` was put, or to the default
            device.

    Returns:
        The state, for the next step.

    Raises:
        FileNotFoundError: there is no such file or folder.
        ValueError: it is not a saved state, or does not fit `like`, because it is of another model, another
            half, another dtype or another number of streams. The error names what does not fit.
    """
    path = os.path.expanduser(path)
    if not Path(path).exists():
        raise FileNotFoundError(f"{os.fspath(path)}: there is no saved state")
    expected = named_leaves(like, "/")
    arrays = _read_file(path, expected) if _is_file(path) else _read_folder(path, expected)
    # Arrays of the default device stay uncommitted, so that they can follow the model to another device.
    placed = [
        jnp.asarray(np.asarray(arrays[name]))
        if (sharding := _sharding(leaf)) is None
        else jax.device_put(arrays[name], sharding)
        for name, leaf in expected.items()
    ]
    return jax.tree.unflatten(jax.tree.structure(like), placed)


def _is_file(path: str | os.PathLike[str]) -> bool:
    return Path(path).suffix == ".safetensors"


def _sharding(leaf: Any) -> jax.sharding.Sharding | None:
    """Where an array was put on purpose; None for the default device."""
    return getattr(leaf, "sharding", None) if getattr(leaf, "committed", True) else None


def _read_file(path: str | os.PathLike[str], expected: Mapping[str, Any]) -> dict[str, np.ndarray]:
    file = SafetensorsFile(path)
    if (found := file.metadata.get("format")) != FORMAT:
        raise ValueError(f"{os.fspath(path)}: not a saved state: format must be {FORMAT!r}, got {found!r}")
    arrays = dict(file)
    _check(path, arrays, expected)
    return arrays


def _read_folder(path: str | os.PathLike[str], expected: Mapping[str, Any]) -> dict[str, jax.Array]:
    _check(path, orbax_shapes(path), expected)
    shapes = {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=_sharding(leaf))
        for name, leaf in expected.items()
    }
    return restore_orbax(path, shapes)


def _check(path: str | os.PathLike[str], found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Refuse a state that does not fit, and name everything that differs."""
    problems = differences(found, expected)
    if problems and found.keys() == expected.keys():
        num_found, num_expected = (arrays[min(expected)].shape[:1] for arrays in (found, expected))
        if num_found != num_expected:  # which is the reason for every other difference
            problems = [f"its batch is {list(num_found)}, expected {list(num_expected)}"]
    if problems:
        raise ValueError(f"{os.fspath(path)}: the saved state does not fit: {'; '.join(problems)}")
