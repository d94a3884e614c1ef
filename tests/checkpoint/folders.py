"""Model folders for tests, as the references write them, and comparisons bit for bit."""

import json
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from safetensors import safe_open
from safetensors.numpy import save_file

from mimi_jax import Mimi
from tests.models import FIXTURES

Tensors = dict[str, np.ndarray]
FLOAT_LAYOUTS = ["flax", "transformers", "kyutai"]  # those of models without int8 weights


def read_fixture(name: str, prefix: str = "weights/") -> tuple[dict, Tensors]:
    """The configuration and the tensors that a reference wrote: config.json, and tensors by name."""
    with safe_open(FIXTURES / f"{name}.safetensors", framework="np") as file:
        names = [key for key in file.keys() if key.startswith(prefix)]  # noqa: SIM118
        return json.loads(file.metadata()["config"]), {
            key[len(prefix) :]: file.get_tensor(key) for key in names
        }


def write(folder: Path, config: dict, tensors: Tensors) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(
        {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}, folder / "model.safetensors"
    )
    return folder


def assert_same_tensors(got: Tensors, expected: Tensors) -> None:
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype and got[name].shape == tensor.shape, name
        assert got[name].tobytes() == np.ascontiguousarray(tensor).tobytes(), name


def assert_same_model(got: Mimi, expected: Mimi) -> None:
    jax.tree.map(np.testing.assert_array_equal, nnx.state(got), nnx.state(expected))
