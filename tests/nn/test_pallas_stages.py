"""The ends of the network in one device kernel beside the layers. An interpreter runs the kernel on a CPU."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mimi_jax.config import MimiConfig
from mimi_jax.nn import pallas_stages
from mimi_jax.nn.conv import Conv1d
from mimi_jax.nn.seanet import DecoderBack, DecoderStage, EncoderFront, EncoderStage
from mimi_jax.ops import policy
from tests.models import check_step, noise, random_like, random_module, relative_error

BATCH = 11  # a register holds 8. One row ends early, and one is idle
TOLERANCE = 1e-6  # other orders of sums
CASES = {
    "encoder": {},
    "decoder": {},
    "encoder, other kernels": {"residual_kernel_size": 6, "kernel_size": 3},
    "decoder, long kernels": {"residual_kernel_size": 6, "last_kernel_size": 5},
}


def make_end(name: str, channels: int = 16, ratio: int = 4) -> Any:
    config = MimiConfig(**CASES[name])

    def build(rngs: nnx.Rngs) -> Any:
        if name.startswith("encoder"):
            first = Conv1d(1, channels, config.kernel_size, rngs=rngs)
            return EncoderFront(first, EncoderStage(config, channels, ratio, rngs=rngs), inputs_per_step=1)
        last = Conv1d(channels, 1, config.last_kernel_size, activation=policy.elu, rngs=rngs)
        return DecoderBack(DecoderStage(config, 2 * channels, ratio, rngs=rngs), last, inputs_per_step=1)

    return random_module(build)


def make_input(end: Any, rows: int) -> jax.Array:
    is_encoder = end.operation == "encoder_front"
    shape = (BATCH, 4 * rows, 1) if is_encoder else (BATCH, rows, 32)
    return jnp.asarray(noise(*shape))


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pallas_stages, "MOST_ROWS", 16)


slow = pytest.mark.slow


@pytest.mark.parametrize("name", [pytest.param(name, marks=slow if "," in name else ()) for name in CASES])
def test_the_numbers_are_those_of_the_layers(name: str):
    end = make_end(name)
    x = make_input(end, 48)  # three tiles
    state = random_like(end.init_state(BATCH), 1)
    fused = jax.jit(pallas_stages.step)
    for lengths in (None, jnp.array([x.shape[1]] * 9 + [x.shape[1] // 2 + 1, 0], jnp.int32)):
        check_step(fused, end, state, x, lengths, TOLERANCE)


@pytest.mark.parametrize(
    "name", ["decoder", *[pytest.param(name, marks=slow) for name in CASES if name != "decoder"]]
)
def test_half_precision_is_as_exact_as_that_of_the_layers(name: str):
    end = make_end(name)
    x = make_input(end, 48)
    whole = jax.jit(lambda end, x: end(x))
    exact = whole(end, x)
    end, x = jax.tree.map(lambda leaf: leaf.astype("bfloat16"), (end, x))
    y = jax.jit(pallas_stages.step)(end, None, x, None)[1]
    assert y.dtype == jnp.bfloat16
    assert relative_error(y, exact) < 1.2 * relative_error(whole(end, x), exact)


@pytest.mark.parametrize("name", ["encoder", "decoder"])
def test_streams_give_the_numbers_of_whole_clips(name: str):
    end = make_end(name)
    x = make_input(end, 24)
    fused = jax.jit(pallas_stages.step)
    _, expected = fused(end, None, x, None)
    state, parts, size = end.init_state(BATCH), [], x.shape[1] // 3
    for start in range(0, x.shape[1], size):
        state, y = fused(end, state, x[:, start : start + size], None)
        parts.append(y)
    np.testing.assert_allclose(np.concatenate(parts, axis=1), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [pytest.param("encoder", marks=slow), "decoder"])
def test_gradients_and_vmap_are_those_of_the_layers(name: str):
    end = make_end(name)
    x = make_input(end, 16)

    def loss(end: Any, x: jax.Array) -> jax.Array:
        return jnp.sum(end.step(end.init_state(len(x)), x)[1] ** 2)

    def results() -> list[jax.Array]:
        each = jax.jit(jax.vmap(lambda x: end.step(end.init_state(len(x)), x)[1]))(jnp.stack([x, -x]))
        return [each, *jax.tree.leaves(jax.jit(jax.grad(loss, (0, 1)))(end, x))]

    expected = results()
    with policy.computing(policy.resolve({end.operation: "pallas"})):
        for ours, theirs in zip(results(), expected, strict=True):
            assert relative_error(ours, theirs) < 1e-5


def test_what_the_device_kernel_cannot_compute_is_refused():
    end = make_end("encoder")
    with pytest.raises(ValueError, match=r"whole groups of 8 strides, got an input of shape \(3, 60, 1\)"):
        pallas_stages.step(end, None, jnp.zeros((3, 60, 1)), None)
