"""SEANet stages in Triton beside the layers that they replace.

Triton's interpreter runs the device kernels on a CPU. It has no products in bfloat16, so the numbers are
float16.
"""

import importlib.util
import os
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mimi_jax.config import MimiConfig
from mimi_jax.nn.seanet import DecoderStage, EncoderStage
from mimi_jax.ops import triton_stages
from tests.models import noise, random_like, random_module, relative_error

if importlib.util.find_spec("triton") is None:
    pytest.skip("needs triton", allow_module_level=True)
os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported; what compiles with it needs another process

BATCH = 3
TOLERANCE = 2e-3  # float16 rounds by 5e-4, and each layer's result is rounded
CONFIG = MimiConfig()
Stage = EncoderStage | DecoderStage


class HostTensor:
    """An array of NumPy with what the interpreter asks of a tensor of torch."""

    def __init__(self, array: np.ndarray):
        self.array = array

    @property
    def dtype(self) -> np.dtype:
        return self.array.dtype

    def data_ptr(self) -> int:
        return self.array.ctypes.data

    def untyped_storage(self) -> "HostTensor":
        return self

    cpu = untyped_storage

    def new_empty(self, *_: Any, **__: Any) -> "HostTensor":
        return HostTensor(np.empty(0, self.dtype))

    def set_(self, storage: "HostTensor", *_: Any) -> None:
        self.array = storage.array

    def copy_(self, _: "HostTensor") -> None:
        """The interpreter wrote into the same memory."""

    def size(self) -> tuple[int, ...]:
        return self.array.shape

    storage_offset = stride = size


@pytest.fixture(autouse=True, scope="module")
def interpreter() -> Iterator[None]:
    """Calls of device kernels run in the interpreter."""
    from mimi_jax.ops import triton_kernels

    with pytest.MonkeyPatch.context() as patch:

        def call(kernel, _, *arrays, outputs, tile, programs, **sizes):
            def run(*arrays: jax.Array) -> list[np.ndarray]:
                inputs = [np.array(array) for array in arrays]
                results = [np.full(shape, np.nan, inputs[0].dtype) for shape in outputs]
                tensors = map(HostTensor, (*inputs, *results))
                getattr(triton_kernels, kernel)[programs, len(inputs[0])](*tensors, ROWS=tile.rows, **sizes)
                return results

            shapes = [jax.ShapeDtypeStruct(shape, arrays[0].dtype) for shape in outputs]
            return jax.pure_callback(run, shapes, *arrays)

        patch.setattr(triton_stages, "call", call)
        tile = triton_stages.Tile(16, 4)
        patch.setattr(triton_stages, "BLOCKS", {})
        patch.setattr(triton_stages, "OTHER_BLOCKS", tile)
        patch.setattr(triton_stages, "ENCODER_STAGE", {False: tile})
        patch.setattr(triton_stages, "DECODER_STAGE", {False: tile})
        yield


def make_stage(kind: type[Stage], config: MimiConfig, channels: int, ratio: int) -> Stage:
    stage = random_module(lambda rngs: kind(config, channels, ratio, rngs=rngs))
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float16), stage)


def step_fused(stage: Stage, state: Any, x: jax.Array, lengths: jax.Array | None):
    return triton_stages.step(stage, state, x, lengths, capability=None)


def compare(stage: Stage, x: jax.Array, state: Any, lengths: jax.Array | None = None) -> None:
    """One step, and the state after it."""
    expected_state, expected = stage.step_layers(state, x, lengths)
    new_state, y = step_fused(stage, state, x, lengths)
    assert jax.tree.structure(new_state) == jax.tree.structure(expected_state)
    real = np.full(len(x), y.shape[1])
    if lengths is not None:
        real = np.asarray(stage.output_lengths(lengths))
    mask = np.arange(y.shape[1])[None, :] < real[:, None]
    assert y.dtype == expected.dtype and y.shape == expected.shape
    assert relative_error(np.asarray(y, np.float32)[mask], np.asarray(expected, np.float32)[mask]) < TOLERANCE
    for ours, theirs in zip(jax.tree.leaves(new_state), jax.tree.leaves(expected_state), strict=True):
        assert ours.dtype == theirs.dtype
        assert relative_error(np.asarray(ours, np.float32), np.asarray(theirs, np.float32)) < TOLERANCE


def inputs(channels: int, time: int) -> jax.Array:
    return jnp.asarray(noise(BATCH, time, channels), jnp.float16)


CASES = {
    "encoder, one kernel": (EncoderStage, 64, 4, {}),
    "encoder, one kernel, other ratio": (EncoderStage, 32, 5, {}),
    "encoder, block alone": (EncoderStage, 128, 5, {}),
    "encoder, block alone, other ratio": (EncoderStage, 128, 8, {}),
    "encoder, long kernel": (EncoderStage, 32, 6, {"residual_kernel_size": 5}),
    "encoder, kernel of two": (EncoderStage, 32, 2, {"residual_kernel_size": 2}),
    "decoder, one kernel": (DecoderStage, 128, 4, {}),
    "decoder, one kernel, other ratio": (DecoderStage, 64, 5, {}),
    "decoder, one kernel, ratio of two": (DecoderStage, 64, 2, {}),
    "decoder, block alone": (DecoderStage, 256, 6, {}),
    "decoder, long kernel": (DecoderStage, 64, 3, {"residual_kernel_size": 4}),
}


@pytest.mark.parametrize("case", CASES)
def test_the_numbers_are_those_of_the_layers(case: str):
    kind, channels, ratio, fields = CASES[case]
    stage = make_stage(kind, MimiConfig(**fields), channels, ratio)
    strides = 19 if kind is EncoderStage else 21
    x = inputs(channels, strides * (ratio if kind is EncoderStage else 1))  # several tiles, none of them full
    fresh = stage.init_state(BATCH, jnp.float16)
    compare(stage, x, fresh)
    running = jax.tree.map(jnp.asarray, random_like(fresh, 1))
    compare(stage, x, running)
    compare(stage, x, running, jnp.array([x.shape[1], x.shape[1] // 2 + 1, 0], jnp.int32))


@pytest.mark.parametrize("case", ["encoder, one kernel", "encoder, block alone", "decoder, one kernel"])
def test_streams_give_the_numbers_of_whole_clips(case: str):
    kind, channels, ratio, fields = CASES[case]
    stage = make_stage(kind, MimiConfig(**fields), channels, ratio)
    x = inputs(channels, 5 * ratio)
    _, expected = step_fused(stage, None, x, None)
    state, parts = None, []
    for start in range(0, x.shape[1], ratio):
        state, y = step_fused(stage, state, x[:, start : start + ratio], None)
        parts.append(np.asarray(y))
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), np.asarray(expected))
