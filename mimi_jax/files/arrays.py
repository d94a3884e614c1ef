"""Named arrays: how the arrays of models and of streaming states are named, compared, stored and read back.

A checkpoint names an array of a model by dots, "encoder.first.kernel", and a file of streaming state names
its arrays by slashes, "1/0/key". Both are stored either in one safetensors file or in an Orbax folder, which
can be restored over several devices. A reader compares what it finds with what it expects, and reports all
differences at once.
"""

import json
import os
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from flax import nnx

from mimi_jax.config import first_few
from mimi_jax.files.atomic import atomic_path

ORBAX_MARK = "_CHECKPOINT_METADATA"  # Orbax writes this file into every folder

Module = TypeVar("Module", bound=nnx.Module)


def named_leaves(tree: Any, separator: str) -> dict[str, Any]:
    """The leaves of a pytree by their paths, such as "1/0/key" with the separator "/"."""
    leaves = jax.tree.leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator=separator): leaf for path, leaf in leaves}


def named_variables(module: nnx.Module, *filters: Any) -> dict[str, nnx.Variable]:
    """The variables of a module by name, such as "encoder.first.kernel".

    Args:
        filters: NNX filters, such as a type of variable; the variables that pass all of them are returned.
    """
    flat = nnx.to_flat_state(nnx.state(module, nnx.All(*filters)))
    return {_dotted(place): variable for place, variable in flat}


def with_values(module: Module, values: Mapping[str, Any]) -> Module:
    """A copy of a module with new values in the variables that `values` names.

    The copy shares all other arrays with `module`.

    Raises:
        KeyError: the module has no variable of that name.
    """
    graph, state = nnx.split(module)
    flat = dict(nnx.to_flat_state(state))
    places = {_dotted(place): place for place in flat}
    for name, value in values.items():
        flat[places[name]] = flat[places[name]].replace(value)
    return nnx.merge(graph, nnx.from_flat_state(flat))


def _dotted(place: tuple[Any, ...]) -> str:
    return ".".join(map(str, place))


def differences(
    found: Mapping[str, Any],
    expected: Mapping[str, Any],
    *,
    optional: Collection[str] = (),
    any_float: bool = False,
) -> list[str]:
    """The differences between two sets of named arrays, each as a phrase for an error message.

    Args:
        found, expected: anything with a shape and a dtype, by name.
        optional: names that may be found although they are not expected.
        any_float: accept any floating dtype where a floating dtype is expected.

    Returns:
        An empty list where `found` fits: the same names, shapes and dtypes. If many arrays are missing, are
        unexpected or differ, the first of each kind, and how many more there are.
    """

    def kind(array: Any) -> str:
        is_any = any_float and jnp.issubdtype(array.dtype, jnp.floating)
        return f"{'floating point' if is_any else array.dtype} {list(array.shape)}"

    missing = [f"missing {name} {list(x.shape)}" for name, x in expected.items() if name not in found]
    unexpected = [f"unexpected {name}" for name in found if name not in expected and name not in optional]
    misfits = [
        f"{name} is {found[name].dtype} {list(found[name].shape)}, expected {kind(array)}"
        for name, array in expected.items()
        if name in found and kind(found[name]) != kind(array)
    ]
    return [*first_few(missing), *first_few(unexpected), *first_few(misfits)]


def write_safetensors(
    path: str | os.PathLike[str], arrays: Mapping[str, Any], metadata: dict[str, str]
) -> None:
    """Write a safetensors file, whole or not at all.

    Args:
        arrays: NumPy or JAX arrays, by name.
        metadata: strings for the header of the file.

    Raises:
        OSError: the file cannot be written.
    """
    # safetensors stores the memory of a strided view, not its elements in order.
    contiguous = {name: np.asarray(array, order="C") for name, array in arrays.items()}
    with atomic_path(path) as temporary:
        # `save_file` would make a file that only its owner can read.
        temporary.write_bytes(safetensors.numpy.save(contiguous, metadata))


class SafetensorsFile(Mapping[str, np.ndarray]):
    """The tensors of a safetensors file by name. A tensor is read when it is looked up.

    Args:
        path: the file. It stays open as long as this object lives.

    Raises:
        ValueError: the file is missing, damaged, or not a safetensors file.
    """

    def __init__(self, path: str | os.PathLike[str]):
        try:
            self._file = safetensors.safe_open(path, framework="np")
        except (safetensors.SafetensorError, OSError) as error:
            raise ValueError(f"{os.fspath(path)}: not a readable safetensors file ({error})") from None
        self.metadata: dict[str, str] = self._file.metadata() or {}
        self._names = dict.fromkeys(self._file.keys())

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self._names:
            raise KeyError(name)
        return self._file.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class SafetensorsShards(Mapping[str, np.ndarray]):
    """The tensors of several safetensors files, by name, as `transformers` splits those of large models.

    Args:
        index: `model.safetensors.index.json`: its "weight_map" gives the file of each tensor, in its folder.

    Raises:
        ValueError: the index is damaged, a file is missing or damaged, or they hold other tensors than it
            says.
    """

    def __init__(self, index: str | os.PathLike[str]):
        name = os.fspath(index)
        try:
            self._files_by_tensor: dict[str, str] = dict(json.loads(Path(index).read_text())["weight_map"])
            if any(Path(file).name != file for file in self._files_by_tensor.values()):
                raise ValueError("its files must be in its own folder")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{name}: not a readable index of safetensors files ({error!r})") from None
        files = sorted(set(self._files_by_tensor.values()))
        self._files = {file: SafetensorsFile(Path(index).parent / file) for file in files}
        stored = {(tensor, file) for file, tensors in self._files.items() for tensor in tensors}
        if problems := sorted(tensor for tensor, _ in stored ^ set(self._files_by_tensor.items())):
            listed = ", ".join(first_few(problems))
            raise ValueError(f"{name}: the files do not hold what the index says; they differ in {listed}")

    def __getitem__(self, name: str) -> np.ndarray:
        return self._files[self._files_by_tensor[name]][name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._files_by_tensor)

    def __len__(self) -> int:
        return len(self._files_by_tensor)


def write_orbax(folder: str | os.PathLike[str], arrays: Mapping[str, Any]) -> None:
    """Write an Orbax folder, whole or not at all; a folder that is there already is replaced.

    Raises:
        OSError: the folder cannot be written.
    """
    import orbax.checkpoint as ocp

    with atomic_path(folder) as temporary, ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(temporary.absolute(), dict(arrays))


def orbax_shapes(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """What an Orbax folder holds: objects with a shape and a dtype, by name. No array is read.

    Raises:
        ValueError: the folder is damaged, or Orbax did not write it.
    """
    import orbax.checkpoint as ocp

    path = Path(folder).absolute()
    try:
        if not (path / ORBAX_MARK).is_file():
            raise ValueError(f"it has no file {ORBAX_MARK}, which Orbax writes")
        with ocp.StandardCheckpointer() as checkpointer:
            metadata = checkpointer.metadata(path).item_metadata
            return dict(metadata.tree if hasattr(metadata, "tree") else metadata)
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"{os.fspath(folder)}: not a readable Orbax checkpoint ({error})") from None


def restore_orbax(
    folder: str | os.PathLike[str], shapes: Mapping[str, jax.ShapeDtypeStruct]
) -> dict[str, jax.Array]:
    """Read arrays from an Orbax folder, each straight to its device or devices.

    Args:
        folder: what `write_orbax` wrote.
        shapes: shape, dtype and sharding of every array of the folder, by name. An array without a sharding
            goes to the first device. Compare them with `orbax_shapes` first.
    """
    import orbax.checkpoint as ocp

    default = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    target = {
        name: jax.ShapeDtypeStruct(like.shape, like.dtype, sharding=like.sharding or default)
        for name, like in shapes.items()
    }
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(Path(folder).absolute(), target)
