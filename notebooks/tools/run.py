"""Run the notebooks, notebooks/*.py, and store them with their outputs as notebooks/*.ipynb.

    python -m notebooks.tools.run [quickstart ...]

A notebook is written and reviewed as `.py` (jupytext's percent format) and shown as `.ipynb`, on GitHub and
in Colab. Progress bars and warnings are left out. The file has no times or random ids, so it changes only if
the source or its outputs change.
"""

import argparse
import base64
import io
import tempfile
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient
from PIL import Image

NOTEBOOKS = Path(__file__).parents[1]
SECONDS = 300  # the most that a cell may take
PIXELS = 900  # of a picture's longer side, which is as wide as a page shows it


def read(source: Path) -> nbformat.NotebookNode:
    """Read a notebook from its `.py`, without outputs."""
    notebook = jupytext.read(source)
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"
    notebook.metadata = {"kernelspec": notebook.metadata["kernelspec"], "language_info": {"name": "python"}}
    return notebook


def execute(notebook: nbformat.NotebookNode) -> None:
    """Run all cells and fill in their outputs.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        client = NotebookClient(
            notebook, timeout=SECONDS, record_timing=False, resources={"metadata": {"path": folder}}
        )
        client.execute()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if not _is_noise(output)]
            for output in cell.outputs:
                if "image/png" in output.get("data", {}):
                    output.data["image/png"] = _smaller(output.data["image/png"])
    notebook.metadata["language_info"] = {"name": "python"}


def _is_noise(output: nbformat.NotebookNode) -> bool:
    """Whether an output is a progress bar, a warning, or the line that %pip always prints."""
    return output.get("name") == "stderr" or output.get("text", "").startswith(
        "Note: you may need to restart"
    )


def _smaller(png: str) -> str:
    """The picture at the size of a page and in 256 colours, which takes a quarter of the bytes."""
    file = io.BytesIO()
    image = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")
    image.thumbnail((PIXELS, PIXELS), Image.Resampling.LANCZOS)
    image.quantize(256, kmeans=3, dither=Image.Dither.NONE).save(file, format="png", optimize=True)
    return base64.b64encode(file.getvalue()).decode()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("names", nargs="*", help="all by default")
    names = parser.parse_args().names or sorted(path.stem for path in NOTEBOOKS.glob("*.py"))
    for name in names:
        notebook = read(NOTEBOOKS / f"{name}.py")
        execute(notebook)
        nbformat.write(notebook, NOTEBOOKS / f"{name}.ipynb")
        print(f"{name}: {(NOTEBOOKS / f'{name}.ipynb').stat().st_size / 1024:,.0f} KiB")


if __name__ == "__main__":
    main()
