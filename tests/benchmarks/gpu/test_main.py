"""The parts run one after the other, whatever happens in them."""

import importlib.util
import sys
import time
from pathlib import Path

import pytest

from benchmarks.gpu import __main__ as main
from benchmarks.gpu import cases
from benchmarks.gpu.parts import GPU_TESTS, PARTS, Folders, Part
from benchmarks.gpu.processes import run


def python(program: str) -> list[str]:
    return [sys.executable, "-u", "-c", program]


def test_a_process_is_shown_and_kept(tmp_path: Path, capfd: pytest.CaptureFixture):
    log = tmp_path / "log"
    outcome = run(python("import os; print(os.environ['A']); print('b')"), 60, log, {"A": "a"})
    assert outcome.text == "ok"
    assert outcome.lines == ["a", "b"]
    assert log.read_text() == capfd.readouterr().out == "a\nb\n"


def test_a_process_that_fails_or_crashes_says_so(tmp_path: Path):
    assert run(python("exit(3)"), 60, tmp_path / "log", {}).text == "failed, exit status 3"
    crash = python("import os; os.kill(os.getpid(), 9)")
    assert run(crash, 60, tmp_path / "log", {}).text == "failed, exit status -9"


def test_a_process_is_stopped_with_what_it_started(tmp_path: Path):
    """Also where a process of its own still holds the output."""
    sleep = "subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    child = f"import subprocess, sys; print('begun'); {sleep}"
    start = time.perf_counter()
    outcome = run(python(child), 2, tmp_path / "log", {})
    assert outcome.text == "stopped at its limit of 2 s"
    assert outcome.lines == ["begun"]
    assert time.perf_counter() - start < 10


@pytest.fixture
def fake_parts(monkeypatch: pytest.MonkeyPatch):
    def replace(**programs: str) -> None:
        monkeypatch.setattr(main, "WEIGHTS", "")
        monkeypatch.setattr(main, "SLOWER", 1)
        parts = {
            name: Part(f"About {name}", 3, lambda _, __, program=program: ["-c", program])
            for name, program in programs.items()
        }
        monkeypatch.setattr(main, "PARTS", parts)

    return replace


def test_a_part_survives_another(fake_parts, tmp_path: Path):
    fake_parts(
        fails="raise SystemExit(1)",
        hangs="import time; print('| row |', flush=True); time.sleep(60)",
        works="print('noise'); print('| x |'); print('|---|'); print('| 1 |')",
    )
    folders = Folders(tmp_path / "models", tmp_path)
    outcomes = main.run_parts(["fails", "hangs", "works"], 60, folders, tmp_path, small=True)
    del outcomes["weights"]
    assert [outcome.text for outcome in outcomes.values()] == [
        "failed, exit status 1",
        "stopped at its limit of 3 s",
        "ok",
    ]
    summary = main.summarize(outcomes)
    assert "| hangs | stopped at its limit of 3 s | 3 |" in summary
    assert "## About works\n\n\n| x |\n|---|\n| 1 |\n" in summary
    assert "noise" not in summary


def test_only_the_parts_that_were_asked_for_run_while_time_lasts(fake_parts, tmp_path: Path):
    fake_parts(one="print(1)", two="print(2)")
    folders = Folders(tmp_path / "models", tmp_path)
    assert "one" not in main.run_parts(["two"], 60, folders, tmp_path, small=True)
    assert main.run_parts(["two"], 5, folders, tmp_path, small=True)["two"].text == "no time was left"


# Prints a row of each case after `--only`; "slow" hangs and "dead" ends the process.
FAKE_COMPARE = """
import sys, time
for case in sys.argv[sys.argv.index("--only") + 1 :]:
    if case == "dead": sys.exit(1)
    if case == "slow": time.sleep(60)
    print("- a header"); print(f"| {case} | ours | 1 ms |", flush=True)
"""


def test_a_case_that_hangs_or_crashes_costs_that_case(capfd: pytest.CaptureFixture):
    group = cases.Group(["a", "slow", "b", "dead", "c"], [])
    cases.measure(group, python(FAKE_COMPARE), start=1, limit=2)
    rows = capfd.readouterr().out.splitlines()
    assert [row.split("|")[1].strip() for row in rows] == ["a", "slow", "b", "dead", "c"]
    assert rows[0] == "| a | ours | 1 ms |"
    assert rows[1].startswith("| slow | given up after 2 s")
    assert rows[3].endswith("exit status 1 |")


def test_cases_and_systems_exist():
    from benchmarks.compare.cases import CASE
    from benchmarks.compare.systems import SYSTEMS

    for group in cases.GROUPS:
        assert all(CASE.fullmatch(case) for case in group.cases)
        assert set(group.systems) <= set(SYSTEMS["gpu"])


def test_the_limits_leave_time_for_what_matters_most():
    assert list(PARTS)[:3] == ["tests", "profile", "compare"]
    assert sum(PARTS[name].seconds for name in ("tests", "profile", "compare")) <= 480


def test_all_tests_with_the_marker_are_run():
    marked = {str(path) for path in Path("tests").rglob("test_*.py") if "pytest.mark.gpu" in path.read_text()}
    assert {*marked} - {str(Path(__file__).relative_to(Path.cwd()))} == set(GPU_TESTS)


@pytest.mark.parametrize("name", [name for name in PARTS if name != "tests"])
def test_parts_name_options_that_exist(name: str, tmp_path: Path):
    """On a GPU, a wrong one would be found when it is too late."""
    module, *words = PARTS[name].words(Folders(tmp_path, tmp_path), True)[1:]
    spec = importlib.util.find_spec(module)
    assert spec is not None and spec.origin is not None
    source = Path(spec.origin).read_text()
    assert [word for word in words if word.startswith("--") and f'"{word}"' not in source] == []


@pytest.mark.slow
def test_everything_runs_on_a_cpu(tmp_path: Path):
    """With a tiny model, every part but what needs a device."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--small", "--output", str(tmp_path)]
    outcome = run(command, 600, tmp_path.with_suffix(".log"), {})
    assert outcome.text == "ok", outcome.lines[-50:]
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"summary.md", "kernels.csv", *(f"{name}.log" for name in PARTS)}
    assert len(names) <= 8
    summary = (tmp_path / "summary.md").read_text()
    for words in (
        "encode-2x1-float32",
        "| convolutions |",
        "mimi_jax-step-float32",
        "without Triton",
        "bfloat16",
    ):
        assert words in summary
