"""Reports of benchmarks: the header, the tables, and the rows of the comparison."""

import re
import sys
from pathlib import Path

import pytest

from benchmarks.compare.cases import CASE, default_cases
from benchmarks.compare.results import COLUMNS, Result, table_rows
from benchmarks.report import Report
from benchmarks.timing import Budget, take_turns


def test_a_report_says_when_and_how_it_was_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    monkeypatch.setattr(sys, "orig_argv", ["python3", "-m", "benchmarks.startup", "a b"])
    monkeypatch.setenv("XLA_FLAGS", "--xla_one --xla_two")
    report = Report("a device", ["a note"])
    report.table(["name", "ms"])
    report.row(["x", "1.0"])
    report.save(tmp_path / "report.md")
    text = (tmp_path / "report.md").read_text()
    assert re.search(r"^- date: \d{4}-\d\d-\d\d$", text, re.MULTILINE)
    assert "- command: `XLA_FLAGS='--xla_one --xla_two' python -m benchmarks.startup 'a b'`\n" in text
    assert re.search(r"threads, load [\d.]+; JAX on a device$", text, re.MULTILINE)
    assert re.search(r"versions: Python 3\.\d+\.\d+, mimi_jax [\d.]+, jax ", text)
    assert text.endswith("- a note\n\n| name | ms |\n|---|---|\n| x | 1.0 |\n")
    assert capsys.readouterr().out == text


def test_rows_of_clips_have_ratios_and_shares():
    ours = Result("ms", [10.0, 30.0, 20.0], 10, 4_000_000_000, 1.0, 400.0)
    theirs = Result("ms", [60.0])
    first, second = table_rows(
        "encode-1x10", {"mimi_jax-float32": ours, "transformers-eager-float32": theirs}
    )
    assert len(first) == len(COLUMNS)
    cells = ["20.0 ms", "", "3", "3.00x", "500.0", "50%", "100.00%"]
    assert first == ["encode-1x10", "mimi_jax-float32", *cells]
    assert second[2:] == ["60.0 ms", "", "1", "1.00x", "", "", ""]


def test_rows_of_steps_have_the_99th_percentile_and_moshi_as_baseline():
    times = [float(number) for number in range(101)]
    results = {"mimi_jax-float32": Result("ms", times), "moshi-float32": Result("ms", [100.0])}
    first, _ = table_rows("encode-step-16", results)
    assert first[2:6] == ["50.0 ms", "99.0 ms", "101", "2.00x"]


def test_case_names():
    assert all(CASE.fullmatch(case) for device in ("cpu", "gpu") for case in default_cases(device))
    assert CASE.fullmatch("decode-step-64") and not CASE.fullmatch("encode-8")


def test_systems_take_turns():
    calls = []

    def measure(name: str) -> float:
        calls.append(name)
        return float(len(calls))

    measures = {name: lambda name=name: measure(name) for name in "ab"}
    values = take_turns("case", measures, Budget(2, 60.0), counted=2, uncounted=1)
    assert "".join(calls) == "aaabbbaaabbb"
    assert values == {"a": [2, 3, 8, 9], "b": [5, 6, 11, 12]}


def test_turns_end_when_the_time_is_over():
    assert take_turns("case", {"a": lambda: 1.0}, Budget(5, -1.0)) == {"a": [1.0]}
