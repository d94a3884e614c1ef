"""Every snippet of the README and of docs/ runs, in order, as one reader would run them."""

import re
import shlex
import shutil
from pathlib import Path

import pytest

from mimi_jax import cli

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"


def snippets(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)


@pytest.fixture(autouse=True)
def beside_a_clip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    shutil.copy(ROOT / "mimi_jax" / "samples" / "speech.flac", tmp_path)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("page", [README, *sorted((ROOT / "docs").glob("*.md"))], ids=lambda page: page.name)
def test_python(page: Path):
    code = "\n".join(snippets(page, "python"))
    assert "mimi_jax" in code
    exec(compile(code, page.name, "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize("page", [README, *sorted((ROOT / "docs").glob("*.md"))], ids=lambda page: page.name)
def test_links(page: Path):
    links = re.findall(r"\]\((?!https?://)([^)#]+)", page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_command_line():
    lines = "".join(snippets(README, "sh")).splitlines()
    commands = [line for line in lines if line.startswith("mimi-jax")]
    # Training has tests of its own: the README's recipe and corpus are the reader's.
    commands = [line for line in commands if not line.startswith(("mimi-jax train", "mimi-jax evaluate"))]
    assert len(commands) == 6
    for command in commands:
        assert cli.main(shlex.split(command, comments=True)[1:]) == 0, command
    assert Path("roundtrip.png").stat().st_size > 10_000


def test_make_targets():
    targets = re.findall(r"^make (\w+)", "\n".join(snippets(README, "sh")), re.MULTILINE)
    assert targets == ["demo", "test"]
    makefile = (ROOT / "Makefile").read_text()
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)
