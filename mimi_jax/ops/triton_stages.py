"""SEANet stages in Triton, for NVIDIA GPUs from Ampere on, in bfloat16 or float16.

What a stage reads from memory is its input, and what it writes is its output: activations and padding cost no
passes of their own. That takes one device kernel where the channels are few. Where they are many, it takes
one for the residual block, whose result is already what the next convolution reads.

JAX calls Triton through jax_triton, which needs Python 3.12. Both are imported when a stage is computed.
"""

import functools
import importlib.util
import logging
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

DTYPES = (jnp.bfloat16, jnp.float16)
FEWEST_CHANNELS = 32  # Triton's products are at least 16 wide, which the inside of a block must be
MOST_CHANNELS = 1024  # more would not fit a program's registers


class Tile(NamedTuple):
    """The sizes of a program. They change no result."""

    rows: int
    warps: int
    stages: int = 1  # of the pipeline of loads


# By the channels of the residual block, as large as possible without spilled registers: the compiler says so
# (`benchmarks/triton_kernels.py`). Which of them is fastest has not been measured.
BLOCKS = {128: Tile(128, 8, 2), 256: Tile(128, 8, 2), 512: Tile(64, 8)}
OTHER_BLOCKS = Tile(64, 8)
# Stages with no more channels are one device kernel. Up to Ada, and from Hopper on.
WHOLE_STAGES = 64
ENCODER_STAGE = {False: Tile(32, 4), True: Tile(64, 4)}
DECODER_STAGE = {False: Tile(64, 8), True: Tile(64, 4)}
HOPPER = 90


def is_installed() -> bool:
    return all(importlib.util.find_spec(name) for name in ("jax_triton", "triton"))


@functools.cache
def say_what_is_missing() -> None:
    """Once, where a GPU could do more."""
    logging.getLogger("mimi_jax").warning(
        "half precision is faster on this GPU with jax_triton: pip install 'mimi_jax[cuda]' on Python 3.12"
    )


def fits(part: Any, x: jax.Array) -> bool:
    """Whether the device kernels can compute an `EncoderStage` or a `DecoderStage` on this input."""
    if len(part.blocks) != 1 or x.dtype not in DTYPES or not x.size:
        return False
    [block] = part.blocks
    resampling = part.layers()[0 if part.operation == "decoder_stage" else -1]
    channels, hidden = block.conv1.in_channels, block.conv2.in_channels
    return (
        channels.bit_count() == 1
        and FEWEST_CHANNELS <= channels <= MOST_CHANNELS
        and channels == 2 * hidden
        and block.shortcut is None
        and block.conv1.context > 0
        and block.conv1.pad_mode == "constant"
        and not block.conv1.lookahead
        and not resampling.lookahead
        and (part.operation == "decoder_stage" or x.shape[1] % resampling.stride == 0)
    )


def step(
    part: Any, state: Any, x: jax.Array, lengths: jax.Array | None, *, capability: int | None
) -> tuple[Any, jax.Array]:
    """`part.step_layers` for an `EncoderStage` or a `DecoderStage` that `fits`. `vmap` goes layer by layer.

    Args:
        capability: of the GPUs to compile for, times ten. None looks at the first GPU, and takes tiles that
            fit all of them.

    Raises:
        ValueError: the device kernels cannot compute it.
        ImportError: jax_triton is not installed.
    """
    if not fits(part, x):
        raise ValueError(
            f'compute[{part.operation!r}]="triton" needs bfloat16 or float16, and a causal residual block of'
            f" {FEWEST_CHANNELS} to {MOST_CHANNELS} channels, a power of two, with compress=2,"
            ' pad_mode="constant" and without use_conv_shortcut; "auto" uses it where it can'
        )
    stage = {"encoder_stage": encoder_stage, "decoder_stage": decoder_stage}[part.operation]
    fused = jax.custom_batching.custom_vmap(functools.partial(stage, capability))
    fused.def_vmap(_vmap_layers)
    return fused(part, state, x, lengths)


def _vmap_layers(_: int, batched: Any, *arguments: Any) -> tuple[Any, Any]:
    axes = jax.tree.map(lambda is_batched: 0 if is_batched else None, batched)
    results = jax.vmap(lambda part, *inputs: part.step_layers(*inputs), axes)(*arguments)
    return results, jax.tree.map(lambda _: True, results)


def call(
    kernel: str,
    capability: int | None,
    *arrays: jax.Array,
    outputs: list[tuple[int, ...]],
    tile: Tile,
    programs: int,
    **sizes: int,
) -> list[jax.Array]:
    """Run a device kernel of `triton_kernels` on `programs` tiles of each row of the batch."""
    try:
        import jax_triton  # pyright: ignore[reportMissingImports]
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
        name=kernel,
        compute_capability=capability,
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
    capability: int | None,
    block: Any,
    past: jax.Array,
    next_past: jax.Array | None,
    x: jax.Array,
    lengths: jax.Array,
) -> list[jax.Array]:
    """Residual block: its output and, if there is a `next_past`, what the next layer needs."""
    batch, time, channels = x.shape
    lead = 0 if next_past is None else next_past.shape[1]
    tile = BLOCKS.get(channels, OTHER_BLOCKS)
    taps, _, hidden = block.conv1.kernel.shape
    return call(
        "residual_block",
        capability,
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


def _is_whole_stage(block: Any) -> bool:
    """Whether one device kernel computes the stage: with few channels, and kernels of three neighbours."""
    return block.conv1.in_channels <= WHOLE_STAGES and block.conv1.kernel.shape[0] == 3


def encoder_stage(
    capability: int | None, part: Any, state: Any, x: jax.Array, lengths: jax.Array | None
) -> tuple[Any, jax.Array]:
    """`step` for an `EncoderStage`."""
    batch, time, channels = x.shape
    [block], down = part.blocks, part.downsample
    (conv1, conv2), last = state or part.init_state(batch, x.dtype)
    ends = jnp.full(batch, time, jnp.int32) if lengths is None else lengths
    if _is_whole_stage(block):
        tile, strides = ENCODER_STAGE[(capability or 0) >= HOPPER], time // down.stride
        y, kept = call(
            "encoder_stage",
            capability,
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
        activated, kept = _block(capability, block, conv1.past, last.past, x, ends)
        y = down.convolve(activated)
    conv1 = conv1._replace(past=_advance(conv1.past, x, lengths))
    return ((conv1, conv2), last._replace(past=_keep_idle(lengths, kept, last.past))), y


def decoder_stage(
    capability: int | None, part: Any, state: Any, x: jax.Array, lengths: jax.Array | None
) -> tuple[Any, jax.Array]:
    """`step` for a `DecoderStage`."""
    batch, time, _ = x.shape
    [block], up = part.blocks, part.upsample
    first, (conv1, conv2) = state or part.init_state(batch, x.dtype)
    channels = up.out_channels
    if _is_whole_stage(block) and up.stride > 1:
        tile = DECODER_STAGE[(capability or 0) >= HOPPER]
        y, kept = call(
            "decoder_stage",
            capability,
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
        y, _ = _block(capability, block, conv1.past, None, x, ends)
        past = _advance(conv1.past, x, lengths)
    return (first, (conv1._replace(past=past), conv2)), y
