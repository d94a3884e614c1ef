"""The stages next to the waveform as one device kernel each, in Pallas, for TPUs.

What such a kernel reads from memory is the input of the stage, and what it writes is the output. Everything
between them stays in the fast memory of the chip, with several positions a row (see `polyphase`). Tiles of
rows follow each other in time, as steps of a stream do: each leaves its last rows to the next one.

Rows of the batch lie next to each other in registers, 8 of them: arrays are [rows, batch, columns]. A
waveform has so few columns that several rows share one.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from mimi_jax.nn import polyphase
from mimi_jax.nn.polyphase import kernel_of_rows, past_in_rows
from mimi_jax.nn.streaming import Lengths, keep_idle_rows
from mimi_jax.ops.convolution import elu_by_exp, elu_in_float32
from mimi_jax.ops.lanes import LANES, SUBLANES

StepResult = tuple[tuple, jax.Array]

GROUP = 8  # rows of a stage that share a row of the waveform
MOST_ROWS = 128  # of a tile, so that its activations fit in the fast memory


class Rows(NamedTuple):
    """A convolution of rows, as a device kernel reads it."""

    kernel: Any  # [row_taps, in, out]
    bias: Any  # [1, out]


def fits(part: Any, x: jax.Array) -> bool:
    """Whether a device kernel can compute `EncoderFront` or `DecoderBack` on this input."""
    is_encoder = part.operation == "encoder_front"
    conv, stage = part.layers() if is_encoder else reversed(part.layers())
    phases = stage.downsample.stride if is_encoder else stage.upsample.stride
    rows = x.shape[1] // phases if is_encoder else x.shape[1]
    return (
        polyphase.fits(part)
        and len(stage.blocks) == 1
        and stage.blocks[0].shortcut is None
        and min(conv.kernel.shape[1:]) == 1
        and 0 < conv.context <= GROUP * phases <= LANES - conv.context
        and stage.blocks[0].conv1.context > 0
        and x.size > 0
        and rows % GROUP == 0
        and (not is_encoder or x.shape[1] % phases == 0)
    )


def _elu(x: jax.Array) -> jax.Array:
    """Pallas has no `expm1` for TPUs."""
    return elu_by_exp(x) if x.dtype == jnp.float32 else elu_in_float32(x)


def _dot(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """[rows, batch, in] by [in, out], with float32 sums."""
    rows, batch, size = x.shape
    # Products of half precision are exact by themselves, and have no other way.
    precision = None if x.dtype == jnp.float32 else lax.Precision.DEFAULT
    x = x.reshape(rows * batch, size)
    y = jnp.dot(x, kernel, precision=precision, preferred_element_type=jnp.float32)
    return y.reshape(rows, batch, kernel.shape[1])


def _convolve(x: jax.Array, conv: Rows) -> jax.Array:
    """[row_taps - 1 + rows, batch, in] to [rows, batch, out], float32."""
    taps = conv.kernel.shape[0]
    rows = x.shape[0] - taps + 1
    parts = [_dot(x[tap : tap + rows], conv.kernel[tap]) for tap in range(taps)]
    return sum(parts[1:], parts[0]) + conv.bias[...][None]


def _follow(past: Any, x: jax.Array) -> jax.Array:
    """Put the past before x, and keep the end of both as the next past."""
    size = past.shape[0]
    x = jnp.concatenate([past[...], x], axis=0)
    past[...] = x[-size:]
    return x


def _start(pasts: list, states: list) -> None:
    """The first tile begins where the stream is."""
    from jax.experimental import pallas as pl

    @pl.when(pl.program_id(1) == 0)
    def _() -> None:
        for past, state in zip(pasts, states, strict=True):
            past[...] = state[...]


def _residual_block(x: jax.Array, past: Any, conv1: Rows, conv2: Rows) -> jax.Array:
    y = _convolve(_elu(_follow(past, x)), conv1).astype(x.dtype)
    y = _convolve(_elu(y), conv2).astype(x.dtype)
    return x + y


def _encoder_front_kernel(phases: int, lengths, windows, states, first, conv1, conv2, down, y, pasts) -> None:
    from jax.experimental import pallas as pl

    _start(pasts, states)
    dtype = windows.dtype
    groups = _dot(windows[...], first.kernel[...])
    columns = first.bias.shape[1]
    parts = [groups[:, :, row * columns : (row + 1) * columns] for row in range(GROUP)]
    rows, batch = GROUP * groups.shape[0], groups.shape[1]
    x = (jnp.stack(parts, axis=1).reshape(rows, batch, columns) + first.bias[...][None]).astype(dtype)
    x = _residual_block(x, pasts[0], conv1, conv2)
    row, column = (lax.broadcasted_iota(jnp.int32, x.shape, axis) for axis in (0, 2))
    position = (pl.program_id(1) * rows + row) * phases + column // (columns // phases)
    x = jnp.where(position < lengths[...][None], x, jnp.zeros((), dtype))
    y[...] = _convolve(_elu(_follow(pasts[1], x)), down).astype(dtype)


def _decoder_back_kernel(x, states, up, conv1, conv2, last, y, pasts) -> None:
    _start(pasts, states)
    dtype = x.dtype
    h = _convolve(_elu(_follow(pasts[0], x[...])), up).astype(dtype)
    h = _elu(_follow(pasts[2], _residual_block(h, pasts[1], conv1, conv2)))
    taps = last.kernel.shape[0]
    rows, batch, columns = h.shape[0] - taps + 1, *h.shape[1:]
    total = last.bias[...][None]
    for tap in range(taps):
        groups = h[tap : tap + rows].reshape(rows // GROUP, GROUP, batch, columns)
        side_by_side = jnp.concatenate([groups[:, row] for row in range(GROUP)], axis=2)
        total += _dot(side_by_side, last.kernel[tap])
    y[...] = total.astype(dtype)


def _call(kernel: Any, rows: int, inputs: list, constants: Any, states: list, y: Any) -> Any:
    """Run a device kernel over tiles of rows, 8 rows of the batch at a time.

    Args:
        rows: of the stage, in all tiles.
        inputs: [rows or groups of them, batch, columns], or [batch, columns] for all rows.
        constants: what each tile reads whole, a pytree.
        states: what the first tile starts from, [rows, batch, columns].
        y: shape and dtype of the output, like those of the inputs.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    tile = next(size for size in range(MOST_ROWS, 0, -GROUP) if rows % size == 0)
    tiles, batch = rows // tile, states[0].shape[1]
    together = min(batch, SUBLANES)  # the last ones may be fewer; what is computed beside them is not kept

    def in_time(array: Any) -> pl.BlockSpec:
        if len(array.shape) == 2:
            return pl.BlockSpec((together, array.shape[1]), lambda b, t: (b, 0))
        return pl.BlockSpec((array.shape[0] // tiles, together, array.shape[2]), lambda b, t: (t, b, 0))

    def whole(array: Any) -> pl.BlockSpec:
        return pl.BlockSpec(array.shape, lambda b, t: (0,) * len(array.shape))

    def kept(array: Any) -> pl.BlockSpec:
        return pl.BlockSpec((array.shape[0], together, array.shape[2]), lambda b, t: (0, b, 0))

    call = functools.partial(
        pl.pallas_call,
        kernel,
        grid=(pl.cdiv(batch, together), tiles),
        in_specs=[*map(in_time, inputs), [*map(kept, states)], *jax.tree.map(whole, constants)],
        out_specs=[in_time(y), [*map(kept, states)]],
        out_shape=[y, [jax.ShapeDtypeStruct(state.shape, state.dtype) for state in states]],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
    )
    # Elsewhere an interpreter computes the same, slowly.
    return lax.platform_dependent(*inputs, states, *constants, tpu=call(), default=call(interpret=True))


def _rows_of(conv: Any, phases: int) -> Rows:
    bias = jnp.zeros(conv.kernel.shape[2], jnp.float32) if conv.bias is None else conv.bias[...]
    kernel = kernel_of_rows(conv.kernel[...], conv.context, phases, conv.stride, conv.dilation)
    return Rows(kernel, jnp.tile(bias.astype(jnp.float32), phases // conv.stride)[None])


def _past_rows(past: jax.Array, phases: int) -> jax.Array:
    """[batch, context, in] to [rows, batch, columns], with zeros before the context."""
    return jnp.swapaxes(past_in_rows(past, phases), 0, 1)


def _past_of(rows: jax.Array, state: Any, lengths: Lengths) -> Any:
    """The reverse, as the state after a step."""
    batch = rows.shape[1]
    context, size = state.past.shape[1:]
    past = jnp.swapaxes(rows, 0, 1).reshape(batch, -1, size)[:, -context:]
    return keep_idle_rows(lengths, state._replace(past=past), state)


def encoder_front(part: Any, state: tuple, x: jax.Array, lengths: Lengths) -> StepResult:
    """`EncoderFront.step`."""
    conv, stage = part.layers()
    [block], down = stage.blocks, stage.downsample
    first, ((conv1, conv2), last) = state
    batch, time, _ = x.shape
    phases, context = down.stride, conv.context
    span = GROUP * phases
    joined = jnp.concatenate([first.past, x], axis=1)
    before = joined[:, :time].reshape(batch, time // span, span)[:, :, :context]
    windows = jnp.concatenate([before, x.reshape(batch, time // span, span)], axis=2)
    windows = jnp.pad(windows, ((0, 0), (0, 0), (0, LANES - context - span)))
    # Each position of a group of rows sees its own part of the window.
    taps, _, size = conv.kernel.shape
    zero = jnp.zeros((), x.dtype)
    kernels = [
        lax.pad(conv.kernel[:, 0], zero, ((start, LANES - start - taps, 0), (0, 0, 0)))
        for start in range(span)
    ]
    kernel = jnp.stack(kernels, axis=1).reshape(LANES, span * size)
    bias = jnp.zeros(size, jnp.float32) if conv.bias is None else conv.bias[...].astype(jnp.float32)
    ends = jnp.full(batch, time, jnp.int32) if lengths is None else lengths
    y, (conv1_rows, last_rows) = _call(
        functools.partial(_encoder_front_kernel, phases),
        rows=time // phases,
        inputs=[ends[:, None], jnp.swapaxes(windows, 0, 1)],
        constants=(
            Rows(kernel, jnp.tile(bias, phases)[None]),
            *(_rows_of(layer, phases) for layer in (block.conv1, block.conv2, down)),
        ),
        states=[_past_rows(conv1.past, phases), _past_rows(last.past, phases)],
        y=jax.ShapeDtypeStruct((time // phases, batch, 2 * size), x.dtype),
    )
    first = keep_idle_rows(lengths, first._replace(past=joined[:, -context:]), first)
    conv1, last = _past_of(conv1_rows, conv1, lengths), _past_of(last_rows, last, lengths)
    return (first, ((conv1, conv2), last)), jnp.swapaxes(y, 0, 1)


def decoder_back(part: Any, state: tuple, x: jax.Array, lengths: Lengths) -> StepResult:
    """`DecoderBack.step`."""
    stage, conv = part.layers()
    [block], up = stage.blocks, stage.upsample
    (first, (conv1, conv2)), last = state
    batch, rows, size = x.shape
    phases = up.stride
    bias = jnp.zeros(up.out_channels, jnp.float32) if up.bias is None else up.bias[...].astype(jnp.float32)
    up_rows = Rows(up.kernel[...].reshape(2, size, phases * up.out_channels), jnp.tile(bias, phases)[None])
    kernel, bias = _rows_of(conv, phases)
    zero = jnp.zeros((), x.dtype)
    # The outputs of a group of rows lie side by side.
    kernels = [
        lax.pad(kernel, zero, ((0, 0, 0), (0, 0, 0), (row * phases, LANES - (row + 1) * phases, 0)))
        for row in range(GROUP)
    ]
    last_rows = Rows(jnp.concatenate(kernels, axis=1), jnp.broadcast_to(bias[:, :1], (1, LANES)))
    y, (first_past, conv1_past, last_past) = _call(
        _decoder_back_kernel,
        rows=rows,
        inputs=[jnp.swapaxes(x, 0, 1)],
        constants=(up_rows, _rows_of(block.conv1, phases), _rows_of(block.conv2, phases), last_rows),
        states=[
            jnp.swapaxes(first.past, 0, 1),
            _past_rows(conv1.past, phases),
            _past_rows(last.past, phases),
        ],
        y=jax.ShapeDtypeStruct((rows // GROUP, batch, LANES), x.dtype),
    )
    lengths_out = stage.output_lengths(lengths)
    first = _past_of(first_past, first, lengths)
    conv1, last = _past_of(conv1_past, conv1, lengths_out), _past_of(last_past, last, lengths_out)
    y = jnp.swapaxes(y, 0, 1)[:, :, : GROUP * phases].reshape(batch, rows * phases, 1)
    return ((first, (conv1, conv2)), last), y


KERNELS = {"encoder_front": encoder_front, "decoder_back": decoder_back}


def step(part: Any, state: tuple | None, x: jax.Array, lengths: Lengths) -> StepResult:
    """`part.step_layers` for an `EncoderFront` or a `DecoderBack`.

    The compiler cannot partition the device kernel. On several chips, call it inside `shard_map` with
    `check_vma=False`, since the kernel does not say how its results differ between devices.

    Raises:
        ValueError: the device kernel cannot compute it.
    """
    if not fits(part, x):
        raise ValueError(
            f'compute[{part.operation!r}]="pallas" needs a causal network with pad_mode="constant", one audio'
            " channel, one residual block a stage without use_conv_shortcut, and whole groups of"
            f' {GROUP} strides, got an input of shape {x.shape}; "auto" uses it where it can'
        )
    new_state, y = KERNELS[part.operation](part, state or part.init_state(len(x), x.dtype), x, lengths)
    return new_state if state else (None,) * len(part.layers()), y
