"""The full-size models that every parity test compares; they take some seconds to make."""

import importlib.util
import os
from pathlib import Path
from typing import Any

import pytest

from mimi_jax import Mimi

# Without torch these files cannot even be read: then `pytest -m parity` finds no test, and fails.
collect_ignore_glob = [] if importlib.util.find_spec("torch") else ["test_*.py"]

ROOT = Path(__file__).parents[2]
SPEECH = Path(os.environ.get("MIMI_JAX_SPEECH", ROOT.parent / "shared" / "speech"))


@pytest.fixture(scope="session")
def reference() -> Any:
    """`transformers.MimiModel`, default architecture, random weights."""
    from tests.parity.references import random_transformers_model

    return random_transformers_model({}, seed=0)


@pytest.fixture(scope="session")
def checkpoint(reference: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that `transformers` saves it to."""
    folder = tmp_path_factory.mktemp("reference")
    reference.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def model(checkpoint: Path) -> Mimi:
    return Mimi.from_pretrained(checkpoint)
