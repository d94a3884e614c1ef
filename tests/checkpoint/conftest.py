"""A model folder that the tests of checkpoints share."""

from pathlib import Path

import pytest

from tests.checkpoint.folders import read_fixture, write


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write(tmp_path / "base", *read_fixture("base"))
