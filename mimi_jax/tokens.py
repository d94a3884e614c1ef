"""Codes as the tokens of a speech language model, and tokens as codes.

Every function is pure and can be used inside `jax.jit`; only its first argument is an array.

A language model sees the codes of a clip in one of two orders.

**In parallel, with delays**, as Moshi (Défossez et al., arXiv 2410.00037) and MusicGen do: one token of each
codebook a frame. The acoustic codebooks come one or two frames after the semantic one, on which they depend.
Here is `delay` with the delays 0, 1, 1; P is the pad:

    a0 a1 a2          a0 a1 a2 P
    b0 b1 b2    ->    P  b0 b1 b2
    c0 c1 c2          P  c0 c1 c2

**Interleaved**, in one sequence: `flatten` puts the tokens of a frame after each other. An offset for each
codebook makes equal codes of different codebooks different tokens. Tokens below `offset` are free for text
and for special tokens.

    a0 a1          a0, S + b0, 2 S + c0, a1, S + b1, 2 S + c1       (S is codebook_size)
    b0 b1    ->
    c0 c1

Semantic and acoustic streams apart, as in AudioLM, are two calls:

    begin, middle = 0, 1  # special tokens
    semantic = flatten(codes[:, :1], codebook_size, offset=2)
    acoustic = flatten(codes[:, 1:], codebook_size, offset=2 + codebook_size)
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike


@jax.transfer_guard("allow")  # of a few constants
def delay(codes: ArrayLike, delays: Sequence[int], pad: int | Sequence[int]) -> jax.Array:
    """Let each codebook begin some frames late. No code is lost: the result is longer by the longest delay.

    Moshi's own function cuts it off at `frames`: `delay(...)[:, :, :frames]`. In a batch of clips of unequal
    length, set the frames after the end of a clip to `pad` first.

    With -1 for all codes, the result shows which tokens a model has to generate, and which are given.

    Args:
        codes: integers [batch, codebooks, frames].
        delays: in frames, one for each codebook, such as (0, 1, 1, 1) or (0, 2, 2, 2).
        pad: the token that stands where there is no code; one for all codebooks, or one for each.

    Returns:
        int32 tokens [batch, codebooks, frames + max(delays)].

    Raises:
        TypeError: the codes are not integers.
        ValueError: the codes have another shape, there is not one delay, zero or more, for each codebook, or
            a pad is no int32.
    """
    codes = _integers(codes, "codes", "[batch, codebooks, frames]")
    longest = _longest(delays, codes.shape[1])
    pads = np.broadcast_to(np.asarray(pad), codes.shape[1])
    if pads.dtype.kind not in "iu" or (pads != pads.astype(np.int32)).any():
        raise ValueError(
            f"pad must be a token, an integer below 2**31, or one for each codebook, got {pad!r}"
        )
    pads = pads.astype(np.int32)
    rows = [
        jnp.pad(codes[:, book], ((0, 0), (late, longest - late)), constant_values=pads[book])
        for book, late in enumerate(delays)
    ]
    return jnp.stack(rows, axis=1)


@jax.transfer_guard("allow")
def undelay(tokens: ArrayLike, delays: Sequence[int]) -> jax.Array:
    """Take back what `delay` did: `undelay(delay(codes, delays, pad), delays)` equals `codes`.

    Args:
        tokens: [batch, codebooks, frames + max(delays), ...] of any dtype, such as tokens, or logits with the
            vocabulary as the last axis.
        delays: those of `delay`.

    Returns:
        [batch, codebooks, frames, ...] of the same dtype.

    Raises:
        ValueError: the tokens have fewer frames than the longest delay or another shape, or there is not one
            delay, zero or more, for each codebook.
    """
    tokens = jnp.asarray(tokens)
    if tokens.ndim < 3:
        raise ValueError(f"tokens must be [batch, codebooks, frames, ...], got {list(tokens.shape)}")
    frames = tokens.shape[2] - _longest(delays, tokens.shape[1])
    if frames < 0:
        raise ValueError(
            f"tokens must have at least as many frames as the longest delay, {max(delays)},"
            f" got {tokens.shape[2]}"
        )
    return jnp.stack([tokens[:, book, late : late + frames] for book, late in enumerate(delays)], axis=1)


@jax.transfer_guard("allow")
def flatten(codes: ArrayLike, codebook_size: int, offset: int = 0) -> jax.Array:
    """Interleave the codebooks: code c of codebook k becomes the token offset + k * codebook_size + c.

    Args:
        codes: integers [batch, codebooks, frames] in [0, codebook_size). They are not checked.
        codebook_size: how many tokens each codebook takes: its number of codes, and one more for the pad of
            `delay` if the codes were delayed.
        offset: the first of these tokens.

    Returns:
        int32 tokens [batch, frames * codebooks], frame after frame.

    Raises:
        TypeError: the codes are not integers.
        ValueError: the codes have another shape, or int32 has too few numbers for the tokens.
    """
    codes = _integers(codes, "codes", "[batch, codebooks, frames]")
    batch, books, frames = codes.shape
    tokens = codes.swapaxes(1, 2) + _offsets(books, codebook_size, offset)
    return tokens.reshape(batch, frames * books)


@jax.transfer_guard("allow")
def unflatten(tokens: ArrayLike, num_codebooks: int, codebook_size: int, offset: int = 0) -> jax.Array:
    """Take back what `flatten` did.

    A token that belongs to another codebook than its place says gives a code outside [0, codebook_size). So
    `(codes >= 0) & (codes < codebook_size)` shows which tokens of a model are codes.

    Args:
        tokens: integers [batch, frames * num_codebooks].
        num_codebooks: number of codebooks in the codes.
        codebook_size, offset: those of `flatten`.

    Returns:
        int32 codes [batch, num_codebooks, frames].

    Raises:
        TypeError: the tokens are not integers.
        ValueError: the tokens have another shape, or int32 has too few numbers for them.
    """
    tokens = _integers(tokens, "tokens", "[batch, tokens]")
    batch, length = tokens.shape
    offsets = _offsets(num_codebooks, codebook_size, offset)
    if length % num_codebooks:
        raise ValueError(
            f"the number of tokens must be a multiple of num_codebooks={num_codebooks}, got {length}"
        )
    return (tokens.reshape(batch, length // num_codebooks, num_codebooks) - offsets).swapaxes(1, 2)


def _integers(array: ArrayLike, name: str, shape: str) -> jax.Array:
    array = jnp.asarray(array)
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise TypeError(f"{name} must be integers, got {array.dtype}")
    if array.ndim != shape.count(",") + 1:
        raise ValueError(f"{name} must be {shape}, got {list(array.shape)}")
    return array.astype(jnp.int32)


def _longest(delays: Sequence[int], num_codebooks: int) -> int:
    if len(delays) != num_codebooks or not num_codebooks or min(delays) < 0:
        raise ValueError(
            f"delays must be numbers of frames, zero or more, one for each of {num_codebooks} codebooks,"
            f" got {list(delays)}"
        )
    return max(delays)


def _offsets(num_codebooks: int, codebook_size: int, offset: int) -> np.ndarray:
    """The first token of each codebook, int32 [1, 1, codebooks]."""
    if min(num_codebooks, codebook_size) < 1 or offset < 0:
        raise ValueError(
            "num_codebooks and codebook_size must be positive, and offset zero or more, got"
            f" {num_codebooks}, {codebook_size} and {offset}"
        )
    if (last := offset + num_codebooks * codebook_size) > 2**31:
        raise ValueError(f"tokens must be below 2**31, got tokens up to {last - 1}")
    return (offset + codebook_size * np.arange(num_codebooks)).astype(np.int32)[None, None]
