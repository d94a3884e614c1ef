"""Where users' arrays enter and leave the model: audio, masks, codes, states and rows.

Each argument is used as it is meant, or refused with the rule, the value and what to do.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jax.typing import ArrayLike

from mimi_jax.config import MimiConfig
from mimi_jax.ops import policy


class EncoderOutput(NamedTuple):
    audio_codes: jax.Array  # int32 [batch, codebooks, frames], semantic first, 0 outside the mask
    audio_codes_mask: jax.Array  # bool [batch, frames]


class DecoderOutput(NamedTuple):
    audio_values: jax.Array  # [batch, channels, samples]


class MimiOutput(NamedTuple):
    audio_codes: jax.Array  # int32 [batch, codebooks, frames]
    audio_codes_mask: jax.Array  # bool [batch, frames]
    audio_values: jax.Array  # [batch, channels, samples], as long as the input


def with_model_settings(method):
    """Run a method of the model with the model's precision and implementations, and let XLA shard its values.

    By default, float32 means TF32 on NVIDIA GPUs and bfloat16 on TPUs, and codes would change. On a mesh with
    explicit axes, JAX would ask for the sharding of every lookup in a codebook. The first argument of the
    method and all its results have the batch on axis 0, and are sharded alike.
    """

    @functools.wraps(method)
    def wrapped(self: Any, x: ArrayLike, *args, **kwargs):
        if isinstance(x, list | tuple):
            raise TypeError(
                f"expected an array, got {type(x).__name__}; join clips with pad_batch, and take the codes of"
                " an output with out.audio_codes"
            )
        sharding = jax.typeof(x).sharding
        with jax.default_matmul_precision(self.precision), policy.computing(self.compute):
            if not (axes := sharding.mesh.explicit_axes):
                return method(self, x, *args, **kwargs)
            batch = PartitionSpec(*sharding.spec[:1])
            with jax.sharding.use_abstract_mesh(sharding.mesh):
                compute: Callable = jax.sharding.auto_axes(method, axes=axes, out_sharding=batch)
                return compute(self, x, *args, **kwargs)

    return wrapped


def check_audio(
    config: MimiConfig, audio: ArrayLike, padding_mask: ArrayLike | None
) -> tuple[jax.Array, jax.Array | None]:
    """Refuse audio that the model does not take, and replace what its mask leaves out by silence.

    Returns:
        The audio, and the length of each row, int32 [batch]: up to its last real sample. None for all.
    """
    audio = jnp.asarray(audio)
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


def check_is_floating(audio: jax.Array | np.ndarray) -> None:
    """Refuse integers, which would count as full scale."""
    if not jnp.issubdtype(audio.dtype, jnp.floating):
        raise ValueError(f"audio must be floating point in [-1, 1], got {audio.dtype}; divide int16 by 32768")


def check_mask(padding_mask: ArrayLike, batch_size: int) -> tuple[jax.Array, jax.Array]:
    """A mask as bool [batch, samples], and the length of each row, up to its last real sample."""
    mask = jnp.asarray(padding_mask).astype(bool)
    if mask.ndim == 3 and mask.shape[1] == 1:
        mask = mask[:, 0]
    if mask.ndim != 2 or mask.shape[0] != batch_size or mask.shape[1] == 0:
        raise ValueError(
            f"padding_mask must be [batch={batch_size}, samples > 0] or [batch, 1, samples],"
            f" got {list(jnp.shape(padding_mask))}"
        )
    return mask, jnp.max(jnp.where(mask, jnp.arange(1, mask.shape[1] + 1)[None], 0), axis=1)


def check_codes(audio_codes: ArrayLike) -> jax.Array:
    """Refuse codes that are not integers [batch, codebooks, frames]."""
    codes = jnp.asarray(audio_codes)
    if codes.ndim != 3 or not jnp.issubdtype(codes.dtype, jnp.integer):
        raise ValueError(
            f"codes must be integers [batch, codebooks, frames], got {codes.dtype} {list(codes.shape)}"
        )
    return codes


def check_state(state: Any, fresh: Any) -> None:
    """Refuse a state whose structure, shapes or dtypes differ from those of a fresh one."""
    forms = [jax.tree.map(lambda leaf: (jnp.shape(leaf), leaf.dtype), tree) for tree in (state, fresh)]
    if forms[0] != forms[1]:
        raise ValueError("the state must be of this model, this half and as many streams as the input")


def check_streamable(config: MimiConfig) -> None:
    """Refuse a model that looks ahead."""
    if not config.is_streamable:
        raise ValueError(
            "a model with use_causal_conv=False or trim_right_ratio other than 1 looks ahead and cannot"
            " stream; use encode and decode on whole clips"
        )


def check_rows(name: str, rows: ArrayLike | Sequence[bool], batch_size: int) -> jax.Array:
    """Refuse anything but bool [batch], such as the numbers of rows."""
    rows = jnp.asarray(rows)
    if rows.dtype != bool or rows.shape != (batch_size,):
        raise ValueError(f"{name} must be bool [batch={batch_size}], got {rows.dtype} {list(rows.shape)}")
    return rows


def lengths_of_active(
    active: ArrayLike | None, lengths: jax.Array | None, batch_size: int, size: int
) -> jax.Array | None:
    """The lengths, but 0 for rows that are not active. Lengths of None stand for `size` in each row."""
    if active is None:
        return lengths
    rows = check_rows("active", jnp.asarray(active).astype(bool), batch_size)
    return jnp.where(rows, size if lengths is None else lengths, 0)


def pad_to_frame(audio: ArrayLike, config: MimiConfig) -> jax.Array:
    """Append zeros to audio [..., samples] up to a multiple of `config.frame_size`, as Kyutai's codec does.

    `encode` takes audio of any length without it. It pads inside each convolution, as `transformers` does. If
    the length is not a multiple of the frame size, the codes of the last frame differ between the two ways.
    """
    audio = jnp.asarray(audio)
    missing = -audio.shape[-1] % config.frame_size
    return jnp.pad(audio, [(0, 0)] * (audio.ndim - 1) + [(0, missing)]) if missing else audio
