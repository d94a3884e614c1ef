"""`mimi-jax tokenize`: its table, its exit status, and which process it is."""

import dataclasses
from pathlib import Path

import pytest

from mimi_jax import cli
from mimi_jax.cli.parser import DTYPES, ROW_FORMATS, make_parser
from mimi_jax.tokenization import PackedSource, Settings, settings
from mimi_jax.tokenization.packed import WRITERS
from tests.models import load_fixture
from tests.tokenization.corpora import write_folder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    load_fixture("base").model.save_pretrained(folder)
    return folder


def test_the_command_prints_a_table_and_its_status_tells_of_errors(
    tmp_path: Path, tiny: Path, capsys: pytest.CaptureFixture[str]
):
    write_folder(tmp_path / "data", [100, 200])
    words = ["tokenize", str(tmp_path / "data"), "-o", str(tmp_path / "out"), "--model", str(tiny)]
    assert cli.main(words) == 0
    table = capsys.readouterr().out
    assert "2 clips, 0.00 h, 0 errors" in table
    assert "programs compiled" in table
    assert "1 of 1 are done" in table
    assert "left out" not in table
    (tmp_path / "data" / "bad.wav").write_bytes(b"RIFF")
    words[3] = str(tmp_path / "other")
    assert cli.main(words) == 1
    captured = capsys.readouterr()
    assert "2 clips, 0.00 h, 1 errors" in captured.out
    assert (
        captured.err.strip()
        .splitlines()[-1]
        .startswith(
            "mimi-jax tokenize: error: 1 clips could not be encoded; the reasons are in"
            f" {tmp_path / 'other' / 'errors'}"
        )
    )


def test_the_table_names_what_was_left_out_and_unreadable_audio_is_an_error(
    tmp_path: Path, tiny: Path, capsys: pytest.CaptureFixture[str]
):
    write_folder(tmp_path / "data", [100])
    (tmp_path / "data" / "notes.txt").write_text("words")
    (tmp_path / "data" / "talk.m4a").write_bytes(b"audio")
    words = ["tokenize", str(tmp_path / "data"), "-o", str(tmp_path / "out"), "--model", str(tiny)]
    assert cli.main(words) == 1
    captured = capsys.readouterr()
    assert "1 clips, 1 errors" in captured.out
    assert captured.out.splitlines()[-2].split(maxsplit=2) == ["left", "out", "1 .txt"]
    assert "1 clips could not be encoded" in captured.err


@pytest.mark.parametrize(
    ("words", "variables", "error"),
    [
        (["--process-index", "1"], {}, "--process-index and --process-count must be given together"),
        (["--ray-actors", "2"], {}, "need --engine ray"),
        (
            ["--distributed", "--process-index", "1", "--process-count", "2"],
            {},
            "--distributed finds --process-index and --process-count; give either it or them",
        ),
        (["--batch-size", "0"], {}, "argument --batch-size: must be positive, got 0"),
        (["--process-index", "2", "--process-count", "2"], {}, "must lie in [0, 2), got 2"),
        ([], {"SLURM_PROCID": "4", "SLURM_STEP_NUM_TASKS": "4"}, "must lie in [0, 4), got 4"),
        ([], {"OMPI_COMM_WORLD_RANK": "5", "OMPI_COMM_WORLD_SIZE": "5"}, "must lie in [0, 5), got 5"),
        ([], {"TPU_WORKER_ID": "2", "TPU_WORKER_HOSTNAMES": "a,b"}, "must lie in [0, 2), got 2"),
    ],
)
def test_the_process_is_named_by_options_or_variables(
    tmp_path: Path,
    words: list[str],
    variables: dict[str, str],
    error: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    write_folder(tmp_path / "data", [100])
    status = cli.main(["tokenize", str(tmp_path / "data"), "-o", str(tmp_path / "out"), *words])
    assert status == 2
    assert error in capsys.readouterr().err


def test_distributed_without_other_processes_says_what_to_give(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    write_folder(tmp_path / "data", [100])
    assert cli.main(["tokenize", str(tmp_path / "data"), "-o", str(tmp_path / "out"), "--distributed"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("mimi-jax tokenize: error: nothing tells JAX of other processes")
    assert "--process-index, --process-count" in error
    assert not (tmp_path / "out").exists()


def test_the_defaults_are_those_of_settings():
    arguments = vars(make_parser().parse_args(["tokenize", "in", "-o", "out"]))
    for field in dataclasses.fields(Settings):
        assert arguments[field.name] == field.default
    assert DTYPES == settings.DTYPES
    assert tuple(WRITERS) == ROW_FORMATS


def test_a_finished_folder_is_packed(tmp_path: Path, tiny: Path, capsys: pytest.CaptureFixture[str]):
    write_folder(tmp_path / "data", [4000, 5000])
    tokens = str(tmp_path / "tokens")
    words = ["pack", tokens, "-o", str(tmp_path / "parquet"), "--length", "600"]
    assert cli.main(words) == 1
    assert "must be an output of `mimi-jax tokenize`" in capsys.readouterr().err
    assert cli.main(["tokenize", str(tmp_path / "data"), "-o", tokens, "--model", str(tiny)]) == 0
    for format in ROW_FORMATS:
        packed = str(tmp_path / format)
        assert cli.main([*words[:3], packed, *words[4:], "--format", format]) == 0
        *_, clips, rows, wrote = capsys.readouterr().out.splitlines()
        frames = int((PackedSource(packed)[0].segment_ids > 0).sum())
        assert clips.split(maxsplit=1) == ["clips", f"2, {frames} frames"]
        assert rows.split(maxsplit=1) == ["rows", f"1 of 600 frames, {frames / 600:.1%} filled"]
        assert wrote == f"wrote {packed}"
    assert cli.main(words) == 1
    assert "exists; name another folder" in capsys.readouterr().err
