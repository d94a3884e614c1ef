"""SEANet stages in Triton beside the layers that they replace.

Triton's interpreter runs the device kernels on a CPU. It has no products in bfloat16, so the numbers are
float16.
"""

import importlib.util
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mimi_jax.config import MimiConfig
from mimi_jax.nn.conv import Conv1d
from mimi_jax.nn.seanet import DecoderBack, DecoderStage, EncoderFront, EncoderStage
from mimi_jax.nn.streaming import Chain
from mimi_jax.ops import policy, triton_stages
from tests.models import check_step, noise, random_like, random_module

if importlib.util.find_spec("triton") is None:
    pytest.skip("needs triton", allow_module_level=True)
if jax.default_backend() == "gpu":  # there, other tests of this process compile device kernels
    pytest.skip("Triton's interpreter is for machines without a GPU", allow_module_level=True)
os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported; what compiles with it needs another process

BATCH = 3  # one row ends early, and one is idle
TOLERANCE = 2e-3  # float16 rounds by 5e-4, and each layer's result is rounded


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
        patch.setattr(triton_stages, "ENCODER_FRONT", {False: tile})
        patch.setattr(triton_stages, "DECODER_BACK", {False: tile})
        yield


class Case(NamedTuple):
    """A part of the network that Triton computes."""

    operation: str
    channels: int  # of the residual block
    ratio: int
    fields: dict[str, Any] = {}  # noqa: RUF012


CASES = {
    "encoder stage": Case("encoder_stage", 128, 5),
    "encoder stage, few channels": Case("encoder_stage", 32, 4),
    "encoder stage, large ratio": Case("encoder_stage", 64, 8),
    "encoder stage, long kernel": Case("encoder_stage", 32, 6, {"residual_kernel_size": 5}),
    "encoder stage, kernel of two": Case("encoder_stage", 32, 2, {"residual_kernel_size": 2}),
    "encoder front": Case("encoder_front", 64, 4),
    "encoder front, few channels": Case("encoder_front", 32, 5, {"kernel_size": 3}),
    "encoder front, ratio of two": Case("encoder_front", 32, 2, {"kernel_size": 16}),
    "decoder stage": Case("decoder_stage", 128, 6),
    "decoder stage, long kernel": Case("decoder_stage", 32, 3, {"residual_kernel_size": 4}),
    "decoder back": Case("decoder_back", 64, 4),
    "decoder back, few channels": Case("decoder_back", 32, 5),
    "decoder back, ratio of two": Case("decoder_back", 32, 2),
}


def make_part(case: Case) -> Chain:
    config, (operation, channels, ratio, _) = MimiConfig(**case.fields), case

    def build(rngs: nnx.Rngs) -> Chain:
        if operation.startswith("encoder"):
            stage = EncoderStage(config, channels, ratio, rngs=rngs)
            first = Conv1d(1, channels, config.kernel_size, rngs=rngs)
            ends = EncoderFront(first, stage, inputs_per_step=1)
        else:
            stage = DecoderStage(config, 2 * channels, ratio, rngs=rngs)
            last = Conv1d(channels, 1, config.last_kernel_size, activation=policy.elu, rngs=rngs)
            ends = DecoderBack(stage, last, inputs_per_step=1)
        return stage if operation == stage.operation else ends

    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float16), random_module(build))


def inputs(part: Chain, case: Case, strides: int) -> jax.Array:
    """[BATCH, time, channels], for so many positions of the lower rate."""
    channels = jax.tree.leaves(part.init_state(1))[0].shape[-1]
    time = strides * case.ratio if case.operation.startswith("encoder") else strides
    return jnp.asarray(noise(BATCH, time, channels), jnp.float16)


def step_fused(part: Chain, state: Any, x: jax.Array, lengths: jax.Array | None = None):
    return triton_stages.step(part, state, x, lengths, capability=None)


def compare(part: Chain, x: jax.Array, state: Any, lengths: jax.Array | None = None) -> None:
    """One step, and the state after it."""
    check_step(step_fused, part, state, x, lengths, TOLERANCE)


def test_one_block_is_tried_before_triton_is_chosen(monkeypatch: pytest.MonkeyPatch):
    triton_stages.run_one_block(None)
    jax.eval_shape(lambda: triton_stages.run_one_block(None))  # also while something is traced
    monkeypatch.setattr(triton_stages, "_block", lambda *arguments: [2 * arguments[4]])
    with pytest.raises(RuntimeError, match="gave wrong numbers"):
        triton_stages.run_one_block(None)


@pytest.mark.parametrize("name", CASES)
def test_the_numbers_are_those_of_the_layers(name: str):
    case = CASES[name]
    part = make_part(case)
    x = inputs(part, case, 17)  # two tiles, the second of them not full
    state = random_like(part.init_state(BATCH, jnp.float16), 1)
    compare(part, x, state)
    compare(part, x, state, jnp.array([x.shape[1], x.shape[1] // 2 + 1, 0], jnp.int32))


@pytest.mark.parametrize("name", [name for name in CASES if "," not in name])
def test_streams_give_the_numbers_of_whole_clips(name: str):
    case = CASES[name]
    part = make_part(case)
    x = inputs(part, case, 5)
    _, expected = step_fused(part, None, x)
    state, parts, size = part.init_state(BATCH, jnp.float16), [], x.shape[1] // 5
    for start in range(0, x.shape[1], size):
        state, y = step_fused(part, state, x[:, start : start + size])
        parts.append(np.asarray(y))
    # A row stands elsewhere in its tile. On some CPUs, NumPy's product of a row depends on where it stands.
    np.testing.assert_allclose(np.concatenate(parts, axis=1), expected, rtol=TOLERANCE, atol=TOLERANCE)
