"""Layers with several positions a row, for TPUs.

The registers of a TPU are 128 numbers wide, and layers next to the waveform have only 64 and 32 channels. So
neighbouring positions lie side by side, as the phases of a row: [batch, time, channels] becomes
[batch, time / phases, phases * channels]. A convolution becomes one of rows, whose larger kernel is zero
where an output does not see an input. So each output is the sum of the same products, and of zeros.
"""

import math
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from mimi_jax.config import ceil_div
from mimi_jax.nn.conv import Conv1d, ConvState, ConvTranspose1d
from mimi_jax.nn.streaming import Lengths, StreamingLayer, keep_idle_rows
from mimi_jax.ops import policy

# [batch, time / phases, phases * channels]
Rows = Float[Array, "batch rows in"]
RowsOut = Float[Array, "batch rows out"]


def leaves(part: Any) -> list[Conv1d | ConvTranspose1d]:
    """The convolutions of a part of the network, in order."""
    if isinstance(part, (Conv1d, ConvTranspose1d)):
        return [part]
    return [leaf for layer in part.layers() for leaf in leaves(layer)]


def fits(part: StreamingLayer) -> bool:
    """Whether all of its convolutions are causal ones of zeros before the clip."""
    return all(
        not conv.lookahead and (conv.pad_mode == "constant" if isinstance(conv, Conv1d) else conv.groups == 1)
        for conv in leaves(part)
    )


def channels(part: StreamingLayer) -> int:
    """How many the residual blocks of a stage have, also where the layer next to the waveform is with it."""
    return max(conv.in_channels for conv in leaves(part) if isinstance(conv, Conv1d))


def kernel_of_rows(
    kernel: Float[Array, "taps channels out"], context: int, phases: int, stride: int, dilation: int
) -> Float[Array, "row_taps row_in row_out"]:
    """The kernel of the same convolution of rows.

    Args:
        context: positions that an output sees before its own stride.
        phases: of an input row, a multiple of `stride`.
    """
    taps, size_in, size_out = kernel.shape
    row_taps, outputs = 1 + ceil_div(context, phases), phases // stride
    length, span = row_taps * phases, (taps - 1) * dilation + 1
    first = length - phases - context  # where the first output sees its first input
    starts = [first + output * stride for output in range(outputs)]
    zero = jnp.zeros((), kernel.dtype)
    columns = [
        lax.pad(kernel, zero, ((start, length - start - span, dilation - 1), (0, 0, 0), (0, 0, 0)))
        for start in starts
    ]
    return jnp.stack(columns, axis=2).reshape(row_taps, phases * size_in, outputs * size_out)


def past_in_rows(past: Float[Array, "batch context in"], phases: int) -> RowsOut:
    """Whole rows, with zeros before the context."""
    batch, context, size = past.shape
    count = ceil_div(context, phases)
    past = jnp.pad(past, ((0, 0), (count * phases - context, 0), (0, 0)))
    return past.reshape(batch, count, phases * size)


def fill_rows_beyond(rows: Rows, phases: int, lengths: Lengths) -> Rows:
    """Overwrite what comes after the end of each clip with zeros."""
    if lengths is None:
        return rows
    row, column = (lax.broadcasted_iota(jnp.int32, (1, *rows.shape[1:]), axis) for axis in (1, 2))
    position = row * phases + column // (rows.shape[2] // phases)
    return jnp.where(position < lengths[:, None, None], rows, jnp.zeros((), rows.dtype))


def step_conv(
    conv: Conv1d, state: ConvState, rows: Rows, phases: int, lengths: Lengths
) -> tuple[ConvState, RowsOut]:
    """`Conv1d.step` of rows."""
    activate = conv.activation or (lambda x: x)
    if conv.stride > 1:
        rows = fill_rows_beyond(rows, phases, lengths)
    kernel = kernel_of_rows(conv.kernel[...], conv.context, phases, conv.stride, conv.dilation)
    if state.past is not None:
        past = past_in_rows(state.past, phases)
        batch, count, _ = past.shape
        last = jnp.concatenate([past, rows[:, -count:]], axis=1)[:, -count:]
        next_past = last.reshape(batch, count * phases, conv.in_channels)[:, -conv.context :]
        state = keep_idle_rows(lengths, ConvState(next_past, None), state)
        rows = policy.join(activate(past), activate(rows))
    else:
        rows = activate(rows)
    y = policy.convolution(rows, kernel)
    if conv.bias is not None:
        y += jnp.tile(conv.bias[None, None], phases // conv.stride)
    return state, y


def _step(
    part: Any, state: Any, rows: Rows, phases: int, lengths: Lengths
) -> tuple[Any, RowsOut, int, Lengths]:
    """Step layers one after the other. Also returns the phases and the lengths of the output."""
    if isinstance(part, ConvTranspose1d):  # its input has one position a row
        state, rows = part.step_strides(state, rows, lengths)
        return state, rows, part.stride, part.output_lengths(lengths)
    if isinstance(part, Conv1d):
        state, rows = step_conv(part, state, rows, phases, lengths)
        return state, rows, phases // part.stride, part.output_lengths(lengths)
    x, new_state = rows, []
    for layer, layer_state in zip(part.layers(), state, strict=True):
        layer_state, rows, phases, lengths = _step(layer, layer_state, rows, phases, lengths)
        new_state.append(layer_state)
    if part.operation == "residual_block":
        shortcut = part.shortcut
        rows += x if shortcut is None else step_conv(shortcut, ConvState(None, None), x, phases, lengths)[1]
    return tuple(new_state), rows, phases, lengths


def step(
    part: Any, state: tuple | None, x: Float[Array, "batch time in"], lengths: Lengths
) -> tuple[tuple, Float[Array, "batch time_out out"]]:
    """`part.step_layers`, if it `fits`. A row holds the positions that become one at the lowest rate."""
    batch, time, channels = x.shape
    phases = math.prod(conv.stride for conv in leaves(part) if isinstance(conv, Conv1d))
    if time % phases:
        raise ValueError(f"time must be a multiple of stride={phases}, got {time}; pad it")
    rows = x.reshape(batch, time // phases, phases * channels)
    new_state, y, phases, _ = _step(part, state or part.init_state(batch, x.dtype), rows, phases, lengths)
    new_state = new_state if state else (None,) * len(part.layers())
    return new_state, y.reshape(batch, y.shape[1] * phases, y.shape[2] // phases)
