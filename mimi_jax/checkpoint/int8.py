"""Int8 weights: a quarter of the kernels' bytes on disk and in memory; what is computed stays floating point.

Each kernel of the encoder half, of the decoder half or of both is int8 values and a scale for each output
channel, symmetric, as `qwix` rounds them. A layer that reads its kernel gets their product, inside `jit`
too. Biases, norms and LayerScales stay as they are, and so does the quantizer, which gives codes their
meaning. Only `quantize` needs `qwix`.
"""

import functools
from collections.abc import Callable
from types import EllipsisType, ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from mimi_jax.model import Mimi

# The names of `from_pretrained(..., quantization=...)`, and the halves whose kernels are int8.
QUANTIZATIONS = {
    "int8": ("encoder", "decoder"),
    "int8-encoder": ("encoder",),
    "int8-decoder": ("decoder",),
}
PARTS = {
    "encoder": ("encoder", "encoder_transformer", "downsample"),
    "decoder": ("upsample", "decoder_transformer", "decoder"),
}
# By the number of a kernel's axes, those of its output channels: of products, convolutions and transposed
# convolutions.
OUTPUT_AXES = {2: (1,), 3: (2,), 5: (1, 4)}


class Int8(NamedTuple):
    """A kernel that is `values * scales`."""

    values: Any  # int8, in the kernel's shape
    scales: Any  # floating point, 1 long on all axes but those of the output channels

    @property
    def dtype(self) -> jnp.dtype:
        """What the kernel is computed with in."""
        return self.scales.dtype

    def astype(self, dtype: DTypeLike) -> "Int8":
        return Int8(self.values, self.scales.astype(dtype))


class Int8Param(nnx.Param):
    """Stands in a layer for the parameter whose `Int8` it holds: what is read is the product."""

    def get_value(self, *, index: Any = ...) -> jax.Array:
        values, scales = self.get_raw_value()
        kernel = values.astype(scales.dtype) * scales
        return kernel if isinstance(index, EllipsisType) else kernel[index]


def quantize(model: Mimi, quantization: str = "int8") -> Mimi:
    """The same model with int8 kernels; those that are int8 already stay as they are.

    Args:
        quantization: a name in `QUANTIZATIONS`.

    Raises:
        ValueError: for another name, or that of a half which the model lacks.
        ImportError: `qwix` is not installed.
    """
    check_quantization(model, quantization)
    try:
        import qwix
    except ImportError:
        raise ImportError("int8 weights are made by qwix; pip install 'mimi_jax[int8]'") from None

    def replace(kernel: nnx.Param) -> nnx.Param:
        return kernel if isinstance(kernel, Int8Param) else Int8Param(_to_int8(kernel[...], qwix))

    return _with_kernels(model, quantization, replace)


@functools.partial(jax.jit, static_argnames="qwix")
def _to_int8(kernel: jax.Array, qwix: ModuleType) -> Int8:
    axes = OUTPUT_AXES[kernel.ndim]
    array = qwix.quantize(kernel.astype(jnp.float32), jnp.int8, channelwise_axes=axes)
    return Int8(array.qvalue, array.scale.astype(kernel.dtype))


def quantize_abstract(model: Mimi, quantization: str) -> Mimi:
    """A model whose parameters have shapes but no values yet, as `quantize` would leave it."""

    def replace(kernel: nnx.Param) -> nnx.Param:
        axes, shape = OUTPUT_AXES[len(kernel.shape)], kernel.shape
        scales = tuple(size if axis in axes else 1 for axis, size in enumerate(shape))
        return Int8Param(
            Int8(jax.ShapeDtypeStruct(shape, jnp.int8), jax.ShapeDtypeStruct(scales, jnp.float32))
        )

    return _with_kernels(model, quantization, replace)


def dequantize(model: Mimi) -> Mimi:
    """The model with floating-point kernels again, equal to those that its layers read."""
    return _with_kernels(model, "int8", lambda kernel: nnx.Param(kernel[...]))


def _with_kernels(model: Mimi, quantization: str, replace: Callable[[nnx.Param], nnx.Param]) -> Mimi:
    model = nnx.clone(model)
    for half in present_halves(model, quantization):
        for part in PARTS[half]:
            layers: list[Any] = [layer for _, layer in nnx.iter_modules(getattr(model, part))]
            for layer in layers:
                if hasattr(layer, "kernel"):
                    layer.kernel = replace(layer.kernel)
    return model


def check_name(quantization: object) -> None:
    if quantization not in tuple(QUANTIZATIONS):
        raise ValueError(f"quantization must be one of {', '.join(QUANTIZATIONS)}, got {quantization!r}")


def check_quantization(model: Mimi, quantization: str) -> None:
    """Refuse another name, and that of a half which the model lacks."""
    check_name(quantization)
    if not present_halves(model, quantization):
        raise ValueError(f"quantization={quantization!r} is of a half that this model lacks; leave it out")


def present_halves(model: Mimi, quantization: str) -> list[str]:
    """The halves of `model` that are int8 under this name; a model of one half lacks the other."""
    return [half for half in QUANTIZATIONS[quantization] if getattr(model, half) is not None]


def quantization_of(model: Mimi) -> str | None:
    """The name in `QUANTIZATIONS` of what `model` is; None for floating point."""
    present = present_halves(model, "int8")
    halves = [half for half in present if isinstance(getattr(model, half).first.kernel, Int8Param)]
    return next((name for name in QUANTIZATIONS if halves and present_halves(model, name) == halves), None)
