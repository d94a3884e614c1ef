"""Steps of training on a tiny codec: it learns, changes only what it may, and devices share a batch."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import mimi_jax
from mimi_jax import Mimi, checkpoint
from mimi_jax.quality.spectrum import mel_distance
from mimi_jax.train.recipe import DiscriminatorRecipe, Recipe
from mimi_jax.train.step import Trainer, TrainState
from mimi_jax.train.weight_norm import NormalizedKernel
from mimi_jax.train.weights import weights_of
from tests.train.recipes import TINY, tiny_recipe, trainer_of


def speechlike(batch: int, samples: int, seed: int = 0) -> np.ndarray:
    """Harmonics with a gliding pitch, in bursts."""
    rng = np.random.default_rng(seed)
    time = np.arange(samples) / TINY.sampling_rate
    clips = []
    for _ in range(batch):
        phase = 2 * np.pi * np.cumsum(120 + 40 * np.sin(2 * np.pi * rng.uniform(1, 3) * time)) / 2400
        tone = sum(np.sin(k * phase) / k for k in range(1, 6))
        clips.append(0.2 * tone * (0.6 + 0.4 * np.sin(2 * np.pi * rng.uniform(2, 5) * time)))
    return np.stack(clips)[:, None].astype(np.float32)


def batch_of(recipe: Recipe, size: int | None = None, seed: int = 0) -> dict[str, jax.Array]:
    size = size or recipe.data.batch_size
    return {"audio": jnp.asarray(speechlike(size, recipe.num_samples, seed))}


def fitted(trainer: Trainer, audio: jax.Array) -> TrainState:
    state = trainer.init()
    latents = trainer.encode_latents(state, audio).reshape(-1, TINY.hidden_size)
    return trainer.fit_codebooks(state, latents, len(latents))


def run(recipe: Recipe, steps: int, batch=None) -> tuple[Trainer, TrainState, list[dict[str, float]]]:
    trainer = trainer_of(recipe)
    batch = batch or batch_of(recipe)
    state, logs = fitted(trainer, batch["audio"]), []
    for step in range(steps):
        state, values = trainer.step(state, batch, phase=trainer.phase(step))
        logs.append({name: float(value) for name, value in values.items()})
    return trainer, state, logs


@jax.jit
def distance(model: Mimi, audio: jax.Array) -> jax.Array:
    return mel_distance(audio, model(audio).audio_values, TINY.sampling_rate)


SLOW = pytest.mark.slow
WITHOUT = {"waveform": {"losses__mel": 0.0}, "mel": {"losses__waveform": 0.0}, "both": {}}


# With both losses it takes longer: the waveform pulls elsewhere.
@pytest.mark.parametrize(
    ("part", "steps"),
    [pytest.param("waveform", 400, marks=SLOW), ("mel", 300), pytest.param("both", 600, marks=SLOW)],
)
def test_two_clips_are_learned_by_heart(part: str, steps: int):
    options = {"quantizer__dropout": False, "optimizer__max_norm": 1.0, "optimizer__learning_rate": 1e-2}
    # The mel distance, which tells what was learned, is of magnitudes.
    recipe = tiny_recipe(**WITHOUT[part], **options, losses__mel_power=1.0)
    batch = batch_of(recipe)
    trainer, state, _ = run(recipe, steps)
    start = distance(trainer.export(fitted(trainer, batch["audio"])), batch["audio"])
    end = distance(trainer.export(state), batch["audio"])
    audio = np.asarray(batch["audio"])
    spectrum = np.abs(np.fft.rfft(audio))
    phases = np.exp(2j * np.pi * np.random.default_rng(0).random(spectrum.shape))
    stationary = np.fft.irfft(spectrum * phases, n=audio.shape[-1])
    # Without learning when something happens, the model can reach noise with the spectrum of each clip.
    # Without learning which clip it is, it can reach the other clip.
    bounds = {"spectrum": stationary.astype(np.float32), "other clip": audio[::-1]}
    bounds = {name: float(mel_distance(audio, fake, TINY.sampling_rate)) for name, fake in bounds.items()}
    assert end < bounds["spectrum"]
    if part != "waveform":
        assert end < bounds["other clip"] and end < start / 3


def test_phases_and_what_the_discriminator_hears():
    recipe = tiny_recipe(
        losses__adversarial=4.0,
        losses__features=4.0,
        losses__adversarial_start=2,
        discriminator=DiscriminatorRecipe(filters=2, windows=(256, 64), seconds=0.24, head_start=3),
    )
    trainer = trainer_of(recipe)
    phases = [trainer.phase(step) for step in range(6)]
    assert phases == ["reconstruction"] * 2 + ["head start"] * 3 + ["adversarial"]
    state, audio = trainer.init(), batch_of(recipe)["audio"]
    crop = trainer._draw_crop(jax.random.key(0))
    assert crop(audio).shape == (2, 1, 576)
    judge = jax.jit(functools.partial(trainer._judge, crop=crop))
    gradients, _ = judge(state.discriminator, audio, 0.9 * audio)
    heard = np.flatnonzero(np.abs(gradients["adversarial"]).max(axis=(0, 1)))
    assert heard.max() - heard.min() < 576
    start = int(np.flatnonzero(np.asarray(audio)[0, 0] == np.asarray(crop(audio))[0, 0, 0])[0])
    assert start <= heard.min() and heard.max() < start + 576
    before = jax.tree.map(np.asarray, state)
    after, logs = trainer.step(state, {"audio": audio}, phase="head start")
    assert set(logs) == {"loss/discriminator", "discriminator_gradient_norm"}
    changed = {
        field
        for field, old, new in zip(state._fields, before, after, strict=True)
        if any(np.any(x != y) for x, y in zip(jax.tree.leaves(old), jax.tree.leaves(new), strict=True))
    }
    assert changed == {"step", "discriminator", "discriminator_optimizer"}  # the model waits


@SLOW
def test_steps_at_once_are_those_one_after_the_other():
    recipe = tiny_recipe()
    trainer = trainer_of(recipe)
    batches = [batch_of(recipe, seed=seed) for seed in range(2)]
    state, losses = fitted(trainer, batches[0]["audio"]), []
    for batch in batches:
        state, logs = trainer.step(state, batch, phase="reconstruction")
        losses.append(float(logs["loss/mel"]))
    stacked = {"audio": jnp.stack([batch["audio"] for batch in batches])}
    other, logs = trainer.steps(fitted(trainer, batches[0]["audio"]), stacked, phase="reconstruction")
    np.testing.assert_allclose(logs["loss/mel"], losses, rtol=1e-4)
    assert int(other.step) == 2


def test_a_codec_in_bfloat16_has_about_the_same_gradients():
    seen = []
    for precision in ("highest", "bfloat16"):
        recipe = tiny_recipe(precision=precision, quantizer__rate=0.0, losses__mel_floor=1e-2)
        trainer = trainer_of(recipe)
        state, logs = trainer.step(trainer.init(), batch_of(recipe), phase="reconstruction")
        assert {leaf.dtype for leaf in jax.tree.leaves(state.weights)} == {jnp.dtype("float32")}
        seen.append(np.array([logs["loss/mel"], logs["loss/waveform"], logs["gradient_norm"]]))
    np.testing.assert_allclose(seen[1], seen[0], rtol=0.05)
    assert (seen[0] != seen[1]).any()


@SLOW
def test_the_discriminator_learns_too():
    recipe = tiny_recipe(losses__adversarial=4.0, losses__features=4.0, losses__adversarial_start=3)
    trainer, state, logs = run(recipe, 200)
    assert "loss/discriminator" not in logs[2] and "loss/adversarial" not in logs[2]
    assert logs[3]["loss/discriminator"] == pytest.approx(
        2, abs=0.5
    )  # it cannot tell real from generated audio yet
    assert min(log["loss/discriminator"] for log in logs[3:]) < 1.5
    # The running means of norms include early steps, and the features' gradient grows as the discriminator
    # learns.
    shares = {name: np.mean([log[f"share/{name}"] for log in logs[100:]]) for name in trainer.balanced(True)}
    for name, weight in trainer.balanced(True).items():
        assert weight / 10.1 / 2 < shares[name] < weight / 10.1 * 2
    # All weights of the discriminator change.
    before = trainer_of(recipe).init().discriminator
    moved = jax.tree.map(lambda a, b: bool(jnp.any(a != b)), before, state.discriminator)
    assert all(jax.tree.leaves(moved))


@SLOW
def test_shares_are_as_configured_where_gradients_do_not_change():
    recipe = tiny_recipe(
        losses__adversarial=4.0, losses__features=4.0, quantizer__rate=0.0, optimizer__learning_rate=0.0
    )
    trainer, _, logs = run(recipe, 3)
    for name, weight in trainer.balanced(True).items():
        assert logs[-1][f"share/{name}"] == pytest.approx(weight / 10.1, rel=1e-4)


def test_everything_is_trained_and_nothing_shares_memory():
    recipe = tiny_recipe()
    trainer, state, _ = run(recipe, 2)
    before = trainer.init()
    assert [name for name, weight in before.weights.items() if _equal(weight, state.weights[name])] == []
    assert before.weights.keys() == weights_of(trainer.model).keys()
    pairs = {name for name, w in state.weights.items() if isinstance(w, NormalizedKernel)}
    assert pairs == {
        name
        for name in state.weights
        if name.startswith(("encoder.", "decoder.")) and name.endswith("kernel")
    }


def test_a_step_is_compiled_once():
    """Its outputs have the types of its inputs. Weak types would make JAX compile it again."""
    recipe = tiny_recipe(losses__adversarial=4.0, losses__features=4.0)
    trainer = trainer_of(recipe)
    state, batch = trainer.init(), batch_of(recipe)
    new, _ = jax.eval_shape(functools.partial(trainer.step, phase="adversarial"), state, batch)
    assert _types(new) == _types(state)


def _types(tree) -> list[tuple]:
    return [
        (jax.tree_util.keystr(path), leaf.shape, leaf.dtype, leaf.weak_type)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    ]


def _equal(a, b) -> bool:
    return all(jax.tree.leaves(jax.tree.map(lambda x, y: bool(jnp.all(x == y)), a, b)))


def test_only_transformers_decay():
    recipe = tiny_recipe()
    trainer = trainer_of(recipe)
    state = trainer.init()
    still = jax.tree.map(jnp.zeros_like, state.weights)
    with jax.numpy_dtype_promotion("standard"):  # optax raises floats to integer powers
        updates: Any = jax.jit(trainer.optimizer.update)(still, state.optimizer, state.weights)[0]
    assert updates.keys() == state.weights.keys()
    for name, update in updates.items():
        rate = recipe.optimizer.learning_rate * recipe.optimizer.weight_decay
        rate = rate if name.startswith(("encoder_transformer.", "decoder_transformer.")) else 0
        expected = jax.tree.map(lambda weight, rate=rate: -rate * weight, state.weights[name])
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-12), update, expected)


@pytest.mark.parametrize("adversarial", [0.0, pytest.param(4.0, marks=SLOW)])
def test_devices_share_a_batch(adversarial: float):
    weights = {"losses__adversarial": adversarial, "losses__features": adversarial}
    # With larger steps, Adam turns the rounding of gradients near zero into visible differences.
    recipe = tiny_recipe(data__batch_size=8, optimizer__learning_rate=1e-4, **weights)
    # With the lowest floor, logarithms of near silence would show the rounding of sums.
    recipe = dataclasses.replace(recipe, losses=dataclasses.replace(recipe.losses, mel_floor=1e-2))
    trainer = trainer_of(recipe)
    batch = batch_of(recipe)
    traces = []
    for count in (1, 8):
        mesh = Mesh(np.array(jax.devices()[:count]), ("data",))
        rows, whole = NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())
        state = jax.device_put(fitted(trainer, batch["audio"]), whole)
        sharded = jax.device_put(batch, rows)
        logs = []
        for step in range(3):
            state, values = trainer.step(state, sharded, phase=trainer.phase(step))
            logs.append({name: float(value) for name, value in values.items()})
        traces.append(logs)
        assert state.weights["upsample.kernel"].sharding.is_fully_replicated
    for one, eight in zip(*traces, strict=True):
        assert one.keys() == eight.keys()
        for name, value in one.items():
            assert eight[name] == pytest.approx(value, rel=5e-4, abs=1e-5), name


def test_the_average_is_not_biased_by_its_start():
    recipe = tiny_recipe()
    trainer = trainer_of(recipe)
    batch = batch_of(recipe)
    state, seen = fitted(trainer, batch["audio"]), []
    for _ in range(3):
        state, _ = trainer.step(state, batch, phase="reconstruction")
        seen.append(np.asarray(state.weights["upsample.kernel"]))
    decay = recipe.optimizer.ema_decay
    weights = np.array([decay**2, decay, 1])
    expected = np.tensordot(weights / weights.sum(), seen, axes=1)
    np.testing.assert_allclose(state.average.weights["upsample.kernel"], expected, rtol=1e-5, atol=1e-7)


def test_training_the_decoder_changes_no_code(tmp_path):
    trainer, state, _ = run(tiny_recipe(), 5)
    trainer.export(state).save_pretrained(tmp_path / "model")
    before = Mimi.from_pretrained(tmp_path / "model")
    recipe = tiny_recipe(mode="decoder", init=str(tmp_path / "model"))
    trainer = trainer_of(recipe)
    batch = batch_of(recipe)
    state, first = trainer.init(), None
    for _ in range(60):
        state, logs = trainer.step(state, batch, phase="reconstruction")
        first = first or {name: float(value) for name, value in logs.items()}
    assert first is not None
    assert logs["loss/mel"] < 0.8 * first["loss/mel"]
    trainer.export(state).save_pretrained(tmp_path / "tuned")
    after = Mimi.from_pretrained(tmp_path / "tuned")
    assert checkpoint.model_id(after) == checkpoint.model_id(before)
    for seed in range(5):
        audio = batch_of(recipe, 4, seed)["audio"]
        codes = mimi_jax.encode(before, audio).audio_codes
        np.testing.assert_array_equal(codes, mimi_jax.encode(after, audio).audio_codes)
        np.testing.assert_array_equal(before.dequantize(codes), after.dequantize(codes))
    old, new = weights_of(before), weights_of(after)
    moved = {name.split(".")[0] for name in old if not np.array_equal(old[name], new[name])}
    assert moved == {"upsample", "decoder_transformer", "decoder"}


def test_features_of_another_teacher_are_refused():
    recipe = tiny_recipe(losses__distillation=1.0, teacher_dim=6)
    trainer = trainer_of(recipe)
    batch = batch_of(recipe) | {"features": jnp.zeros((2, 4, 5))}
    with pytest.raises(ValueError, match="teacher_dim must be the channels of the features, 5, got 6"):
        trainer.step(trainer.init(), batch, phase="reconstruction")


@SLOW
def test_distillation_teaches_the_semantic_codebook():
    recipe = tiny_recipe(losses__distillation=1.0, teacher_dim=6)
    steps = recipe.num_samples // TINY.frame_size * 4
    rng = np.random.default_rng(0)
    # The features are constant over each frame.
    features = np.repeat(rng.standard_normal((2, steps // 4, 6)), 4, axis=1).astype(np.float32)
    batch = batch_of(recipe) | {"features": jnp.asarray(features)}
    trainer, state, logs = run(recipe, 150, batch)
    assert logs[-1]["loss/distillation"] < 0.6 * logs[0]["loss/distillation"]
    # The projection belongs to the trainer and is not exported.
    assert not any(name.startswith("teacher") for name in weights_of(trainer.export(state)))


@functools.cache
def drawn(**changes) -> tuple[list[int], np.ndarray]:
    recipe = tiny_recipe(**changes)
    trainer = trainer_of(recipe)
    counts, rows = [], []
    for seed in range(200):
        count, is_quantized, *_ = trainer._draw(jax.random.key(seed), 4)
        counts.append(int(count))
        rows.append([np.asarray(is_quantized[name]) for name in ("semantic", "acoustic")])
    return counts, np.array(rows)


def test_quantizer_dropout_keeps_the_semantic_codebook():
    counts, rows = drawn()
    assert set(counts) == {2, 3, 4}
    assert set(drawn(quantizer__dropout=False)[0]) == {4}
    assert 0.45 < rows.mean() < 0.55
    np.testing.assert_array_equal(rows[:, 0], rows[:, 1])
    apart = drawn(quantizer__same=False)[1]
    assert 0.3 < (apart[:, 0] != apart[:, 1]).mean() < 0.7
    assert drawn(quantizer__rate=1.0)[1].all()
