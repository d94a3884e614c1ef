"""States of streams on disk, so that a server can stop and another one can go on.

The arrays of a state are stored under their paths in it, such as "1/0/key": in one safetensors file, or in
an Orbax folder, which restores sharded.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from mimi_jax.files.atomic import atomic_path
from mimi_jax.nn.streaming import State

FORMAT = "mimi_jax.state"
ORBAX_MARK = "_CHECKPOINT_METADATA"  # a file in every folder that Orbax has written


def save_state(path: str | os.PathLike[str], state: Any) -> None:
    """Write the state of a batch of streams, whole or not at all.

    Args:
        path: a file if it ends in ".safetensors", else an Orbax folder; its parent folder must exist.
        state: from `init_encoder_state`, `init_decoder_state`, a step or `take_rows`; an encoder's and a
            decoder's may be saved together, as a tuple.

    Raises:
        ValueError: a folder of other files stands there, which would be lost.
        OSError: it cannot be written.
    """
    arrays, folder = _by_name(state), Path(path)
    if folder.is_dir() and any(folder.iterdir()) and not (folder / ORBAX_MARK).exists():
        raise ValueError(f"{folder} is a folder of other files; name a new one, or a .safetensors file")
    with atomic_path(path) as temporary:
        if _is_file(path):
            contiguous = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
            temporary.write_bytes(safetensors.numpy.save(contiguous, {"format": FORMAT}))
        else:
            import orbax.checkpoint as ocp

            with ocp.StandardCheckpointer() as checkpointer:
                checkpointer.save(temporary.absolute(), arrays)


def load_state(path: str | os.PathLike[str], like: State) -> State:
    """Read what `save_state` wrote.

    Nothing in it tells the weights of the model apart: give it to the model that it comes from.

    Args:
        path: the file or the folder.
        like: a state of the same form, such as `model.init_encoder_state(batch_size)`, or of
            `jax.ShapeDtypeStruct`s. Arrays go where those of `like` were put, or to the default device.

    Returns:
        The state to go on with.

    Raises:
        FileNotFoundError: there is no such file or folder.
        ValueError: it is not a saved state, or of another form: another model's, half's, dtype's, or
            number of streams'. The error names every array that does not fit.
    """
    if not Path(path).exists():
        raise FileNotFoundError(f"{os.fspath(path)}: there is no saved state")
    expected = _by_name(like)
    arrays = _read_file(path, expected) if _is_file(path) else _restore_folder(path, expected)
    # Without a sharding they stay free to follow the model, wherever that lies.
    placed = [
        jnp.asarray(np.asarray(arrays[name]))
        if (sharding := _sharding(leaf)) is None
        else jax.device_put(arrays[name], sharding)
        for name, leaf in expected.items()
    ]
    return jax.tree.unflatten(jax.tree.structure(like), placed)


def _is_file(path: str | os.PathLike[str]) -> bool:
    return Path(path).suffix == ".safetensors"


def _by_name(state: Any) -> dict[str, Any]:
    leaves = jax.tree.leaves_with_path(state)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def _sharding(leaf: Any) -> jax.sharding.Sharding | None:
    """Where an array was put on purpose; None for the default device."""
    return getattr(leaf, "sharding", None) if getattr(leaf, "committed", True) else None


def _read_file(path: str | os.PathLike[str], expected: Mapping[str, Any]) -> dict[str, np.ndarray]:
    try:
        with safetensors.safe_open(path, framework="np") as file:
            if (found := (file.metadata() or {}).get("format")) != FORMAT:
                raise ValueError(
                    f"{os.fspath(path)}: not a saved state: format must be {FORMAT!r}, got {found!r}"
                )
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, OSError) as error:
        raise ValueError(f"{os.fspath(path)}: not a saved state ({error})") from None
    _compare(path, arrays, expected)
    return arrays


def _restore_folder(path: str | os.PathLike[str], expected: Mapping[str, Any]) -> dict[str, jax.Array]:
    import orbax.checkpoint as ocp

    folder, default = Path(path).absolute(), jax.sharding.SingleDeviceSharding(jax.devices()[0])
    if not (folder / ORBAX_MARK).is_file():
        raise ValueError(
            f"{os.fspath(path)}: not a saved state: there is no {ORBAX_MARK}, which Orbax writes"
        )
    with ocp.StandardCheckpointer() as checkpointer:
        try:
            metadata = checkpointer.metadata(folder).item_metadata
            found = dict(metadata.tree if hasattr(metadata, "tree") else metadata)
        except (OSError, ValueError, AttributeError, TypeError) as error:
            raise ValueError(f"{os.fspath(path)}: not a saved state ({error})") from None
        _compare(path, found, expected)
        target = {
            name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=_sharding(leaf) or default)
            for name, leaf in expected.items()
        }
        return checkpointer.restore(folder, target)


def _compare(path: str | os.PathLike[str], found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Refuse arrays that are missing, unexpected or of another kind, naming all of them at once."""

    def kind(array: Any) -> str:
        return f"{array.dtype} {list(array.shape)}"

    problems = [f"missing {name}" for name in expected if name not in found]
    problems += [f"unexpected {name}" for name in found if name not in expected]
    problems += [
        f"{name} is {kind(found[name])}, expected {kind(array)}"
        for name, array in expected.items()
        if name in found and kind(found[name]) != kind(array)
    ]
    if problems and found.keys() == expected.keys():
        num_found, num_expected = (arrays[min(expected)].shape[:1] for arrays in (found, expected))
        if num_found != num_expected:  # then that says it all
            problems = [f"its batch is {list(num_found)}, expected {list(num_expected)}"]
    if problems:
        raise ValueError(f"{os.fspath(path)}: a state of another form: {'; '.join(problems)}")
