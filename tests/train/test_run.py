"""Whole runs: what they write, and that a killed run continues with the same numbers."""

import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

import mimi_jax.train.run as run_module
from mimi_jax import Mimi, cli, save_audio
from mimi_jax.files.atomic import file_lock
from mimi_jax.files.corpus import find_clips
from mimi_jax.quality.evaluation import evaluate
from mimi_jax.train import NotFiniteError, train, validation
from mimi_jax.train.log import Log
from mimi_jax.train.recipe import DiscriminatorRecipe, ValidationRecipe
from mimi_jax.train.states import read_discriminator
from tests.train.recipes import TINY, tiny_recipe, trainer_of
from tests.train.test_step import speechlike

ONE = jax.devices()[:1]


@pytest.fixture(scope="module", autouse=True)
def _few_trainers() -> Iterator[None]:
    """Compile the steps of each recipe once, and not once for each of its runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module, "Trainer", lambda recipe, model: trainer_of(recipe))
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("speech")
    for number, clip in enumerate(speechlike(4, 3 * TINY.sampling_rate)):
        save_audio(folder / f"{number}.flac", clip, TINY.sampling_rate)
    return folder


def trace(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


RECIPE = tiny_recipe(steps=10)
SLOW = pytest.mark.slow


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "whole"
    train(RECIPE, data, out, devices=ONE)
    return out


def test_what_a_run_writes(whole: Path):
    lines = trace(whole)
    assert [line["step"] for line in lines] == list(range(1, 11))
    assert "loss/mel" in lines[0]
    assert sorted(path.name for path in (whole / "checkpoints").iterdir()) == ["10", "5"]
    model = Mimi.from_pretrained(whole / "model")
    assert model.config == TINY
    assert np.isfinite(model(speechlike(1, 500)).audio_values).all()


class Killed(Exception):
    pass


def kill_at(monkeypatch: pytest.MonkeyPatch, step: int, how: type[BaseException] = Killed) -> None:
    """The process dies after it logs this step, in the middle of the next line."""
    write = Log.write

    def last_words(self, done: int, means: dict) -> None:
        write(self, done, means)
        if done == step:
            self._file.write('{"step": ')
            raise how

    monkeypatch.setattr(Log, "write", last_words)


@pytest.mark.parametrize(("step", "kept"), [(3, "at step 5; .* begins anew$"), (8, "continues from step 5$")])
def test_an_interrupt_says_what_resume_will_do(data: Path, tmp_path: Path, monkeypatch, step: int, kept: str):
    kill_at(monkeypatch, step, KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt, match=kept):
        train(RECIPE, data, tmp_path / "run", devices=ONE)


@pytest.mark.parametrize("step", [pytest.param(3, marks=SLOW), 8])
def test_a_resumed_run_gives_the_same_numbers(
    whole: Path, data: Path, tmp_path: Path, monkeypatch, step: int
):
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, step)
        train(RECIPE, data, tmp_path / "run", devices=ONE)
    train(RECIPE, data, tmp_path / "run", devices=ONE, resume=True)
    assert trace(tmp_path / "run") == trace(whole)
    weights = "model/model.safetensors"
    assert (tmp_path / "run" / weights).read_bytes() == (whole / weights).read_bytes()


@SLOW
def test_a_run_can_be_made_longer(whole: Path, data: Path, tmp_path: Path):
    shutil.copytree(whole, tmp_path / "run")
    train(dataclasses.replace(RECIPE, steps=12), data, tmp_path / "run", devices=ONE, resume=True)
    assert [line["step"] for line in trace(tmp_path / "run")][-3:] == [10, 11, 12]


VALIDATED = tiny_recipe(
    steps=6,
    checkpoint_every=2,
    data__include="[01].flac",
    validation=ValidationRecipe(include="[23].flac", every=2, num_quantizers=2),
)


def kill_in_look(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """The process dies as it validates this step."""
    look = validation.Validation.__call__

    def last_look(self, model: Mimi, done: int) -> dict[str, float]:
        if done == step:
            raise Killed
        return look(self, model, done)

    monkeypatch.setattr(validation.Validation, "__call__", last_look)


def test_the_model_of_a_run_is_the_best_one(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_in_look(patch, 4)
        train(VALIDATED, data, tmp_path / "killed", devices=ONE)
    assert (tmp_path / "killed" / "checkpoints" / "4").exists()  # its last steps are not done again
    train(VALIDATED, data, tmp_path / "killed", devices=ONE, resume=True)
    train(VALIDATED, data, tmp_path / "run", devices=ONE)
    measured = {line["step"]: line["valid/mel"] for line in trace(tmp_path / "run") if "valid/mel" in line}
    assert list(measured) == [2, 4, 6]
    best = json.loads((tmp_path / "run" / "best.json").read_text())
    assert best["step"] == min(measured, key=lambda step: measured[step])
    clips = find_clips(data, "[23].flac")
    found = evaluate(Mimi.from_pretrained(tmp_path / "run" / "model"), clips, [2], visqol=False)
    assert found.qualities[0].mel_distance == pytest.approx(best["valid/mel"], rel=1e-5)
    assert trace(tmp_path / "killed") == trace(tmp_path / "run")
    for name in ("best.json", "model/model.safetensors"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "run" / name).read_bytes()


@pytest.mark.parametrize(("measure", "kept"), [("mel", 4), ("stoi", 2), ("newest", 6)])
def test_a_measure_decides_which_model_is_kept(
    measure: str, kept: int, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    looks = {2: (6.0, 0.9), 4: (5.0, 0.8), 6: (5.5, 0.7)}
    for step, (mel, stoi) in looks.items():
        found = SimpleNamespace(qualities=[SimpleNamespace(mel_distance=mel, stoi=stoi)])
        monkeypatch.setattr(validation, "evaluate", lambda *_, found=found, **__: found)
        recipe = dataclasses.replace(VALIDATED.validation, measure=measure)
        look: Any = validation.Validation(recipe, TINY, data, [], tmp_path)
        measured = look(SimpleNamespace(save_pretrained=lambda _: None), step)
        assert measured == {"valid/mel": mel, "valid/stoi": stoi}
    assert json.loads((tmp_path / "best.json").read_text())["step"] == kept


def test_validation_refuses_codebooks_that_the_model_lacks_at_the_start(data: Path, tmp_path: Path):
    recipe = dataclasses.replace(
        VALIDATED, validation=dataclasses.replace(VALIDATED.validation, num_quantizers=5)
    )
    with pytest.raises(ValueError, match=r"validation\.num_quantizers must lie from 1 to 4, .* got 5"):
        train(recipe, data, tmp_path / "run", devices=ONE)
    assert not (tmp_path / "run").exists()


def test_validation_asks_for_its_package_at_the_start(data: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pystoi", None)
    with pytest.raises(ImportError, match=r"pystoi; install: pip install 'mimi_jax\[evaluate\]'"):
        train(VALIDATED, data, tmp_path / "run", devices=ONE)
    assert not (tmp_path / "run").exists()


def test_clips_are_for_training_or_for_validation(data: Path, tmp_path: Path):
    recipe = dataclasses.replace(VALIDATED, data=tiny_recipe().data)
    with pytest.raises(ValueError, match=r"2\.flac is used for training and for validation"):
        train(recipe, data, tmp_path / "run", devices=ONE)
    assert not (tmp_path / "run").exists()


def test_a_run_is_not_overwritten(whole: Path, data: Path):
    before = (whole / "log.jsonl").read_bytes()
    with pytest.raises(ValueError, match="already holds a run; resume it"):
        train(RECIPE, data, whole)
    other = dataclasses.replace(RECIPE, seed=3)
    with pytest.raises(ValueError, match="another recipe or other data: seed was 0 and is 3"):
        train(other, data, whole, resume=True)
    assert (whole / "log.jsonl").read_bytes() == before


def test_a_run_is_not_resumed_with_other_data(whole: Path, data: Path, tmp_path: Path):
    shutil.copytree(data, tmp_path / "data")
    (tmp_path / "data" / "0.flac").unlink()
    with pytest.raises(ValueError, match=r"other data: clips was '4, .*' and is '3, "):
        train(RECIPE, tmp_path / "data", whole, resume=True)


def test_tensorboard_has_every_loss(whole: Path):
    events = b"".join(path.read_bytes() for path in (whole / "tensorboard").iterdir())
    for name in trace(whole)[0].keys() - {"step"}:
        assert events.count(name.encode()) == 10, name


def test_a_run_of_several_steps_at_once_has_the_same_losses(
    whole: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    counts = []
    advance = run_module._Run._advance

    def counted(self, state, done):
        state, logs = advance(self, state, done)
        counts.append(len(logs))
        return state, logs

    monkeypatch.setattr(run_module._Run, "_advance", counted)
    recipe = dataclasses.replace(RECIPE, steps=5, steps_at_once=2, log_every=2, checkpoint_every=4)
    train(recipe, data, tmp_path / "out", devices=ONE)
    assert counts == [2, 2, 1]
    lines = trace(tmp_path / "out")
    assert [line["step"] for line in lines] == [2, 4, 5]
    expected = np.mean([line["loss/mel"] for line in trace(whole)[:2]])
    assert lines[0]["loss/mel"] == pytest.approx(expected, rel=1e-4)


def test_rows_of_a_batch_are_shared_with_and_without_steps():
    put, count = run_module._placer(jax.devices(), 8), len(jax.devices())
    batch = put({"audio": np.zeros((8, 1, 6), np.float32)}, by_rows=True)["audio"]
    steps = put({"audio": np.zeros((3, 8, 1, 6), np.float32)}, by_rows=True, steps=True)["audio"]
    assert batch.addressable_shards[0].data.shape == (8 // count, 1, 6)
    assert steps.addressable_shards[0].data.shape == (3, 8 // count, 1, 6)
    rows = run_module._placer(jax.devices()[:8], 12)(np.zeros((12, 1)), by_rows=True)
    assert len(rows.sharding.device_set) == 6


@SLOW
def test_a_run_on_eight_devices_has_the_same_losses(data: Path, tmp_path: Path):
    # With the lowest floor, logarithms of near silence would show the rounding of sums.
    recipe = tiny_recipe(steps=3, data__batch_size=8, losses__mel_floor=1e-2)
    for name, devices in (("one", ONE), ("eight", None)):
        train(recipe, data, tmp_path / name, devices=devices)
    for one, eight in zip(trace(tmp_path / "one"), trace(tmp_path / "eight"), strict=True):
        assert one.keys() == eight.keys()
        assert eight["loss/mel"] == pytest.approx(one["loss/mel"], rel=2e-3)
        assert eight["loss/waveform"] == pytest.approx(one["loss/waveform"], rel=2e-3)


def test_a_run_in_progress_is_not_disturbed(whole: Path, data: Path):
    before = (whole / "log.jsonl").read_bytes()
    with (
        file_lock(whole / "lock"),
        pytest.raises(ValueError, match=r"another process is training in .*; wait for it"),
    ):
        train(RECIPE, data, whole, resume=True)
    assert (whole / "log.jsonl").read_bytes() == before


def test_other_files_are_not_overwritten(data: Path, tmp_path: Path):
    (tmp_path / "log.jsonl").write_text("mine")
    with pytest.raises(ValueError, match="holds files but not a training run; name another folder"):
        train(RECIPE, data, tmp_path, resume=True)
    assert (tmp_path / "log.jsonl").read_text() == "mine"


def test_resuming_a_finished_run_writes_its_model_again(whole: Path, data: Path, tmp_path: Path):
    """It may have been killed after its last checkpoint, before its model was written."""
    shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "model")
    train(RECIPE, data, tmp_path / "run", devices=ONE, resume=True)
    weights = "model/model.safetensors"
    assert (tmp_path / "run" / weights).read_bytes() == (whole / weights).read_bytes()
    with pytest.raises(ValueError, match="the run is at step 10 already, beyond steps=8; raise steps"):
        train(dataclasses.replace(RECIPE, steps=8), data, tmp_path / "run", devices=ONE, resume=True)


@SLOW
def test_a_run_can_start_from_a_model(whole: Path, data: Path, tmp_path: Path):
    recipe = dataclasses.replace(RECIPE, init=str(whole / "model"), steps=2, checkpoint_every=2)
    train(recipe, data, tmp_path / "run", devices=ONE)
    first = trace(tmp_path / "run")[0]["loss/mel"]
    assert first < trace(whole)[0]["loss/mel"] * 0.9
    with pytest.raises(ValueError, match="differs from the model init="):
        train(
            dataclasses.replace(recipe, model=dataclasses.replace(TINY, num_filters=8)), data, tmp_path / "x"
        )


def broken_data(data: Path, folder: Path) -> Path:
    """Two whole clips, one that is damaged behind its header, and one that is cut short."""
    shutil.copytree(data, folder)
    noise = np.random.default_rng(0).normal(0, 0.1, (1, 3 * TINY.sampling_rate)).astype(np.float32)
    save_audio(folder / "0.flac", noise, TINY.sampling_rate)
    whole = bytearray((folder / "0.flac").read_bytes())
    whole[100:] = bytes(len(whole) - 100)
    (folder / "0.flac").write_bytes(whole)
    save_audio(folder / "1.wav", noise, TINY.sampling_rate)
    (folder / "1.flac").unlink()
    (folder / "1.wav").write_bytes((folder / "1.wav").read_bytes()[:5000])
    return folder


def test_a_discriminator_can_be_that_of_another_run(data: Path, tmp_path: Path, whole: Path):
    judge = DiscriminatorRecipe(filters=2, windows=(64,), head_start=3)
    recipe = tiny_recipe(
        steps=5, losses__adversarial=4.0, losses__features=4.0, discriminator=judge, log_every=5
    )
    train(recipe, data, tmp_path / "first", devices=ONE)
    (line,) = trace(tmp_path / "first")
    assert "loss/mel" in line and "loss/discriminator" in line  # two phases between two lines of the log

    recipe = dataclasses.replace(
        recipe, discriminator=dataclasses.replace(judge, init=str(tmp_path / "first"), head_start=0)
    )
    random_judge = trainer_of(recipe).init().discriminator
    found = read_discriminator(tmp_path / "first", random_judge)
    changed = jax.tree.map(lambda x, y: bool((x != y).any()), found, random_judge)
    assert all(jax.tree.leaves(changed))
    train(recipe, data, tmp_path / "second", devices=ONE)

    for run, filters, error in (
        (tmp_path / "first", 3, "has other windows or filters"),
        (whole, 2, "holds no run with a discriminator and a checkpoint"),
        (tmp_path / "nowhere", 2, "nowhere holds no run with a discriminator"),
    ):
        judge = dataclasses.replace(judge, init=str(run), filters=filters)
        with pytest.raises(ValueError, match=error):
            train(dataclasses.replace(recipe, discriminator=judge), data, tmp_path / error, devices=ONE)


def test_clips_that_cannot_be_read_are_left_out_and_named(
    data: Path, tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture
):
    broken = broken_data(data, tmp_path / "data")
    train(RECIPE, broken, tmp_path / "whole", devices=ONE)
    lines = (tmp_path / "whole" / "left_out.jsonl").read_text().splitlines()
    reasons = {Path(line["name"]).name: line["reason"] for line in map(json.loads, lines)}
    assert len(lines) == 2 and reasons.keys() == {"0.flac", "1.wav"}
    assert "the file is damaged" in reasons["0.flac"] and "the file is cut short" in reasons["1.wav"]
    stderr = capsys.readouterr().err
    for name, reason in reasons.items():
        assert stderr.count(f"left out {broken / name}: {reason}\n") == 1
    assert (
        f"2 clips cannot be read and were left out; see {tmp_path / 'whole' / 'left_out.jsonl'}\n" in stderr
    )

    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, 8)
        train(RECIPE, broken, tmp_path / "run", devices=ONE)
    train(RECIPE, broken, tmp_path / "run", devices=ONE, resume=True)
    assert trace(tmp_path / "run") == trace(tmp_path / "whole")
    assert len((tmp_path / "run" / "left_out.jsonl").read_text().splitlines()) == 2


def test_a_run_that_diverges_stops_with_its_last_checkpoint(data: Path, tmp_path: Path):
    recipe = tiny_recipe(steps=100, optimizer__learning_rate=1e18, checkpoint_every=1)
    with pytest.raises(
        NotFiniteError, match=r"step \d+: .*not finite; every checkpoint is from before that step"
    ):
        train(recipe, data, tmp_path / "run", devices=ONE)
    model = Mimi.from_pretrained(tmp_path / "run" / "model")
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(model))


@SLOW
def test_a_teacher_may_be_a_function(data: Path, tmp_path: Path):
    seen = []

    def teacher(audio: np.ndarray) -> np.ndarray:
        seen.append(audio.shape)
        # Teachers leave out a vector at the end.
        return np.ones((len(audio), audio.shape[2] // TINY.frame_size * 4 - 1, 6), np.float32)

    recipe = tiny_recipe(steps=2, losses__distillation=1.0, teacher_dim=6, log_every=1, checkpoint_every=2)
    train(recipe, data, tmp_path / "run", devices=ONE, teacher=teacher)
    assert seen == [(2, 1, recipe.num_samples)] * 2
    assert trace(tmp_path / "run")[-1]["loss/distillation"] < 2


TOML = """
steps = 2
log_every = 1
checkpoint_every = 1

[model]
sampling_rate = 2400
upsampling_ratios = [4, 3]
hidden_size = 16
num_filters = 4
num_hidden_layers = 1
num_attention_heads = 2
num_key_value_heads = 2
intermediate_size = 32
sliding_window = 16
upsample_groups = 16
codebook_size = 16
codebook_dim = 8
vector_quantization_hidden_dimension = 8
num_quantizers = 4

[data]
seconds = 0.96
batch_size = 2

[optimizer]
learning_rate = 3e-3

[losses]
adversarial = 0
features = 0

[quantizer]
kmeans_vectors = 400
"""


def test_the_command(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(jax, "devices", lambda: ONE)
    config, out = tmp_path / "tiny.toml", tmp_path / "runs" / "tiny"
    config.write_text(TOML)
    words = ["train", str(config), "--data", str(data), "--out", str(out)]
    assert cli.main(words) == 0
    assert capsys.readouterr().out == f"wrote {out}/model: the running mean of the weights after 2 steps\n"
    assert [line["step"] for line in trace(out)] == [1, 2]
    assert Mimi.from_pretrained(out / "model").config == TINY
    assert cli.main(words) == 1
    assert "already holds a run; resume it (--resume)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("toml", "error"),
    [
        ("steps = ", "tiny.toml: "),
        ("step = 3", "unknown field step; the fields here are model, data, optimizer"),
        ("[model]\nhiden_size = 3", "hiden_size"),
        ("[optimizer]\nlearning_rate = 'fast'", "optimizer.learning_rate must be a number, got 'fast'"),
        ("[data]\nseconds = 0.1", "data.seconds must be a multiple of a frame, 0.08 s, got 0.1"),
        pytest.param(
            TOML + "[data.weights]\nradio = 1.0",
            "data.weights names radio, but the sources of the data are",
            id="weights of an unknown source",
        ),
        pytest.param(
            TOML.replace("[data]", "[data]\ninclude = '*.opus'"), "no audio files", id="nothing included"
        ),
    ],
)
def test_errors(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture, toml: str, error: str):
    config, out = tmp_path / "tiny.toml", tmp_path / "run"
    config.write_text(toml)
    assert cli.main(["train", str(config), "--data", str(data), "--out", str(out)]) == 1
    stderr = capsys.readouterr().err
    assert stderr.startswith("mimi-jax train: error: ") and error in stderr and stderr.count("\n") == 1
    assert not out.exists()


SCRIPT = """
import sys
import jax
from mimi_jax.train import train
from tests.train.test_run import SLOW_RECIPE
train(SLOW_RECIPE, sys.argv[1], sys.argv[2], resume=True)
"""
SLOW_RECIPE = tiny_recipe(
    steps=60, losses__adversarial=4.0, losses__features=4.0, losses__adversarial_start=30
)


@SLOW
def test_killed_at_any_moment(data: Path, tmp_path: Path):
    """After SIGKILL at random moments, the run ends with the log of a run that was not killed."""
    environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache")}

    def start(out: Path) -> subprocess.Popen:
        command = [sys.executable, "-c", SCRIPT, str(data), str(out)]
        return subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)

    assert start(tmp_path / "whole").wait() == 0
    rng, kills = random.Random(0), 0
    while kills < 8:
        process = start(tmp_path / "run")
        reached = len(complete_lines(tmp_path / "run"))
        # Wait either from the start of the process or from its first step.
        wait = rng.choice([rng.uniform(0, 10), None])
        if wait is None:
            while process.poll() is None and len(complete_lines(tmp_path / "run")) <= reached:
                time.sleep(0.05)
            wait = rng.uniform(0, 1.5)
        time.sleep(wait)
        if process.poll() is not None:
            break
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills += 1
    assert kills >= 3
    assert start(tmp_path / "run").wait() == 0
    assert trace(tmp_path / "run") == trace(tmp_path / "whole")


def complete_lines(out: Path) -> list[str]:
    file = out / "log.jsonl"
    return file.read_text().split("\n")[:-1] if file.exists() else []
