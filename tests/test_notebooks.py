"""Every notebook is committed without outputs, and its cells run from top to bottom."""

import json
from pathlib import Path

import matplotlib
import pytest

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))

notebooks = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def code_cells(path: Path) -> list[dict]:
    cells = json.loads(path.read_text())["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


@notebooks
def test_outputs_are_stripped(path: Path):
    assert [c for c in code_cells(path) if c["outputs"] or c["execution_count"] is not None] == []


@notebooks
def test_cells_run(path: Path):
    matplotlib.use("agg")
    namespace = {}
    for number, cell in enumerate(code_cells(path), start=1):
        lines = [line for line in cell["source"] if not line.startswith("%")]
        exec(compile("".join(lines), f"{path.name}, code cell {number}", "exec"), namespace)
