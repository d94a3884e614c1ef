"""SEANet stages in Triton, for NVIDIA GPUs from Ampere on, in bfloat16 or float16.

What a stage reads from memory is its input, and what it writes is its output: activations and padding cost no
passes of their own. That takes one device kernel where the channels are few. Where they are many, it takes
one for the residual block, whose result is already what the next convolution reads.

JAX calls Triton through jax_triton, which needs Python 3.12. Both are imported when a stage is computed.
"""

import functools
import logging
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

DTYPES = (jnp.bfloat16, jnp.float16)
FEWEST_CHANNELS = 32  # Triton's products are at least 16 wide, which the inside of a block must be
WINDOW = 16  # of the waveform, in products
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
# Next to the waveform: with the registers of Hopper and of the B series, and of other GPUs.
ENCODER_FRONT = {False: Tile(32, 8), True: Tile(64, 4)}
DECODER_BACK = {False: Tile(128, 8), True: Tile(64, 4)}
LARGE = range(90, 120)  # compute capabilities, times ten
MOST_CHANNELS_OF_ENDS = 64

# Versions of PTX, times ten. The first is from CUDA 12.0, and knows all GPUs up to Hopper.
PTX, PTX_OF_BLACKWELL, BLACKWELL = 80, 87, 100


def import_jax_triton() -> Any:
    """jax_triton, also with the Triton 3.6 that torch 2.11 asks for."""
    from triton.backends.nvidia import driver  # pyright: ignore[reportMissingImports]

    # Without this name, which is new in Triton 3.7, jax_triton takes the NVIDIA part of Triton for missing.
    # It is CUDA's number of a type that no device kernel here has.
    if not hasattr(driver, "TMA_TF32"):
        driver.TMA_TF32 = 11
    import jax_triton  # pyright: ignore[reportMissingImports]

    return jax_triton


@functools.cache
def is_available(capability: int) -> bool:
    """Whether JAX can call Triton, and this machine's GPU gives what it should.

    If not, a line of the log says so, once. Triton, jax_triton, XLA, its assembler and the driver must fit
    together, and whether they do shows only when they run.
    """
    try:
        import_jax_triton()
        if jax.local_devices()[0].platform == "gpu":  # not if a GPU is only described to the compiler
            run_one_block(capability)
    except Exception as error:  # they fail in many ways
        logging.getLogger("mimi_jax").warning(
            "half precision would be faster on this GPU with jax_triton (%s); on Python 3.12 or newer:"
            " pip install 'mimi_jax[cuda]'",
            error,
        )
        return False
    return True


@jax.transfer_guard("allow")  # of a few constants
def run_one_block(capability: int | None) -> None:
    """Run a small residual block. Its kernels are zero, so it gives its input.

    Raises:
        RuntimeError: it gave something else.
    """

    def layer(*shape: int) -> SimpleNamespace:
        return SimpleNamespace(kernel=jnp.zeros(shape, jnp.float16), bias=jnp.zeros(shape[-1], jnp.float16))

    def run(x: jax.Array) -> jax.Array:
        block = SimpleNamespace(conv1=layer(3, 32, 16), conv2=layer(1, 16, 32))
        return _block(capability, block, x[:, :2], None, x, _ends(x, None))[0]

    with jax.ensure_compile_time_eval():  # something may be traced now
        x = jnp.ones((1, 64, 32), jnp.float16)
        if not jnp.array_equal(jax.jit(run)(x), x):
            raise RuntimeError("a device kernel gave wrong numbers")


@functools.cache
def say_that_programs_are_divided() -> None:
    logging.getLogger("mimi_jax").warning(
        "half precision would be faster with one GPU for each process, or inside shard_map(...,"
        " check_vma=False): the compiler cannot divide device kernels of Triton between GPUs"
    )


def fits(part: Any, x: jax.Array) -> bool:
    """Whether the device kernels can compute a part of `KERNELS` on this input."""
    layers = part.layers()
    if part.operation == "encoder_front":
        waveform, stage = layers
    elif part.operation == "decoder_back":
        stage, waveform = layers
    else:
        waveform, stage = None, part
    is_encoder = stage.operation == "encoder_stage"
    stride = stage.downsample.stride if is_encoder else 1
    return (
        x.dtype in DTYPES
        and x.size > 0
        and x.shape[1] % stride == 0
        and _fits_stage(stage)
        and (waveform is None or _fits_waveform(stage, waveform, is_encoder))
    )


def _fits_stage(stage: Any) -> bool:
    if len(stage.blocks) != 1:
        return False
    [block] = stage.blocks
    channels, hidden = block.conv1.in_channels, block.conv2.in_channels
    return (
        channels.bit_count() == 1
        and FEWEST_CHANNELS <= channels <= MOST_CHANNELS
        and channels == 2 * hidden
        and block.shortcut is None
        and block.conv1.context > 0
        and block.conv1.pad_mode == "constant"
        and not any(
            layer.lookahead
            for layer in (*block.layers(), stage.layers()[0 if stage.operation == "decoder_stage" else -1])
        )
    )


def _fits_waveform(stage: Any, conv: Any, is_encoder: bool) -> bool:
    """Whether the convolution next to the waveform can be computed with the stage next to it."""
    taps, *channels = conv.kernel.shape
    sizes_fit = 2 <= taps <= WINDOW if is_encoder else taps == 3
    ratio = stage.downsample.stride if is_encoder else stage.upsample.stride
    [block] = stage.blocks
    return (
        sizes_fit
        and ratio > 1
        and min(channels) == 1
        and block.conv1.in_channels <= MOST_CHANNELS_OF_ENDS
        and block.conv1.kernel.shape[0] == 3
    )


def step(
    part: Any, state: tuple | None, x: jax.Array, lengths: jax.Array | None, *, capability: int | None
) -> tuple[tuple, jax.Array]:
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
    fused = jax.custom_batching.custom_vmap(functools.partial(KERNELS[part.operation], capability))
    fused.def_vmap(_vmap_layers)
    new_state, y = fused(part, state or part.init_state(x.shape[0], x.dtype), x, lengths)
    return new_state if state else (None,) * len(part.layers()), y


def _vmap_layers(_: int, batched: Any, *arguments: Any) -> tuple[Any, Any]:
    axes = jax.tree.map(lambda is_batched: 0 if is_batched else None, batched)
    results = jax.vmap(lambda part, *inputs: part.step_layers(*inputs), axes)(*arguments)
    return results, jax.tree.map(lambda _: True, results)


def compiler_options(capability: int | None) -> dict[str, Any]:
    """By default Triton writes the newest PTX that it knows. XLA may have the assembler of an older CUDA."""
    newest = capability is not None and capability >= BLACKWELL
    return {"ptx_version": PTX_OF_BLACKWELL if newest else PTX, "enable_fp_fusion": True}


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
        jax_triton = import_jax_triton()
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
        backend_options=compiler_options(capability),
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
        LEAD=lead,
        DEPTH=min(channels, 64),
        WIDTH=min(channels, 128),
    )


def _ends(x: jax.Array, lengths: jax.Array | None) -> jax.Array:
    return jnp.full(x.shape[0], x.shape[1], jnp.int32) if lengths is None else lengths


def encoder_stage(
    capability: int | None, part: Any, state: tuple, x: jax.Array, lengths: jax.Array | None
) -> tuple[tuple, jax.Array]:
    """`step` for an `EncoderStage`: the downsampling stays a convolution, but needs no padding."""
    [block] = part.blocks
    (conv1, conv2), down = state
    activated, kept = _block(capability, block, conv1.past, down.past, x, _ends(x, lengths))
    conv1 = conv1._replace(past=_advance(conv1.past, x, lengths))
    down = down._replace(past=_keep_idle(lengths, kept, down.past))
    return ((conv1, conv2), down), part.downsample.convolve(activated)


def decoder_stage(
    capability: int | None, part: Any, state: tuple, x: jax.Array, lengths: jax.Array | None
) -> tuple[tuple, jax.Array]:
    """`step` for a `DecoderStage`: the upsampling stays a convolution."""
    [block] = part.blocks
    up, (conv1, conv2) = state
    up, x = part.upsample.step(up, x, lengths)
    lengths = part.upsample.output_lengths(lengths)
    y, _ = _block(capability, block, conv1.past, None, x, _ends(x, None))
    return (up, (conv1._replace(past=_advance(conv1.past, x, lengths)), conv2)), y


def encoder_front(
    capability: int | None, part: Any, state: tuple, x: jax.Array, lengths: jax.Array | None
) -> tuple[tuple, jax.Array]:
    """`step` for the first convolution and the `EncoderStage` after it."""
    batch, time, _ = x.shape
    conv, stage = part.layers()
    [block], down = stage.blocks, stage.downsample
    first, ((conv1, conv2), last) = state
    channels, strides = conv.kernel.shape[2], time // down.stride
    tile = ENCODER_FRONT[capability in LARGE]
    y, past, next_past = call(
        "encoder_front",
        capability,
        *(x, first.past, conv1.past, last.past, _ends(x, lengths)),
        *_weights(conv, block.conv1, block.conv2, down),
        outputs=[(batch, strides, 2 * channels), conv1.past.shape, last.past.shape],
        tile=tile,
        programs=-(-strides // (tile.rows - 1)),
        T=time,
        C=channels,
        H=channels // 2,
        TAPS=conv.kernel.shape[0],
        RATIO=down.stride,
        WINDOW=WINDOW,
    )
    first = first._replace(past=_advance(first.past, x, lengths))
    conv1 = conv1._replace(past=_keep_idle(lengths, past, conv1.past))
    last = last._replace(past=_keep_idle(lengths, next_past, last.past))
    return (first, ((conv1, conv2), last)), y


def decoder_back(
    capability: int | None, part: Any, state: tuple, x: jax.Array, lengths: jax.Array | None
) -> tuple[tuple, jax.Array]:
    """`step` for the last `DecoderStage` and the convolution after it."""
    batch, time, _ = x.shape
    stage, conv = part.layers()
    [block], up = stage.blocks, stage.upsample
    (first, (conv1, conv2)), last = state
    tile = DECODER_BACK[capability in LARGE]
    y, past, next_past = call(
        "decoder_back",
        capability,
        *(x, first.past, conv1.past, last.past),
        *_weights(up, block.conv1, block.conv2, conv),
        outputs=[(batch, time * up.stride, 1), conv1.past.shape, last.past.shape],
        tile=tile,
        programs=-(-time // (tile.rows - 1)),
        T=time,
        C=up.out_channels,
        H=up.out_channels // 2,
        RATIO=up.stride,
    )
    first = first._replace(past=_advance(first.past, x, lengths))
    conv1 = conv1._replace(past=_keep_idle(lengths, past, conv1.past))
    last = last._replace(past=_keep_idle(lengths, next_past, last.past))
    return ((first, (conv1, conv2)), last), y


KERNELS = {
    "encoder_front": encoder_front,
    "encoder_stage": encoder_stage,
    "decoder_stage": decoder_stage,
    "decoder_back": decoder_back,
}
