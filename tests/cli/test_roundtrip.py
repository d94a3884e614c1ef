"""`roundtrip`: its table, its audio file and its picture."""

import sys
from pathlib import Path

import pytest
import soundfile

import mimi_jax
from mimi_jax import Mimi
from tests.cli.conftest import tone


@pytest.mark.parametrize("num_samples", [1, 2000])
def test_roundtrip(place: Path, run, tiny: list[str], num_samples: int):
    mimi_jax.save_audio("in.wav", tone(num_samples))
    result = run("roundtrip", "in.wav", "-o", "out.wav", "--num-quantizers", "2", *tiny)
    assert result.status == 0, result.stderr
    for word in ("model ", f"{num_samples} samples", "2 x 16 codes", "12.00 kbit/s", "SI-SDR ", "x realtime"):
        assert word in result.stdout
    assert "so they do not include compilation" in result.stdout
    assert soundfile.info("out.wav").frames == num_samples
    assert Path("out.png").read_bytes().startswith(b"\x89PNG")
    assert not list(place.glob(".tmp*"))


def test_a_silent_clip_has_no_si_sdr(place: Path, run, tiny: list[str]):
    mimi_jax.save_audio("in.wav", 0 * tone(2000))
    assert (
        "SI-SDR     none, since the clip is silent\n"
        in run("roundtrip", "in.wav", "-o", "out.wav", *tiny).stdout
    )


def test_roundtrip_of_a_model_that_cannot_stream(place: Path, run, models: Path):
    assert run("roundtrip", "clip.wav", "-o", "out.wav", "--model", models / "whole").status == 0
    assert soundfile.info("out.wav").frames == 2000


def test_roundtrip_needs_matplotlib_before_it_works(fails, tiny: list[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(Mimi, "from_pretrained", None)
    assert "pip install 'mimi_jax[plot]'" in fails("roundtrip", "clip.wav", "-o", "out.wav", *tiny)


def test_roundtrip_writes_two_files_or_none(fails, tiny: list[str], monkeypatch: pytest.MonkeyPatch):
    def full(*_):
        raise OSError(28, "No space left on device", "out.wav")

    monkeypatch.setattr("mimi_jax.files.audio.save_audio", full)
    line = fails("roundtrip", "clip.wav", "-o", "out.wav", "--num-quantizers", "2", *tiny)
    assert line == "mimi-jax roundtrip: error: out.wav: No space left on device\n"


def test_a_folder_where_the_picture_goes(fails, too_late: None, place: Path):
    (place / "out.png").mkdir()
    assert "cannot write out.png" in fails("roundtrip", "clip.wav", "-o", "out.wav")
