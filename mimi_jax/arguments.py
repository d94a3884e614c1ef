"""What users bring: audio, masks, codes, states and rows. Each is used as it is meant, or refused."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from mimi_jax.config import MimiConfig


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
    mask = jnp.asarray(padding_mask) != 0
    if mask.ndim == 3 and mask.shape[1] == 1:
        mask = mask[:, 0]
    if mask.ndim != 2 or mask.shape[0] != batch_size or mask.shape[1] == 0:
        raise ValueError(
            f"padding_mask must be [batch={batch_size}, samples > 0] or [batch, 1, samples],"
            f" got {list(jnp.shape(padding_mask))}"
        )
    return mask, jnp.max(jnp.where(mask, jnp.arange(1, mask.shape[1] + 1), 0), axis=1)


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
    rows = check_rows("active", jnp.asarray(active) != 0, batch_size)
    return jnp.where(rows, size if lengths is None else lengths, 0)
