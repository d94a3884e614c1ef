"""The model that most tests of tokenization use, in memory and on disk."""

from pathlib import Path

import jax
import pytest

from mimi_jax import Mimi
from tests.models import load_fixture


@pytest.fixture(autouse=True)
def two_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """A job shares its batches among all local devices. With eight, most rows of these batches are empty."""
    devices = jax.local_devices()[:2]
    monkeypatch.setattr(jax, "local_devices", lambda: devices)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    load_fixture("base").model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model() -> Mimi:
    return load_fixture("base").model
