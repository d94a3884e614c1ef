"""Int8 weights: kernels take a quarter of the bytes, on disk and in memory; the computation stays in floats.

Each kernel of the encoder half, of the decoder half or of both becomes int8 values and one scale for each
output channel, symmetric, rounded by `qwix`. A layer that reads its kernel gets values times scales, inside
`jit` too. Biases, norms and LayerScales stay as they are, and so does the quantizer, because it defines what
the codes mean. `qwix` is needed only to make int8 weights, not to load or run them.

How they are stored is in `mimi_jax.checkpoint.layouts.int8`.
"""

import functools
from collections.abc import Callable
from types import EllipsisType, ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from mimi_jax.model import HALVES, Mimi

# The values of `from_pretrained(..., weights=...)`, and the halves whose kernels are int8.
WEIGHTS = {
    "int8": ("encoder", "decoder"),
    "int8-encoder": ("encoder",),
    "int8-decoder": ("decoder",),
}
# The axes of a kernel that hold its output channels, by the kernel's number of axes: 2 in a linear layer, 3
# in a convolution, 5 in a transposed convolution.
OUTPUT_AXES = {2: (1,), 3: (2,), 5: (1, 4)}


class Int8(NamedTuple):
    """A kernel that equals `values * scales`."""

    values: Any  # int8, in the kernel's shape
    scales: Any  # floating point; every axis has length 1 but those of the output channels

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype that the kernel is computed in."""
        return self.scales.dtype

    def astype(self, dtype: DTypeLike) -> "Int8":
        return Int8(self.values, self.scales.astype(dtype))


class Int8Param(nnx.Param):
    """A parameter that holds an `Int8`; a layer that reads it gets the product."""

    def get_value(self, *, index: Any = ...) -> jax.Array:
        values, scales = self.get_raw_value()
        kernel = values.astype(scales.dtype) * scales
        return kernel if isinstance(index, EllipsisType) else kernel[index]


def to_int8(model: Mimi, weights: str = "int8") -> Mimi:
    """The same model with int8 kernels. Kernels that are int8 already stay as they are.

    Args:
        weights: a name in `WEIGHTS`.

    Raises:
        ValueError: `weights` is another name, or names only a half that the model does not have.
        ImportError: `qwix` is not installed.
    """
    check_weights(model, weights)

    def replace(kernel: nnx.Param) -> nnx.Param:
        return kernel if isinstance(kernel, Int8Param) else Int8Param(_round(kernel[...], _import_qwix()))

    return _with_kernels(model, weights, replace)


def _import_qwix() -> ModuleType:
    try:
        import qwix
    except ImportError:
        raise ImportError("int8 weights are made by qwix; install it: pip install 'mimi_jax[int8]'") from None
    return qwix


@functools.partial(jax.jit, static_argnames="qwix")
def _round(kernel: jax.Array, qwix: ModuleType) -> Int8:
    axes = OUTPUT_AXES[kernel.ndim]
    array = qwix.quantize(kernel.astype(jnp.float32), jnp.int8, channelwise_axes=axes)
    return Int8(array.qvalue, array.scale.astype(kernel.dtype))


def abstract_int8(model: Mimi, weights: str) -> Mimi:
    """As `to_int8`, for a model whose parameters have shapes but no values yet."""

    def replace(kernel: nnx.Param) -> nnx.Param:
        axes, shape = OUTPUT_AXES[len(kernel.shape)], kernel.shape
        scales = tuple(size if axis in axes else 1 for axis, size in enumerate(shape))
        return Int8Param(
            Int8(jax.ShapeDtypeStruct(shape, jnp.int8), jax.ShapeDtypeStruct(scales, jnp.float32))
        )

    return _with_kernels(model, weights, replace)


def to_float(model: Mimi) -> Mimi:
    """The same model with floating-point kernels, equal to what its layers read now."""
    return _with_kernels(model, "int8", lambda kernel: nnx.Param(kernel[...]))


def _with_kernels(model: Mimi, weights: str, replace: Callable[[nnx.Param], nnx.Param]) -> Mimi:
    model = nnx.clone(model)
    for half in halves_of(model, weights):
        for part in HALVES[half]:
            layers: list[Any] = [layer for _, layer in nnx.iter_modules(getattr(model, part))]
            for layer in layers:
                if hasattr(layer, "kernel"):
                    layer.kernel = replace(layer.kernel)
    return model


def check_weights(model: Mimi, weights: str) -> None:
    """Refuse an unknown name, and the name of a half that the model does not have."""
    if weights not in tuple(WEIGHTS):
        raise ValueError(f"weights must be one of {', '.join(WEIGHTS)}, got {weights!r}")
    if not halves_of(model, weights):
        raise ValueError(f"weights={weights!r} needs a half that this model does not have; leave it out")


def halves_of(model: Mimi, weights: str) -> list[str]:
    """The halves of `model` that `weights` makes int8; half a model has only one of them."""
    return [half for half in WEIGHTS[weights] if getattr(model, half) is not None]


def weights_of(model: Mimi) -> str | None:
    """Which weights of a model are int8: a name in `WEIGHTS`, or None where all are floating point."""
    present = halves_of(model, "int8")
    halves = [half for half in present if isinstance(getattr(model, half).first.kernel, Int8Param)]
    return next((name for name in WEIGHTS if halves and halves_of(model, name) == halves), None)
