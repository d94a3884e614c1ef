"""The full-size models that the parity tests compare; making them takes some seconds."""

import importlib.util
import os
from pathlib import Path
from typing import Any

import pytest

from mimi_jax import Mimi

# Without torch these files cannot be imported. Then `pytest -m parity` finds no test, and fails.
HAS_TORCH = importlib.util.find_spec("torch") is not None

ROOT = Path(__file__).parents[2]
SPEECH = Path(os.environ.get("MIMI_JAX_SPEECH", ROOT.parent / "shared" / "speech"))


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave these files out without torch, and from the default run, which must not import torch."""
    is_default = str(config.getoption("markexpr")).startswith("not ")
    is_test = collection_path.name.startswith("test_")
    return True if is_test and (is_default or not HAS_TORCH) else None


@pytest.fixture(scope="session")
def reference() -> Any:
    """`transformers.MimiModel` in the default architecture, with random weights."""
    from tests.parity.references import random_transformers_model

    return random_transformers_model({}, seed=0)


@pytest.fixture(scope="session")
def checkpoint(reference: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder to which `transformers` saved the reference."""
    folder = tmp_path_factory.mktemp("reference")
    reference.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def model(checkpoint: Path) -> Mimi:
    return Mimi.from_pretrained(checkpoint)
