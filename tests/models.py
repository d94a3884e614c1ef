"""Tiny models for tests: the fixtures, with what the references compute from them, and random layers."""

import functools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
from flax import nnx
from numpy.typing import ArrayLike

from benchmarks.inputs import SAMPLE, random_model
from mimi_jax import checkpoint, load_audio
from mimi_jax.config import MimiConfig
from mimi_jax.model import Mimi

FIXTURES = Path(__file__).parent / "fixtures"
WIDE = FIXTURES / "wide.npz"
SMALLEST_GAP = 1e-5  # of two distances that rounding cannot tell apart, in units of the vector's norm

Tree = TypeVar("Tree")


class Clip(NamedTuple):
    """Audio and what the reference makes of it, as `tests/fixtures/make.py` describes them."""

    audio: np.ndarray  # [batch, channels, samples]
    latents: np.ndarray  # [batch, frames, hidden_size]
    audio_codes: np.ndarray  # [batch, codebooks, frames]
    audio_values: np.ndarray  # [batch, channels, frames * frame_size]


class Fixture(NamedTuple):
    model: Mimi
    clips: list[Clip]


def fixture_names() -> list[str]:
    return sorted(path.stem for path in FIXTURES.glob("*.safetensors"))


@functools.cache
def load_fixture(name: str) -> Fixture:
    with safetensors.safe_open(FIXTURES / f"{name}.safetensors", framework="np") as file:
        config = MimiConfig.from_dict(json.loads(file.metadata()["config"]))
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    prefix = "weights/"
    weights = {key.removeprefix(prefix): tensors[key] for key in tensors if key.startswith(prefix)}
    model = checkpoint.abstract_model(config)
    model = checkpoint.fill(model, checkpoint.read_tensors(weights, model, name), None)
    indices = sorted(key.split("/")[1] for key in tensors if key.startswith("audio/"))
    return Fixture(model, [Clip(*(tensors[f"{field}/{i}"] for field in Clip._fields)) for i in indices])


@functools.cache
def wide_model() -> Mimi:
    """Layers of the published sizes, but one Transformer layer and 8 codebooks: the model of `WIDE`."""
    return random_model(MimiConfig(num_hidden_layers=1, num_quantizers=8))


def wide_audio() -> np.ndarray:
    """Two clips of five frames of speech, float32 [2, 1, samples]."""
    return load_audio(SAMPLE)[0, 24_000 : 24_000 + 2 * 9600].reshape(2, 1, 9600)


def wide_sum(model: Mimi) -> float:
    return sum(float(np.abs(np.asarray(leaf, np.float64)).sum()) for leaf in jax.tree.leaves(model))


def load_wide() -> dict[str, np.ndarray]:
    """The results in `WIDE`, as `tests/fixtures/wide.py` describes them."""
    with np.load(WIDE) as file:
        results = dict(file)
    # NumPy promises the same random numbers for the same seed, but not for all time.
    np.testing.assert_allclose(wide_sum(wide_model()), results["weights"], rtol=1e-9)
    return results


def check_wide(latents: ArrayLike, codes: ArrayLike, audio_values: ArrayLike) -> None:
    """Compare what a device computes of `wide_audio` in float32 with what is stored."""
    stored = load_wide()
    assert relative_error(latents, stored["latents"]) < 1e-5
    for row in range(2):
        expected = stored["audio_codes"][row]
        check_ties(wide_model(), stored["latents"][row], np.asarray(codes)[row], expected)
    assert relative_error(audio_values, stored["audio_values"]) < 1e-5


def random_like(tree: Tree, seed: int) -> Tree:
    """Arrays of the same shapes; NumPy draws them, so that nothing compiles."""
    generator = np.random.default_rng(seed)

    def draw(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        fan_in = math.prod(leaf.shape[:-1])
        return jnp.asarray(generator.normal(0, fan_in**-0.5, leaf.shape), leaf.dtype)

    return jax.tree.map(draw, tree)


def random_module(build: Callable[[nnx.Rngs], Tree]) -> Tree:
    """A module whose every parameter is random and matters."""
    return random_like(jax.eval_shape(lambda: build(nnx.Rngs(0))), seed=0)


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def relative_error(actual: ArrayLike, expected: ArrayLike) -> float:
    """The L2 norm of the difference, in units of that of `expected`."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


def check_step(step: Callable, part: Any, state: Any, x: jax.Array, lengths: Any, tolerance: float) -> None:
    """A way to step a part of the network, beside its layers: the real outputs, and the state after them."""
    layers = jax.jit(lambda part, *inputs: part.step_layers(*inputs))  # anew: its policy is the current one
    expected_state, expected = layers(part, state, x, lengths)
    new_state, y = step(part, state, x, lengths)
    assert jax.tree.structure(new_state) == jax.tree.structure(expected_state)
    assert y.dtype == expected.dtype and y.shape == expected.shape
    ends = part.output_lengths(jnp.full(len(x), x.shape[1], jnp.int32) if lengths is None else lengths)
    for row, size in enumerate(np.asarray(ends)):
        if size:
            assert relative_error(y[row, :size], expected[row, :size]) < tolerance
    for ours, theirs in zip(jax.tree.leaves(new_state), jax.tree.leaves(expected_state), strict=True):
        assert ours.dtype == theirs.dtype
        assert relative_error(ours, theirs) < tolerance


def check_ties(model: Mimi, latents: np.ndarray, actual: np.ndarray, expected: np.ndarray) -> None:
    """Allow a code to differ where two entries are equally near but for rounding, and those that follow it.

    Args:
        model: the model that the codes are of.
        latents: [frames, hidden_size].
        actual, expected: int [codebooks, frames].
    """
    levels = model.quantizer.num_semantic
    for half, rows in (
        (model.quantizer.semantic, slice(levels)),
        (model.quantizer.acoustic, slice(levels, None)),
    ):
        assert half.input_proj is not None
        left = latents.astype(np.float64) @ np.asarray(half.input_proj.kernel)
        norm = np.linalg.norm(left, axis=1)
        tied = np.zeros(len(latents), bool)
        for entries, got, wanted in zip(
            np.asarray(half.embedding), actual[rows], expected[rows], strict=False
        ):
            gap = np.linalg.norm(left - entries[got], axis=1) - np.linalg.norm(left - entries[wanted], axis=1)
            assert (tied | (np.abs(gap) < SMALLEST_GAP * norm)).all()
            tied |= got != wanted
            left -= entries[wanted]
