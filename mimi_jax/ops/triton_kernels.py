"""Device kernels of SEANet stages, in Triton. `triton_stages` calls them and says what they need.

Arrays are dense, channels last. Channels are powers of two. Sums are float32, and each layer's result is
rounded to the dtype of the arrays, as layers round it. A program computes a tile of one row of the batch.
Where time is negative, inputs come from the past of the layer that reads them.

    T        positions of the input
    C, H     channels of the residual block, and inside of it
    RATIO    stride of the convolution before or after the block
    ROWS     positions of a tile
"""
# pyright: reportMissingImports=false

import triton
import triton.language as tl


@triton.jit
def _elu(x, dtype: tl.constexpr):
    x = x.to(tl.float32)
    return tl.where(x > 0, x, tl.exp(tl.minimum(x, 0.0)) - 1.0).to(dtype)


@triton.jit
def _add(product, bias, dtype: tl.constexpr):
    return (product + bias[None, :].to(tl.float32)).to(dtype)


@triton.jit
def _load(x, past, row, t, T, c, C: tl.constexpr, PAST: tl.constexpr):
    """Inputs at times `t`, which are `row` from where `x` and `past` point: [rows, channels]."""
    at = row[:, None] * C + c[None, :]
    pointers = tl.where((t < 0)[:, None], past + at, x + at)
    return tl.load(pointers, mask=((t >= -PAST) & (t < T))[:, None], other=0.0)


# fmt: off
@triton.jit
def residual_block(
    x, past, next_past, lengths, w1, b1, w2, b2, out, kept, T, C: tl.constexpr, H: tl.constexpr,
    TAPS: tl.constexpr, DILATION: tl.constexpr, LEAD: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr,
    WIDTH: tl.constexpr,
):
    # fmt: on
    """Residual block; if there is a LEAD, also the activation after it.

    Then the result is what the next layer convolves: its past first, and zero after the end of each row.

    Args:
        x: [batch, T, C].
        past: [batch, (TAPS - 1) * DILATION, C], of the first convolution.
        next_past: [batch, LEAD, C], of the layer after the block.
        lengths: [batch].
        w1, b1, w2, b2: [TAPS, C, H] and [H], [H, C] and [C].
        out: [batch, LEAD + T, C].
        kept: [batch, LEAD, C], the `next_past` of the next step.
        DEPTH: input channels of one product.
        WIDTH: output channels computed at once.
    """
    PAST: tl.constexpr = (TAPS - 1) * DILATION
    PARTS: tl.constexpr = C // DEPTH
    dtype: tl.constexpr = out.dtype.element_ty
    batch = tl.program_id(1).to(tl.int64)
    start = tl.program_id(0) * ROWS - LEAD
    row = tl.arange(0, ROWS)
    t = start + row
    h = tl.arange(0, H)
    x += (batch * T + start) * C
    past += (batch * PAST + PAST + start) * C
    next_past += (batch * LEAD + LEAD + start) * C
    out += (batch * (LEAD + T) + LEAD + start) * C
    kept += (batch * LEAD + LEAD + start - T) * C
    length = tl.load(lengths + batch)

    hidden = tl.zeros((ROWS, H), tl.float32)
    for part in tl.range(0, TAPS * PARTS):
        tap = part // PARTS
        c = part % PARTS * DEPTH + tl.arange(0, DEPTH)
        back = (TAPS - 1 - tap) * DILATION
        a = _elu(_load(x, past, row - back, t - back, T, c, C, PAST), dtype)
        hidden = tl.dot(a, tl.load(w1 + (tap * C + c)[:, None] * H + h[None, :]), hidden)
    hidden = _elu(_add(hidden, tl.load(b1 + h), dtype), dtype)
    for first in tl.range(0, C, WIDTH):
        c = first + tl.arange(0, WIDTH)
        at = row[:, None] * C + c[None, :]
        real = (t >= 0) & (t < T)
        y = _add(tl.dot(hidden, tl.load(w2 + h[:, None] * C + c[None, :])), tl.load(b2 + c), dtype)
        y = (y.to(tl.float32) + tl.load(x + at, mask=real[:, None], other=0.0).to(tl.float32)).to(dtype)
        if LEAD:
            y = tl.where((t < 0)[:, None], tl.load(next_past + at, mask=(t < 0)[:, None], other=0.0), y)
            y = tl.where((t < length)[:, None], y, 0.0).to(dtype)
            tl.store(kept + at, y, mask=((t >= T - LEAD) & (t < T))[:, None])
            y = _elu(y, dtype)
        tl.store(out + at, y, mask=(t < T)[:, None])


@triton.jit
def _activated_block(
    e2, e1, e0, x, w1, b1, w2, b2, c, h, C: tl.constexpr, H: tl.constexpr, dtype: tl.constexpr
):
    """Residual block of kernel 3 on activated neighbours: [rows, C], without the activation after it."""
    at = c[:, None] * H + h[None, :]
    hidden = tl.dot(e2, tl.load(w1 + at))
    hidden = tl.dot(e1, tl.load(w1 + C * H + at), hidden)
    hidden = tl.dot(e0, tl.load(w1 + 2 * C * H + at), hidden)
    hidden = _elu(_add(hidden, tl.load(b1 + h), dtype), dtype)
    y = _add(tl.dot(hidden, tl.load(w2 + h[:, None] * C + c[None, :])), tl.load(b2 + c), dtype)
    return (x.to(tl.float32) + y.to(tl.float32)).to(dtype)


# fmt: off
@triton.jit
def encoder_stage(
    x, past, next_past, lengths, w1, b1, w2, b2, w3, b3, out, kept, T, C: tl.constexpr, H: tl.constexpr,
    RATIO: tl.constexpr, ROWS: tl.constexpr,
):
    # fmt: on
    """Residual block and downsampling.

    Rows of a tile are output positions, and the first one is halo. Phase i of row j is time j * RATIO + i. So
    the block's taps are the neighbouring phases, and nothing is computed twice. The downsampling sees each
    row and the one before it, which a product with a shift matrix makes, exactly.

    Args:
        x: [batch, T, C].
        past: [batch, 2, C], of the block.
        next_past: [batch, RATIO, C], of the downsampling.
        lengths: [batch]. What comes after them counts as zero.
        w1, b1, w2, b2, w3, b3: [3, C, H] and [H], [H, C] and [C], [2 * RATIO, C, 2 * C] and [2 * C].
        out: [batch, T / RATIO, 2 * C].
        kept: [batch, RATIO, C], the `next_past` of the next step.
    """
    WIDTH: tl.constexpr = 2 * C
    dtype: tl.constexpr = out.dtype.element_ty
    batch = tl.program_id(1).to(tl.int64)
    start = tl.program_id(0) * (ROWS - 1) - 1
    row = tl.arange(0, ROWS)
    j = start + row
    c = tl.arange(0, C)
    h = tl.arange(0, H)
    n = tl.arange(0, WIDTH)
    x += (batch * T + start * RATIO) * C
    past += (batch * 2 + 2 + start * RATIO) * C
    next_past += (batch * RATIO + RATIO + start * RATIO) * C
    out += (batch * (T // RATIO) + start) * WIDTH
    kept += (batch * RATIO + start * RATIO + RATIO - T) * C
    length = tl.load(lengths + batch)
    shift = (row[:, None] == row[None, :] + 1).to(dtype)
    e2 = _elu(_load(x, past, row * RATIO - 2, j * RATIO - 2, T, c, C, 2), dtype)
    e1 = _elu(_load(x, past, row * RATIO - 1, j * RATIO - 1, T, c, C, 2), dtype)
    total = tl.zeros((ROWS, WIDTH), tl.float32)
    is_real = (j >= 0) & (j < T // RATIO)
    for i in tl.range(RATIO, disable_licm=True):
        at = (row * RATIO + i)[:, None] * C + c[None, :]
        x_i = tl.load(x + at, mask=is_real[:, None], other=0.0)
        e0 = _elu(x_i, dtype)
        y = _activated_block(e2, e1, e0, x_i, w1, b1, w2, b2, c, h, C, H, dtype)
        if start < 0:
            y = tl.where(is_real[:, None], y, tl.load(next_past + at, mask=(j < 0)[:, None], other=0.0))
        y = tl.where((j * RATIO + i < length)[:, None], y, 0.0).to(dtype)
        if start + ROWS >= T // RATIO:
            tl.store(kept + at, y, mask=((row > 0) & (j == T // RATIO - 1))[:, None])
        y = _elu(y, dtype)
        before = tl.dot(shift, y).to(dtype)
        total = tl.dot(before, tl.load(w3 + (i * C + c)[:, None] * WIDTH + n[None, :]), total)
        total = tl.dot(y, tl.load(w3 + ((RATIO + i) * C + c)[:, None] * WIDTH + n[None, :]), total)
        e2 = e1
        e1 = e0
    keep = (row > 0) & (j < T // RATIO)
    tl.store(out + row[:, None] * WIDTH + n[None, :], _add(total, tl.load(b3 + n), dtype), mask=keep[:, None])


@triton.jit
def _upsample(before, own, w0, i, c, d, b0, C: tl.constexpr, RATIO: tl.constexpr, dtype: tl.constexpr):
    """Phase i of the positions that two activated neighbours [rows, 2 * C] reach: [rows, C]."""
    SIZE: tl.constexpr = 2 * C
    at = d[:, None] * (RATIO * C) + i * C + c[None, :]
    y = tl.dot(own, tl.load(w0 + SIZE * RATIO * C + at), tl.dot(before, tl.load(w0 + at)))
    return _add(y, tl.load(b0 + c), dtype)


# fmt: off
@triton.jit
def decoder_stage(
    x, x_past, past, w0, b0, w1, b1, w2, b2, out, kept, T, C: tl.constexpr, H: tl.constexpr,
    RATIO: tl.constexpr, ROWS: tl.constexpr,
):
    # fmt: on
    """Upsampling and residual block.

    Rows of a tile are input positions. Phase i of row j is time j * RATIO + i of the output. The taps of the
    block are the neighbouring phases; of the row before, the last two phases are computed again.

    Args:
        x: [batch, T, 2 * C].
        x_past: [batch, 1, 2 * C], of the upsampling.
        past: [batch, 2, C], of the block.
        w0, b0: [2, 2 * C, RATIO, C] and [C].
        w1, b1, w2, b2: [3, C, H] and [H], [H, C] and [C].
        out: [batch, T * RATIO, C].
        kept: [batch, 2, C], the `past` of the next step.
    """
    SIZE: tl.constexpr = 2 * C
    dtype: tl.constexpr = out.dtype.element_ty
    batch = tl.program_id(1).to(tl.int64)
    start = tl.program_id(0) * ROWS
    row = tl.arange(0, ROWS)
    j = start + row
    c = tl.arange(0, C)
    d = tl.arange(0, SIZE)
    h = tl.arange(0, H)
    x += (batch * T + start) * SIZE
    x_past += (batch + 1 + start) * SIZE
    past += batch * 2 * C
    out += (batch * T + start) * (RATIO * C)
    kept += (batch * 2 + 2 - RATIO) * C
    before2 = _elu(_load(x, x_past, row - 2, j - 2, T, d, SIZE, 1), dtype)
    before = _elu(_load(x, x_past, row - 1, j - 1, T, d, SIZE, 1), dtype)
    own = _elu(_load(x, x_past, row, j, T, d, SIZE, 1), dtype)
    is_first = (j == 0)[:, None]
    u2 = _upsample(before2, before, w0, RATIO - 2, c, d, b0, C, RATIO, dtype)
    u1 = _upsample(before2, before, w0, RATIO - 1, c, d, b0, C, RATIO, dtype)
    e2 = _elu(tl.where(is_first, tl.load(past + c)[None, :], u2), dtype)
    e1 = _elu(tl.where(is_first, tl.load(past + C + c)[None, :], u1), dtype)
    for i in tl.range(RATIO, disable_licm=True):
        u = _upsample(before, own, w0, i, c, d, b0, C, RATIO, dtype)
        is_last = (j == T - 1) & (i >= RATIO - 2)
        tl.store(kept + (i + 0 * row)[:, None] * C + c[None, :], u, mask=is_last[:, None])
        e0 = _elu(u, dtype)
        y = _activated_block(e2, e1, e0, u, w1, b1, w2, b2, c, h, C, H, dtype)
        tl.store(out + (row * RATIO + i)[:, None] * C + c[None, :], y, mask=(j < T)[:, None])
        e2 = e1
        e1 = e0
