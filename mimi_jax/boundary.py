"""Where users' arrays enter and leave the model: audio, masks, codes, states and rows.

Each argument is used as it is meant, or refused with the rule, the value and what to do.
"""

import contextlib
import functools
import inspect
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, PartitionSpec
from jax.typing import ArrayLike, DTypeLike

from mimi_jax.config import MimiConfig, as_integer, ceil_div
from mimi_jax.ops import policy

COUNT = "num_quantizers"  # the parameter that is static


class EncoderOutput(NamedTuple):
    audio_codes: jax.Array  # int32 [batch, codebooks, frames], semantic first, 0 outside the mask
    audio_codes_mask: jax.Array  # bool [batch, frames]


class DecoderOutput(NamedTuple):
    audio_values: jax.Array  # [batch, channels, samples]


class MimiOutput(NamedTuple):
    audio_codes: jax.Array  # int32 [batch, codebooks, frames]
    audio_codes_mask: jax.Array  # bool [batch, frames]
    audio_values: jax.Array  # [batch, channels, samples], as long as the input


@contextlib.contextmanager
def transfers_allowed() -> Iterator[None]:
    """Move data between host and device inside, although `jax_transfer_guard` may forbid it.

    It is for what is in the host's memory by design, such as the zeros of a fresh state or pushed audio.
    """
    # `jax.transfer_guard` takes ten times as long, since it sets the direction from device to device too.
    with jax.transfer_guard_host_to_device("allow"), jax.transfer_guard_device_to_host("allow"):
        yield


def as_array(name: str, value: Any) -> jax.Array | np.ndarray:
    """An argument as an array that JAX can compute with, wherever it comes from.

    Args:
        name: what errors call it.
        value: an array of NumPy or JAX, or anything that has `__array__` or DLPack, such as a torch tensor.

    Raises:
        TypeError: it is something else, such as a list, or it cannot be read.
    """
    if isinstance(value, jax.Array):  # a tracer is one too
        return value
    if hasattr(value, "__jax_array__"):
        return value.__jax_array__()
    if not (hasattr(value, "__array__") or hasattr(value, "__dlpack__")):
        raise TypeError(
            f"{name} must be an array of NumPy, JAX or torch, got {type(value).__name__}; use np.array for"
            " numbers, pad_batch for clips, and out.audio_codes for the output of encode"
        )
    array = _read(name, value)
    if isinstance(array, jax.Array):
        return array
    if array.dtype.kind in "OSUMm":
        raise TypeError(f"{name} must be an array of numbers, got {array.dtype} {list(array.shape)}")
    return _as_int32(array) if array.dtype.kind in "iu" else array


def as_numpy(name: str, value: Any) -> np.ndarray:
    """An argument as a NumPy array in native byte order. It may also be a list of numbers.

    Raises:
        TypeError: it cannot be read.
    """
    if type(value) is np.ndarray and value.dtype.isnative:
        return value
    with transfers_allowed():
        return np.asarray(_read(name, value))


def _read(name: str, value: Any) -> jax.Array | np.ndarray:
    try:
        array = np.asarray(value)
    except (TypeError, RuntimeError) as error:
        # NumPy knows neither the bfloat16 of torch nor the memory of a GPU.
        try:
            return jnp.from_dlpack(value)
        except (TypeError, RuntimeError, BufferError):
            raise TypeError(f"{name} cannot be read as an array: {error}") from None
    # A compiled function would take the bytes as they are, if it has seen such a shape in native order.
    return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))


def _as_int32(array: Any) -> Any:
    """Integers in at most 32 bits. What does not fit becomes -1 or 2**31 - 1, which no codebook has.

    JAX itself drops the upper half of 64 bits, so 2**32 would be the code 0.
    """
    if array.dtype.itemsize <= 4:
        return array
    return array.clip(max(np.iinfo(array.dtype).min, -1), 2**31 - 1).astype(np.int32)


class Compiled:
    """`jax.jit` for the functions and methods of a model that users call.

    The parameters that are annotated as `ArrayLike` go through `as_array`, before `jax.jit` sees them: it
    would take a list for many scalars. `num_quantizers` is static.
    """

    def __init__(self, function: Callable):
        functools.update_wrapper(self, function)
        self._name, self._signature = function.__qualname__, inspect.signature(function)
        parameters = self._signature.parameters
        arrays = (name for name, p in parameters.items() if p.annotation in (ArrayLike, ArrayLike | None))
        self._arrays = {name: parameters[name].default for name in arrays}
        self._jitted = jax.jit(function, static_argnames=[name for name in parameters if name == COUNT])

    def __call__(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        bound = self._signature.bind(model, *args, **kwargs)
        bound.apply_defaults()
        given = bound.arguments
        for name, default in self._arrays.items():
            if given[name] is not default:
                given[name] = as_array(name, given[name])
        if COUNT in given:
            given[COUNT] = model.quantizer.resolve_count(given[COUNT])
        return self._jitted(*given.values())

    def __get__(self, model: Any, _: type | None = None) -> Any:
        return self if model is None else types.MethodType(self, model)

    def __reduce__(self) -> str:  # pickled by its name, as functions are
        return self._name

    # These are methods, since `jax.jit(encode)` copies attributes, and they would replace its own.

    def lower(self, *args: Any, **kwargs: Any) -> jax.stages.Lowered:
        """As that of `jax.jit`, to compile ahead of time."""
        return self._jitted.lower(*args, **kwargs)

    def trace(self, *args: Any, **kwargs: Any) -> jax.stages.Traced:
        """As that of `jax.jit`. `jax.export` needs it."""
        return self._jitted.trace(*args, **kwargs)


def with_model_settings(method):
    """Run a method of the model with the model's precision and implementations, and let XLA shard its values.

    By default, float32 means TF32 on NVIDIA GPUs and bfloat16 on TPUs, and codes would change. The first
    argument of the method and all its results have the batch on axis 0, and are sharded alike.
    """

    @functools.wraps(method)
    def wrapped(self: Any, x: ArrayLike, *args, **kwargs):
        sharding = jax.typeof(x).sharding
        with policy.computing(self.compute, self.precision):
            batch = PartitionSpec(*sharding.spec[:1])
            return let_xla_shard(method, sharding.mesh, batch, self, x, *args, **kwargs)

    return wrapped


def let_xla_shard(
    function: Callable, mesh: AbstractMesh, results: PartitionSpec, *args: Any, **kwargs: Any
) -> Any:
    """Call a function with arrays of a mesh, and let XLA shard what it computes from them.

    On a mesh with explicit axes, JAX would ask for the sharding of every lookup.

    Args:
        function: takes `args` and `kwargs`.
        mesh: that their arrays are on.
        results: how all results are sharded.
    """
    if not (axes := mesh.explicit_axes):
        return function(*args, **kwargs)
    with jax.sharding.use_abstract_mesh(mesh):
        return jax.sharding.auto_axes(function, axes=axes, out_sharding=results)(*args, **kwargs)


def check_audio(
    config: MimiConfig, audio: ArrayLike, padding_mask: ArrayLike | None
) -> tuple[jax.Array, jax.Array | None]:
    """Refuse audio that the model does not take, and replace what its mask leaves out by silence.

    Returns:
        The audio, and the length of each row, int32 [batch]: up to its last real sample. None for all.
    """
    audio = jnp.asarray(as_array("audio", audio))
    channels = config.audio_channels
    if audio.ndim != 3 or audio.shape[1] != channels or audio.shape[2] == 0:
        expected = f"[batch, channels={channels}, samples > 0]"
        raise ValueError(f"audio must be {expected}, got {list(audio.shape)}; [samples] is audio[None, None]")
    check_is_floating(audio)
    if padding_mask is None:
        return audio, None
    mask, lengths = check_mask(padding_mask, audio.shape[0])
    if mask.shape[1] != audio.shape[2]:
        raise ValueError(f"padding_mask must cover {audio.shape[2]} samples, got {mask.shape[1]}")
    # `where`, since zero times NaN is NaN, and padding may hold anything.
    return jnp.where(mask[:, None, :], audio, 0), lengths


def check_whole_frames(config: MimiConfig, audio: ArrayLike) -> None:
    """Refuse audio for a step that does not end with a frame."""
    if jnp.ndim(audio) and (num_samples := jnp.shape(audio)[-1]) % config.frame_size:
        raise ValueError(
            f"samples must be a positive multiple of frame_size={config.frame_size}, got {num_samples};"
            " pad the last frame and mark it in padding_mask"
        )


def check_is_floating(audio: jax.Array | np.ndarray) -> None:
    """Refuse integers, which would count as full scale."""
    if not jnp.issubdtype(audio.dtype, jnp.floating):
        raise ValueError(f"audio must be floating point in [-1, 1], got {audio.dtype}; divide int16 by 32768")


def check_mask(padding_mask: ArrayLike, batch_size: int) -> tuple[jax.Array, jax.Array]:
    """A mask as bool [batch, samples], and the length of each row, up to its last real sample."""
    mask = jnp.asarray(as_array("padding_mask", padding_mask)).astype(bool)
    shape = list(mask.shape)
    if mask.ndim == 3 and mask.shape[1] == 1:
        mask = mask[:, 0]
    if mask.ndim != 2 or mask.shape[0] != batch_size or mask.shape[1] == 0:
        raise ValueError(
            f"padding_mask must be [batch={batch_size}, samples > 0] or [batch, 1, samples], got {shape}"
        )
    ends = jnp.arange(1, mask.shape[1] + 1, dtype=jnp.int32)[None]
    return mask, jnp.max(jnp.where(mask, ends, 0), axis=1)


def check_mask_of_codes(
    config: MimiConfig, padding_mask: ArrayLike, codes: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """`check_mask` of the audio that became these codes."""
    mask, lengths = check_mask(padding_mask, len(codes))
    frames = codes.shape[2]
    if ceil_div(mask.shape[1], config.frame_size) != frames:
        raise ValueError(
            f"padding_mask must be that of the audio, with {config.frame_size} samples for each of {frames}"
            f" frames (the last one may have fewer), got {mask.shape[1]} samples; it is not the"
            " audio_codes_mask that encode gives"
        )
    return mask, lengths


def check_latents(config: MimiConfig, latents: ArrayLike) -> jax.Array:
    """Refuse latents that are not float [batch, frames, hidden_size]."""
    array = jnp.asarray(as_array("latents", latents))
    is_float = jnp.issubdtype(array.dtype, jnp.floating)
    if array.ndim != 3 or array.shape[2] != config.hidden_size or not is_float:
        raise ValueError(
            f"latents must be float [batch, frames, hidden_size={config.hidden_size}], got {array.dtype}"
            f" {list(array.shape)}"
        )
    return array


def check_dtype(dtype: DTypeLike) -> DTypeLike:
    """Refuse integers as the dtype of a model."""
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(
            f"dtype must be floating point, such as jnp.bfloat16, got {jnp.dtype(dtype).name};"
            ' weights="int8" is for int8 weights'
        )
    return dtype


def check_codes(audio_codes: ArrayLike) -> jax.Array:
    """Refuse codes that are not integers [batch, codebooks, frames]."""
    codes = jnp.asarray(as_array("codes", audio_codes))
    if codes.ndim != 3 or not jnp.issubdtype(codes.dtype, jnp.integer):
        raise ValueError(
            f"codes must be integers [batch, codebooks, frames], got {codes.dtype} {list(codes.shape)}"
        )
    return _as_int32(codes)


def check_state(state: Any, fresh: Any) -> None:
    """Refuse a state whose structure, shapes or dtypes differ from those of a fresh one."""
    found, expected = (
        jax.tree.map(lambda leaf: f"{leaf.dtype} {list(jnp.shape(leaf))}", tree) for tree in (state, fresh)
    )
    if found != expected:
        leaves = jax.tree.leaves(found), jax.tree.leaves(expected)
        counts = f"{len(leaves[0])} arrays in another structure", f"{len(leaves[1])} arrays"
        one, other = next((pair for pair in zip(*leaves, strict=False) if pair[0] != pair[1]), counts)
        raise ValueError(
            f"the state must be of this model, this half and as many streams as the input; got {one},"
            f" expected {other}; begin with init_encoder_state or init_decoder_state, and pass on what"
            " each step returns"
        )


def check_batch_size(batch_size: object) -> int:
    """Refuse anything but a positive integer."""
    count = as_integer(batch_size)
    if count is None or count < 1:
        raise ValueError(f"batch_size must be a positive integer, got {batch_size!r}")
    return count


def check_streamable(config: MimiConfig) -> None:
    """Refuse a model that looks ahead."""
    if not config.is_streamable:
        raise ValueError(
            "a model with use_causal_conv=False or trim_right_ratio other than 1 looks ahead and cannot"
            " stream; use encode and decode on whole clips"
        )


def check_rows(name: str, rows: ArrayLike | Sequence[bool], batch_size: int) -> jax.Array:
    """Refuse anything but bool [batch], such as the numbers of rows. The rows may be a list."""
    rows = jnp.asarray(rows if isinstance(rows, jax.Array) else as_numpy(name, rows))
    if rows.dtype != bool or rows.shape != (batch_size,):
        raise ValueError(
            f"{name} must be bool [batch={batch_size}], got {rows.dtype} {list(rows.shape)};"
            " np.isin(np.arange(batch), numbers) turns numbers into a mask"
        )
    return rows


def check_active(active: ArrayLike, batch_size: int) -> jax.Array:
    """The rows of a batch that step, as bool [batch]."""
    return check_rows("active", jnp.asarray(as_array("active", active)), batch_size)


def lengths_of_active(
    active: ArrayLike | None, lengths: jax.Array | None, batch_size: int, size: int
) -> jax.Array | None:
    """The lengths, but 0 for rows that are not active. Lengths of None stand for `size` in each row."""
    if active is None:
        return lengths
    if lengths is None:
        lengths = jnp.full(batch_size, size, jnp.int32)
    return jnp.where(check_active(active, batch_size), lengths, 0)


@transfers_allowed()
def pad_to_frame(audio: ArrayLike, config: MimiConfig) -> jax.Array:
    """Append zeros to audio [..., samples] up to a multiple of `config.frame_size`, as Kyutai's codec does.

    `encode` takes audio of any length without it. It pads inside each convolution, as `transformers` does. If
    the length is not a multiple of the frame size, the codes of the last frame differ between the two ways.
    """
    audio = jnp.asarray(as_array("audio", audio))
    missing = -audio.shape[-1] % config.frame_size
    return jnp.pad(audio, [(0, 0)] * (audio.ndim - 1) + [(0, missing)]) if missing else audio
