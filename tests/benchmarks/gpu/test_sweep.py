"""The sweep over the sizes of device kernels, which here compute layer by layer."""

import sys
import time
from typing import Any

import pytest

from benchmarks.gpu import sweep
from benchmarks.report import Report
from mimi_jax.ops import triton_stages

HOPPER = 90


def test_every_constant_is_swept_once():
    found = list(sweep.constants(sweep.SMALLEST, HOPPER, clips=1, seconds=1))
    assert [str(constant) for constant in found] == [
        "encoder_front, ENCODER_FRONT[True]",
        "decoder_back, DECODER_BACK[True]",
    ]
    # From the waveform inwards, and from 25 Hz outwards.
    assert [constant.x.shape for constant in found] == [(1, 24_000, 1), (1, 6_000, 64)]


def test_candidates_are_the_constant_and_its_neighbours():
    tile = triton_stages.Tile(64, 8)
    tiles = sweep.candidates(tile)
    assert tiles[0] == tile
    assert {tile.rows for tile in tiles} == {32, 64, 128}
    assert len(set(tiles)) == len(tiles) == 18


def test_the_fastest_tile_wins(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture):
    """Some do not compile. The table is as before in the end."""
    constant = next(sweep.constants(sweep.SMALLEST, HOPPER, clips=1, seconds=1))
    table = getattr(triton_stages, constant.table)
    before, used = dict(table), []

    def step(part: Any, state: Any, x: Any, lengths: Any, *, capability: int) -> Any:
        used.append(table[constant.key])
        return part.step_layers(part.init_state(len(x), x.dtype), x, lengths)

    real = sweep.compile_tiles

    def compile_tiles(constant: Any, tiles: list, capability: int) -> dict[Any, Any]:
        programs = real(constant, tiles[:4], capability)
        return {tile: (tile, run) for tile, run in programs.items() if tile.stages < 3}

    monkeypatch.setattr(triton_stages, "step", step)
    monkeypatch.setattr(sweep, "compile_tiles", compile_tiles)
    monkeypatch.setattr(sweep, "milliseconds", lambda pair: pair[0].rows / pair[0].stages)
    best = sweep.sweep(constant, HOPPER, Report("a GPU"), end=time.perf_counter() + 60)
    fewer = sweep.candidates(before[constant.key])[:4]
    assert used == fewer
    assert best == min((tile for tile in fewer if tile.stages < 3), key=lambda tile: tile.rows / tile.stages)
    assert table == before
    rows = [line for line in capfd.readouterr().out.splitlines() if line.startswith("| encoder_front")]
    assert len(rows) == sum(tile.stages < 3 for tile in fewer)


def test_without_a_gpu_only_what_needs_no_triton_has_times(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
):
    monkeypatch.setattr(sys, "argv", ["sweep", "--small"])
    monkeypatch.setattr(sweep, "why_not", lambda: "no GPU")
    sweep.main()
    text = capfd.readouterr().out
    assert text.count("| without Triton |") == 2
    assert "## No tiles are measured: no GPU" in text
