"""Profiles of a tiny model on the CPU: every table, from a trace of this version of JAX."""

import csv
from pathlib import Path

import pytest

from benchmarks.flops import count_parts
from benchmarks.gpu import profile
from benchmarks.gpu.groups import Program
from benchmarks.gpu.trace import Launch
from benchmarks.inputs import CODEBOOKS, SMALL
from benchmarks.report import Report

CEILINGS = profile.Ceilings(bytes=4e12, flops={"float32": 50e12})


def rows_after(header: str, text: str) -> list[list[str]]:
    """The rows of the first table whose header begins so."""
    lines = text.splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith(f"| {header}"))
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


def test_tables_of_launches(capfd: pytest.CaptureFixture):
    """Five runs of a convolution of 2 ms, a pass of 1 ms, and a copy whose bytes are not counted."""
    run = [("conv", 2000.0), ("pad", 1000.0), ("MemcpyD2H", 500.0)]
    launches = [Launch(name, name, 0.0, duration) for name, duration in run] * profile.RUNS
    program = Program({"conv": "convolutions", "pad": "passes"}, {"conv": 10**9, "pad": 2 * 10**9}, {})
    found = profile.Profile(launches, program, {"convolutions": 10**11, "RVQ": 10**9})
    profile.show("encode-1x1-float32", found, CEILINGS, Report("a GPU"))
    text = capfd.readouterr().out
    assert "### encode-1x1-float32: 3.500 ms of the device, 3 launches" in text
    assert rows_after("group", text) == [
        ["convolutions", "2.000", "57%", "1", "1.000", "0.500", "12%"],
        ["passes", "1.000", "29%", "1", "2.000", "2.000", "50%"],
        ["copies", "0.500", "14%", "1", "", "", ""],
    ]
    # There is no time of an RVQ, so no speed either.
    products = ["convolutions", "0.100", "convolutions and fused stages", "50.0", "100%"]
    assert rows_after("products of", text) == [products]
    assert rows_after("device kernel", text)[0] == ["`conv`", "convolutions", "2.000", "1"]


@pytest.mark.slow
def test_cases_of_a_tiny_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture):
    monkeypatch.setattr(profile, "measure_ceilings", lambda device: CEILINGS)
    cases = ["encode-1x1-float32", "decode-step-1-float32", "encode-step-none-float32"]
    profile.run_cases(cases, tmp_path / "models", True, tmp_path / "kernels.csv")
    text = capfd.readouterr().out
    found = {row[0] for row in rows_after("group", text)}
    assert {"convolutions", "passes", "Transformer", "RVQ"} <= found
    assert len(rows_after("products of", text)) == 3
    assert "### decode-step-1-float32: " in text
    assert "### encode-step-none-float32 failed" in text
    with (tmp_path / "kernels.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["case"] for row in rows} == set(cases[:2])
    assert sum(float(row["microseconds"]) for row in rows) > 0


def test_parts_are_all_of_the_work():
    """Each group whose products are counted exists, and the parts of `count_parts` are these groups."""
    for parts in count_parts(SMALL, 1, CODEBOOKS).values():
        assert list(parts) == list(profile.PRODUCTS)
