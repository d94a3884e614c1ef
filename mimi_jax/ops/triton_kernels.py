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
    TAPS: tl.constexpr, LEAD: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr,
    WIDTH: tl.constexpr,
):
    # fmt: on
    """Residual block; if there is a LEAD, also the activation after it.

    Then the result is what the next layer convolves: its past first, and zero after the end of each row.

    Args:
        x: [batch, T, C].
        past: [batch, TAPS - 1, C], of the first convolution.
        next_past: [batch, LEAD, C], of the layer after the block.
        lengths: [batch].
        w1, b1, w2, b2: [TAPS, C, H] and [H], [H, C] and [C].
        out: [batch, LEAD + T, C].
        kept: [batch, LEAD, C], the `next_past` of the next step.
        DEPTH: input channels of one product.
        WIDTH: output channels computed at once.
    """
    PAST: tl.constexpr = TAPS - 1
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
        back = PAST - tap
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
    e2, e1, e0, x, w1, b1, w2, b2, C: tl.constexpr, H: tl.constexpr, dtype: tl.constexpr
):
    """Residual block of kernel 3 on activated neighbours: [rows, C], without the activation after it."""
    c = tl.arange(0, C)
    h = tl.arange(0, H)
    at = c[:, None] * H + h[None, :]
    hidden = tl.dot(e2, tl.load(w1 + at))
    hidden = tl.dot(e1, tl.load(w1 + C * H + at), hidden)
    hidden = tl.dot(e0, tl.load(w1 + 2 * C * H + at), hidden)
    hidden = _elu(_add(hidden, tl.load(b1 + h), dtype), dtype)
    y = _add(tl.dot(hidden, tl.load(w2 + h[:, None] * C + c[None, :])), tl.load(b2 + c), dtype)
    return (x.to(tl.float32) + y.to(tl.float32)).to(dtype)


@triton.jit
def _first(
    x, past, w, b, row, t, T, TAPS: tl.constexpr, C: tl.constexpr, WINDOW: tl.constexpr, dtype: tl.constexpr
):
    """First convolution at times `t` of a waveform, as a product of windows: [rows, C]."""
    c = tl.arange(0, C)
    k = tl.arange(0, WINDOW)
    at = row[:, None] - (TAPS - 1) + k[None, :]
    s = t[:, None] - (TAPS - 1) + k[None, :]
    is_tap = (s >= 1 - TAPS) & (s < T) & (k < TAPS)[None, :]
    windows = tl.load(tl.where(s < 0, past + at, x + at), mask=is_tap, other=0.0)
    kernel = tl.load(w + k[:, None] * C + c[None, :], mask=(k < TAPS)[:, None], other=0.0)
    return _add(tl.dot(windows, kernel), tl.load(b + c), dtype)


@triton.jit
def _load_or(past, is_past, y, C: tl.constexpr):
    """One position of a past [C] in the rows that it belongs to, and else y."""
    return tl.where(is_past[:, None], tl.load(past + tl.arange(0, C))[None, :], y)


@triton.jit
def _store_row(to, y, is_row, C: tl.constexpr, ROWS: tl.constexpr):
    """One row of y [ROWS, C]."""
    at = tl.arange(0, C)[None, :] + tl.zeros((ROWS, 1), tl.int32)
    tl.store(to + at, y, mask=is_row[:, None])


# fmt: off
@triton.jit
def encoder_front(
    x, x_past, past, next_past, lengths, w0, b0, w1, b1, w2, b2, w3, b3, out, kept, next_kept, T,
    C: tl.constexpr, H: tl.constexpr, TAPS: tl.constexpr, RATIO: tl.constexpr, ROWS: tl.constexpr,
    WINDOW: tl.constexpr,
):
    # fmt: on
    """First convolution, residual block and downsampling.

    Rows of a tile are output positions, and the first one is halo. Phase i of row j is time j * RATIO + i. So
    the block's taps are the neighbouring phases. The downsampling sees each row and the one before it, which
    a product with a shift matrix makes, exactly.

    Args:
        x: [batch, T, 1].
        x_past, past, next_past: [batch, TAPS - 1, 1], [batch, 2, C] and [batch, RATIO, C], of the first
            convolution, the block and the downsampling.
        lengths: [batch]. The downsampling sees zeros after them.
        w0, b0: [TAPS, 1, C] and [C].
        w1, b1, w2, b2, w3, b3: [3, C, H] and [H], [H, C] and [C], [2 * RATIO, C, 2 * C] and [2 * C].
        out: [batch, T / RATIO, 2 * C].
        kept, next_kept: the `past` and the `next_past` of the next step.
        WINDOW: a power of two, at least TAPS and 16.
    """
    WIDTH: tl.constexpr = 2 * C
    dtype: tl.constexpr = out.dtype.element_ty
    batch = tl.program_id(1).to(tl.int64)
    start = tl.program_id(0) * (ROWS - 1) - 1
    row = tl.arange(0, ROWS)
    j = start + row
    c = tl.arange(0, C)
    x += batch * T + start * RATIO
    x_past += batch * (TAPS - 1) + TAPS - 1 + start * RATIO
    past += batch * 2 * C
    next_past += batch * RATIO * C
    out += (batch * (T // RATIO) + start) * WIDTH
    kept += (batch * 2 + 2 - RATIO) * C
    next_kept += batch * RATIO * C
    shift = (row[:, None] == row[None, :] + 1).to(dtype)
    is_last = (row > 0) & (j == T // RATIO - 1)
    x2 = _first(x, x_past, w0, b0, row * RATIO - 2, j * RATIO - 2, T, TAPS, C, WINDOW, dtype)
    x1 = _first(x, x_past, w0, b0, row * RATIO - 1, j * RATIO - 1, T, TAPS, C, WINDOW, dtype)
    e2 = _elu(_load_or(past, j == 0, x2, C), dtype)
    e1 = _elu(_load_or(past + C, j == 0, x1, C), dtype)
    low = tl.zeros((ROWS, C), tl.float32)  # the first half of the output channels
    high = tl.zeros((ROWS, C), tl.float32)
    for i in tl.range(RATIO, disable_licm=True):
        x0 = _first(x, x_past, w0, b0, row * RATIO + i, j * RATIO + i, T, TAPS, C, WINDOW, dtype)
        e0 = _elu(x0, dtype)
        y = _activated_block(e2, e1, e0, x0, w1, b1, w2, b2, C, H, dtype)
        if start < 0:
            y = _load_or(next_past + i * C, j < 0, y, C)
        y = tl.where((j * RATIO + i < tl.load(lengths + batch))[:, None], y, 0.0).to(dtype)
        if start + ROWS >= T // RATIO:
            _store_row(kept + i * C, x0, is_last & (i >= RATIO - 2), C, ROWS)
            _store_row(next_kept + i * C, y, is_last, C, ROWS)
        y = _elu(y, dtype)
        before = tl.dot(shift, y).to(dtype)
        at = (i * C + c)[:, None] * WIDTH + c[None, :]
        low = tl.dot(before, tl.load(w3 + at), low)
        high = tl.dot(before, tl.load(w3 + C + at), high)
        low = tl.dot(y, tl.load(w3 + RATIO * C * WIDTH + at), low)
        high = tl.dot(y, tl.load(w3 + RATIO * C * WIDTH + C + at), high)
        e2, e1 = e1, e0
    keep = (row > 0) & (j < T // RATIO)
    out += row[:, None] * WIDTH + c[None, :]
    tl.store(out, _add(low, tl.load(b3 + c), dtype), mask=keep[:, None])
    tl.store(out + C, _add(high, tl.load(b3 + C + c), dtype), mask=keep[:, None])


@triton.jit
def _upsample(before, own, w0, b0, i, C: tl.constexpr, RATIO: tl.constexpr, dtype: tl.constexpr):
    """Phase i of the positions that two activated neighbours [rows, 2 * C] reach: [rows, C]."""
    SIZE: tl.constexpr = 2 * C
    c = tl.arange(0, C)
    at = tl.arange(0, SIZE)[:, None] * (RATIO * C) + i * C + c[None, :]
    y = tl.dot(before, tl.load(w0 + at), tl.dot(own, tl.load(w0 + SIZE * RATIO * C + at)))
    return _add(y, tl.load(b0 + c), dtype)


@triton.jit
def _last(y, w, C: tl.constexpr):
    """What positions [rows, C] give to the last convolution: two and one positions later, and at their own.

    For 3 taps, the product is 16 wide, as Triton's have to be.
    """
    c = tl.arange(0, C)
    tap = tl.arange(0, 16)[None, :]
    given = tl.dot(y, tl.load(w + tap * C + c[:, None], mask=tap < 3, other=0.0))
    far = tl.sum(tl.where(tap == 0, given, 0.0), axis=1)
    near = tl.sum(tl.where(tap == 1, given, 0.0), axis=1)
    return far, near, tl.sum(tl.where(tap == 2, given, 0.0), axis=1)


@triton.jit
def _shift(values, row):
    """The value of the row before, and 0 in the first row."""
    return tl.sum(tl.where(row[:, None] == row[None, :] + 1, values[None, :], 0.0), axis=1)


# fmt: off
@triton.jit
def decoder_back(
    x, x_past, past, next_past, w0, b0, w1, b1, w2, b2, w3, b3, out, kept, next_kept, T, C: tl.constexpr,
    H: tl.constexpr, RATIO: tl.constexpr, ROWS: tl.constexpr,
):
    # fmt: on
    """Upsampling, residual block and last convolution.

    Rows of a tile are input positions, and the first one is halo. Phase i of row j is time j * RATIO + i of
    the output. The taps of the block are the neighbouring phases; of the row before, the last two phases are
    computed again. The last convolution reaches from the last two phases of a row to the first two of the
    next one, which therefore wait for the end of the loop.

    Args:
        x: [batch, T, 2 * C].
        x_past, past, next_past: [batch, 1, 2 * C], [batch, 2, C] and [batch, 2, C], of the upsampling, the
            block and the last convolution.
        w0, b0: [2, 2 * C, RATIO, C] and [C].
        w1, b1, w2, b2, w3, b3: [3, C, H] and [H], [H, C] and [C], [3, C, 1] and [1].
        out: [batch, T * RATIO, 1].
        kept, next_kept: the `past` and the `next_past` of the next step.
    """
    SIZE: tl.constexpr = 2 * C
    dtype: tl.constexpr = out.dtype.element_ty
    batch = tl.program_id(1).to(tl.int64)
    start = tl.program_id(0) * (ROWS - 1) - 1
    row = tl.arange(0, ROWS)
    j = start + row
    d = tl.arange(0, SIZE)
    x += (batch * T + start) * SIZE
    x_past += (batch + 1 + start) * SIZE
    past += batch * 2 * C
    next_past += (batch * 2 + 2 - RATIO) * C
    out += (batch * T + start) * RATIO
    kept += (batch * 2 + 2 - RATIO) * C
    next_kept += (batch * 2 + 2 - RATIO) * C
    keep = (row > 0) & (j < T)

    before2 = _elu(_load(x, x_past, row - 2, j - 2, T, d, SIZE, 1), dtype)
    before = _elu(_load(x, x_past, row - 1, j - 1, T, d, SIZE, 1), dtype)
    u2 = _upsample(before2, before, w0, b0, RATIO - 2, C, RATIO, dtype)
    u1 = _upsample(before2, before, w0, b0, RATIO - 1, C, RATIO, dtype)
    e2 = _elu(_load_or(past, j == 0, u2, C), dtype)
    e1 = _elu(_load_or(past + C, j == 0, u1, C), dtype)
    own = _elu(_load(x, x_past, row, j, T, d, SIZE, 1), dtype)
    zero = tl.zeros((ROWS,), tl.float32)
    far2, far, near, sum0, sum1 = zero, zero, zero, zero, zero  # two from phase i - 1, and of phases 0 and 1
    for i in tl.range(RATIO, disable_licm=True):
        u = _upsample(before, own, w0, b0, i, C, RATIO, dtype)
        e0 = _elu(u, dtype)
        y = _activated_block(e2, e1, e0, u, w1, b1, w2, b2, C, H, dtype)
        if (start < 0) & (i >= RATIO - 2):
            y = _load_or(next_past + i * C, j < 0, y, C)
        if (start + ROWS >= T) & (i >= RATIO - 2):
            _store_row(kept + i * C, u, keep & (j == T - 1), C, ROWS)
            _store_row(next_kept + i * C, y, keep & (j == T - 1), C, ROWS)
        new_far, new_near, total = _last(_elu(y, dtype), w3, C)
        total += far2 + near + tl.load(b3).to(tl.float32)
        tl.store(out + row * RATIO + i, total.to(dtype), mask=keep & (i > 1))
        sum0 = tl.where(i == 0, total, sum0)
        sum1 = tl.where(i == 1, total, sum1)
        far2, far, near = far, new_far, new_near
        e2, e1 = e1, e0
    tl.store(out + row * RATIO, (sum0 + _shift(far2 + near, row)).to(dtype), mask=keep)
    tl.store(out + row * RATIO + 1, (sum1 + _shift(far, row)).to(dtype), mask=keep)
