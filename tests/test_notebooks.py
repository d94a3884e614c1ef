"""Each notebook has the cells of its source, shows the outputs it should, and runs from top to bottom."""

import tomllib
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "notebooks").glob("*.py"))
MAX_BYTES = 1_000_000
# The number of audio players and of pictures in the outputs of each notebook.
SHOWN = {
    "quickstart": (7, 2),
    "speech_lm": (3, 2),
    "streaming": (1, 2),
    "tokenize_dataset": (0, 1),
    "train_codec": (3, 2),
}

notebooks = pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)


def committed(source: Path) -> nbformat.NotebookNode:
    return nbformat.read(source.with_suffix(".ipynb"), as_version=4)


def outputs(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def test_all_notebooks_are_listed_here():
    assert [path.stem for path in SOURCES] == sorted(SHOWN)
    assert sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb")) == sorted(SHOWN)


@notebooks
def test_outputs_are_complete_and_in_order(source: Path):
    notebook = committed(source)
    assert source.with_suffix(".ipynb").stat().st_size < MAX_BYTES
    counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1)), "run python -m notebooks.tools.run"
    assert {output.output_type for output in outputs(notebook)} <= {
        "stream",
        "execute_result",
        "display_data",
    }
    data = [output.get("data", {}) for output in outputs(notebook)]
    players = sum("<audio" in "".join(d.get("text/html", "")) for d in data)
    assert (players, sum("image/png" in d for d in data)) == SHOWN[source.stem]


@notebooks
def test_the_colab_badge_links_to_the_project(source: Path):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    address = project["urls"]["Source"].replace("https://github.com/", "")
    badge = f"https://colab.research.google.com/github/{address}/blob/main/notebooks/{source.stem}.ipynb"
    assert (
        source.read_text().count(badge) == source.read_text().count("colab.research.google.com/github/") == 1
    )


@pytest.mark.notebooks
@notebooks
def test_the_cells_are_those_of_the_source(source: Path):
    from notebooks.tools.run import read

    expected = read(source)
    assert [(c.cell_type, c.source) for c in committed(source).cells] == [
        (c.cell_type, c.source) for c in expected.cells
    ]


@pytest.mark.notebooks
@notebooks
def test_it_runs(source: Path):
    from notebooks.tools.run import execute, read

    notebook = read(source)
    execute(notebook)
    kinds = [
        [sorted(output.get("data", {})) for output in outputs(book)] for book in (notebook, committed(source))
    ]
    assert kinds[0] == kinds[1]
