"""The files of a stored model, and what every layout does with them."""

import contextlib
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.typing import DTypeLike

from mimi_jax.checkpoint.find import INDEX_FILE, ORBAX_FOLDER, WEIGHTS_FILE
from mimi_jax.files.arrays import SafetensorsFile, SafetensorsShards
from mimi_jax.model import Mimi


class ModelFiles:
    """The files of one model, read when they are asked for.

    Args:
        path: what `find` returned: a folder, or a .safetensors file, which may have a config.json beside it.
    """

    def __init__(self, path: Path):
        folder = path if path.is_dir() else path.parent
        self.path, self.config_path = path, folder / "config.json"
        names = (WEIGHTS_FILE, INDEX_FILE)
        paths = [path / name for name in names if (path / name).is_file()] if path.is_dir() else [path]
        self.weights_path = paths[0] if paths else path / WEIGHTS_FILE
        self.orbax_folder = path / ORBAX_FOLDER

    @functools.cached_property
    def fields(self) -> dict[str, Any]:
        """What config.json says; empty where a lone file has none.

        Raises:
            ValueError: config.json is not JSON.
        """
        return json.loads(self.config_path.read_text()) if self.has_config else {}

    @functools.cached_property
    def has_config(self) -> bool:
        """Whether there is a config.json, of this model: Kyutai keeps Mimi beside its language models."""
        if not self.config_path.is_file() or self.path.is_dir():
            return self.config_path.is_file()
        with contextlib.suppress(ValueError):
            fields = json.loads(self.config_path.read_text())
            return not isinstance(fields, dict) or "mimi_name" not in fields
        return True

    @functools.cached_property
    def tensors(self) -> SafetensorsFile | SafetensorsShards:
        """The tensors of the safetensors file, or of all files of an index.

        Raises:
            ValueError: there is no such file, or it is damaged.
        """
        read = SafetensorsShards if self.weights_path.name == INDEX_FILE else SafetensorsFile
        return read(self.weights_path)

    @property
    def source(self) -> str:
        """What to call the weights in errors about their shapes."""
        if self.has_config:
            return str(self.weights_path)
        return f"{self.weights_path}, read as the published model (put its config.json beside it)"


class Layout(NamedTuple):
    """One way to store a model.

    Args:
        recognizes: whether a model's files are in this layout.
        read: gives an abstract model its values. It takes the files, the model, the dtype (None keeps what
            is stored) and the sharding (None for the default device). It raises a `ValueError` that names
            the arrays that are missing, unexpected, or of another shape or dtype.
        write: writes the weights of a model to a folder, which it makes. It raises a `ValueError` where the
            layout cannot hold the model, and makes no folder then. `save` adds the config.json.
    """

    recognizes: Callable[[ModelFiles], bool]
    read: Callable[[ModelFiles, Mimi, DTypeLike | None, jax.sharding.Sharding | None], Mimi]
    write: Callable[[Mimi, Path], None]


def check_fits(problems: list[str], source: str | Path) -> None:
    """Raise what `differences` found between a checkpoint and the model of its configuration."""
    if problems:
        raise ValueError(f"{source}: the tensors do not fit the configuration: {'; '.join(problems)}")
