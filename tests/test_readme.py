"""The README and the pages in docs/: every snippet runs, in the order of a page, and every link works."""

import importlib.util
import re
import runpy
import shlex
import shutil
from pathlib import Path

import jax
import pytest

from mimi_jax import cli

ROOT = Path(__file__).parents[1]
README, GUIDE = ROOT / "README.md", ROOT / "docs" / "guide.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
CLIP = Path("mimi_jax", "samples", "speech.flac")
OTHERS = {"datasets", "tensorflow"}
MAX_ROWS = 6  # of a table in the README


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def snippets(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)


def can_run(snippet: str) -> bool:
    """Whether the other libraries that a snippet is about are installed; they are in no extra for users."""
    packages = re.findall(r"^(?:import|from) (\w+)", snippet, re.MULTILINE)
    return all(importlib.util.find_spec(package) for package in OTHERS.intersection(packages))


@pytest.fixture(autouse=True)
def beside_a_clip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A folder with the clip that the pages name, and where the README's reader has it."""
    for path in (tmp_path / "speech.flac", tmp_path / CLIP):
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / CLIP, path)
    monkeypatch.chdir(tmp_path)
    devices = jax.local_devices()[:1]  # as most readers have; tokenization shares its batches among all
    monkeypatch.setattr(jax, "local_devices", lambda: devices)


def runs_with_notebooks(page: Path):
    """The pages in docs/ take minutes, as notebooks do. `make test` runs the README alone."""
    return page if page == README else pytest.param(page, marks=pytest.mark.notebooks)


@pytest.mark.parametrize(
    "page", [runs_with_notebooks(page) for page in PAGES if snippets(page, "python")], ids=name
)
def test_python(page: Path, capsys: pytest.CaptureFixture):
    code = "\n".join(filter(can_run, snippets(page, "python")))
    exec(compile(code, page.name, "exec"), {"__name__": "__main__"})
    if page == README:
        assert snippets(page, "text") == [capsys.readouterr().out]


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links(page: Path):
    links = re.findall(r"\]\((?!https?://)([^)#]+)", page.read_text())
    links += re.findall(r'(?:src|href)="(?!https?://)([^"]+)', page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_to_sections(page: Path):
    for link, section in re.findall(r"\]\((?!https?://)([^)#]*)#([^)]+)\)", page.read_text()):
        titles = re.findall(r"^#+ (.*)", (page.parent / link if link else page).read_text(), re.MULTILINE)
        anchors = [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles]
        assert section in anchors, link


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_files_and_modules_exist(page: Path):
    """Paths of this repository, and modules that are run with `python -m`."""
    text = page.read_text()
    paths = re.findall(r"`((?:mimi_jax|benchmarks|tests|notebooks|configs|convert|docs)/[\w/.]*)`", text)
    paths += [f"mimi_jax/{path}" for path in re.findall(r"`((?:nn|ops)/\w+\.py)`", text)]
    assert [path for path in paths if not (ROOT / path).exists()] == []
    modules = re.findall(r"python -m ((?:benchmarks|tests|notebooks)[\w.]*)", text)
    files = [ROOT / module.replace(".", "/") for module in modules]
    assert [file for file in files if not (file.is_dir() or file.with_suffix(".py").exists())] == []


def test_claims_stand_in_the_measurements():
    """Each number that the README puts forward is in the table that it links to."""
    claims = re.findall(
        r"^- (.*?)(?=^[-\n])", README.read_text().partition("## Streams")[0], re.MULTILINE | re.DOTALL
    )
    assert len(claims) == 4
    for claim in claims:
        (number,) = re.findall(r"\*\*(\d[^*]*)\*\*", claim)
        (table,) = re.findall(r"\[Table\]\(([^)#]+)", claim)
        assert number in (ROOT / table).read_text(), claim


def test_the_first_table_on_speed_stands_in_the_measurements():
    page = ROOT / "docs" / "speed.md"
    rows = re.findall(r"^\| \[.*\]\((.*?\.md)\)[^|]*\|(.*)\|$", page.read_text(), re.MULTILINE)
    assert len(rows) == 5
    for link, cells in rows:
        measured = (page.parent / link).read_text()
        assert [number for number in re.findall(r"\d[\d.,]*", cells) if number not in measured] == [], link


def test_tables_of_the_readme_are_short():
    tables = re.findall(r"(?:^\|.*\n)+", README.read_text(), re.MULTILINE)
    assert all(table.count("\n") - 2 <= MAX_ROWS for table in tables)


@pytest.mark.notebooks
def test_command_line():
    lines = "".join(snippets(GUIDE, "sh")).splitlines()
    commands = [line for line in lines if line.startswith("mimi-jax")]
    # Training has tests of its own, and here the recipe and the corpus are the reader's.
    commands = [line for line in commands if not line.startswith(("mimi-jax train", "mimi-jax evaluate"))]
    assert len(commands) == 6
    for command in commands:
        assert cli.main(shlex.split(command, comments=True)[1:]) == 0, command
    assert Path("roundtrip.png").stat().st_size > 10_000


def test_the_diagram_can_be_drawn(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sys.argv", ["architecture.py", "drawn.png"])
    runpy.run_path(str(ROOT / "docs" / "architecture.py"), run_name="__main__")
    assert Path("drawn.png").stat().st_size > 10_000


def test_make_targets():
    makefile = (ROOT / "Makefile").read_text()
    found = [re.findall(r"\bmake ([a-z]+)", "\n".join(snippets(page, "sh"))) for page in PAGES]
    assert re.findall(r"^make (\w+)", "\n".join(snippets(README, "sh")), re.MULTILINE) == ["demo", "test"]
    targets = {target for targets in found for target in targets}
    assert [target for target in targets if not re.search(rf"^{target}:", makefile, re.MULTILINE)] == []
