"""SEANet stages in Triton, for NVIDIA GPUs from Ampere on, in bfloat16 or float16.

What a stage reads from memory is its input, and what it writes is its output: activations and padding cost no
passes of their own. That takes one device kernel where the channels are few. Where they are many, it takes
one for the residual block, whose result is already what the next convolution reads.

JAX calls Triton through jax_triton, which needs Python 3.12. Both are imported when a stage is computed.
"""

import importlib.util
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

DTYPES = (jnp.bfloat16, jnp.float16)
FEWEST_CHANNELS = 32  # Triton's products are at least 16 wide, which the inside of a block must be
MOST_CHANNELS = 1024  # more would not fit a program's registers


class Tile(NamedTuple):
    """The sizes of a program, by the compiler's word that no registers spill. They change no result."""

    rows: int
    warps: int
    stages: int = 1


# By the channels of the residual block.
BLOCKS = {32: Tile(128, 4), 64: Tile(128, 4), 128: Tile(128, 8), 256: Tile(128, 8), 512: Tile(64, 8)}
WIDEST_BLOCK = Tile(32, 8)
# Stages with no more channels are one device kernel.
ENCODER_STAGES = {32: Tile(64, 4), 64: Tile(64, 4)}
DECODER_STAGES = {32: Tile(64, 4), 64: Tile(64, 4)}


def is_installed() -> bool:
    return all(importlib.util.find_spec(name) for name in ("jax_triton", "triton"))


def fits(part: Any, x: jax.Array) -> bool:
    """Whether the device kernels can compute this stage on this input."""
    if len(part.blocks) != 1 or x.dtype not in DTYPES or not x.size:
        return False
    conv1, conv2 = part.blocks[0].layers()
    channels, hidden = conv1.in_channels, conv2.in_channels
    return (
        channels.bit_count() == 1
        and FEWEST_CHANNELS <= channels <= MOST_CHANNELS
        and channels == 2 * hidden
        and part.blocks[0].shortcut is None
        and conv1.context > 0
        and conv1.pad_mode == "constant"
        and not conv1.lookahead
        and not getattr(part, "upsample", conv1).lookahead
    )


def call(kernel: str, *arrays: jax.Array, outputs: list[tuple[int, ...]], tile: Tile, programs: int, **sizes):
    """Run a device kernel of `triton_kernels` on `programs` tiles of each row of the batch.

    Raises:
        ImportError: jax_triton is not installed.
    """
    try:
        import jax_triton
    except ImportError as error:
        raise ImportError(
            "fused stages need jax_triton and Python 3.12 or newer: pip install 'mimi_jax[cuda]'; or leave"
            ' them out with compute="portable"'
        ) from error
    from mimi_jax.ops import triton_kernels

    dtype, batch = arrays[0].dtype, arrays[0].shape[0]
    return jax_triton.triton_call(
        *arrays,
        kernel=getattr(triton_kernels, kernel),
        out_type=[jax.ShapeDtypeStruct(shape, dtype) for shape in outputs],
        grid=(programs, batch),
        name=f"mimi_{kernel}",
        num_warps=tile.warps,
        num_stages=tile.stages,
        ROWS=tile.rows,
        **sizes,
    )


def _weights(*layers: Any) -> list[jax.Array]:
    return [parameter[...] for layer in layers for parameter in (layer.kernel, layer.bias)]


def _advance(past: jax.Array, x: jax.Array, lengths: jax.Array | None) -> jax.Array:
    """The past after the inputs x. Rows without a real input keep theirs."""
    size = past.shape[1]
    new = x[:, x.shape[1] - size :] if x.shape[1] >= size else jnp.concatenate([past, x], axis=1)[:, -size:]
    return _keep_idle(lengths, new, past)


def _keep_idle(lengths: jax.Array | None, new: jax.Array, old: jax.Array) -> jax.Array:
    return new if lengths is None else jnp.where((lengths > 0)[:, None, None], new, old)


def _block(
    block: Any, past: jax.Array, next_past: jax.Array | None, x: jax.Array, lengths: jax.Array
) -> list[jax.Array]:
    """Residual block: its output and, if there is a `next_past`, what the next layer needs."""
    batch, time, channels = x.shape
    lead = 0 if next_past is None else next_past.shape[1]
    tile = BLOCKS.get(channels, WIDEST_BLOCK)
    taps, _, hidden = block.conv1.kernel.shape
    return call(
        "residual_block",
        *(x, past, past if next_past is None else next_past, lengths, *_weights(block.conv1, block.conv2)),
        outputs=[(batch, lead + time, channels), (batch, lead or 1, channels)],
        tile=tile,
        programs=-(-(lead + time) // tile.rows),
        T=time,
        C=channels,
        H=hidden,
        TAPS=taps,
        DILATION=block.conv1.dilation,
        LEAD=lead,
        DEPTH=min(channels, 64),
        WIDTH=min(channels, 128),
    )


def _has_short_past(block: Any) -> bool:
    return block.conv1.context == 2 and block.conv1.dilation == 1


def encoder_stage(part: Any, state: Any, x: jax.Array, lengths: jax.Array | None) -> tuple[Any, jax.Array]:
    """`part.step_layers` for an `EncoderStage`."""
    batch, time, channels = x.shape
    [block], down = part.blocks, part.downsample
    (conv1, conv2), last = state or part.init_state(batch, x.dtype)
    ends = jnp.full(batch, time, jnp.int32) if lengths is None else lengths
    if channels in ENCODER_STAGES and _has_short_past(block) and last.past.shape[1] == down.stride:
        tile, strides = ENCODER_STAGES[channels], time // down.stride
        y, kept = call(
            "encoder_stage",
            *(x, conv1.past, last.past, ends, *_weights(block.conv1, block.conv2, down)),
            outputs=[(batch, strides, 2 * channels), last.past.shape],
            tile=tile,
            programs=-(-strides // (tile.rows - 1)),
            T=time,
            C=channels,
            H=channels // 2,
            RATIO=down.stride,
        )
    else:
        activated, kept = _block(block, conv1.past, last.past, x, ends)
        y = down.convolve(activated)
    conv1 = conv1._replace(past=_advance(conv1.past, x, lengths))
    return ((conv1, conv2), last._replace(past=_keep_idle(lengths, kept, last.past))), y


def decoder_stage(part: Any, state: Any, x: jax.Array, lengths: jax.Array | None) -> tuple[Any, jax.Array]:
    """`part.step_layers` for a `DecoderStage`."""
    batch, time, _ = x.shape
    [block], up = part.blocks, part.upsample
    first, (conv1, conv2) = state or part.init_state(batch, x.dtype)
    channels = up.out_channels
    if channels in DECODER_STAGES and _has_short_past(block) and up.stride > 1:
        tile = DECODER_STAGES[channels]
        y, kept = call(
            "decoder_stage",
            *(x, first.past, conv1.past, *_weights(up, block.conv1, block.conv2)),
            outputs=[(batch, time * up.stride, channels), conv1.past.shape],
            tile=tile,
            programs=-(-time // tile.rows),
            T=time,
            C=channels,
            H=channels // 2,
            RATIO=up.stride,
        )
        first = first._replace(past=_advance(first.past, x, lengths))
        past = _keep_idle(lengths, kept, conv1.past)
    else:
        first, x = up.step(first, x, lengths)
        lengths = up.output_lengths(lengths)
        ends = jnp.full(batch, x.shape[1], jnp.int32)
        y, _ = _block(block, conv1.past, None, x, ends)
        past = _advance(conv1.past, x, lengths)
    return (first, (conv1._replace(past=past), conv2)), y
