"""Triton kernels of GELU fused with the residual depthwise 3×3 convolution (models/kernels/depthwise.py).

A program walks down P strips of COLUMNS columns and ROWS rows, CHANNELS channels of each. It holds three rows of a strip
with a column on either side, and so reads and activates a pixel 1 + 2 / COLUMNS times. Sums are of the type WIDE.
"""

import triton
from triton import language as tl

# B batch, C channels, H W map


@triton.jit
def _normal(x):
    """Return the normal distribution's cumulative probability of x, and exp(-x² / 2).

    In float32 by Hastings' formula (Abramowitz and Stegun 7.1.26): its error is at most 7.5e-8, that of float32, and it takes
    half the instructions of the library's erf.
    """
    if x.dtype == tl.float64:
        bell = tl.exp(-0.5 * x * x)
        cdf = 0.5 + 0.5 * tl.erf(x * 0.7071067811865476)
    else:
        bell = tl.exp2(x * x * -0.7213475204444817)
        d = 1.0 + 0.23164190 * tl.abs(x)
        k = tl.rsqrt(d * d)  # one instruction where 1 / d is eight
        tail = 0.5307027145 * k - 0.7265760135
        tail = tail * k + 0.7107068705
        tail = tail * k - 0.142248368
        tail = (tail * k + 0.127414796) * k * bell
        cdf = tl.where(x < 0, tail, 1.0 - tail)
    return cdf, bell


@triton.jit
def _gelu(x):
    cdf, _ = _normal(x)
    return x * cdf


@triton.jit
def _slope(x):
    """Return the derivative of GELU."""
    cdf, bell = _normal(x)
    return cdf + x * (bell * 0.3989422804014327)


@triton.jit
def _taps(weight, channel, C, WIDE: tl.constexpr):
    """Load the nine taps of the channels, with 1 added to the one in the centre."""
    taps = ()
    for k in tl.static_range(9):
        tap = tl.load(weight + channel * 9 + k, mask=channel < C, other=0.0).to(WIDE)
        taps += (tap + 1.0 if k == 4 else tap,)
    return taps


@triton.jit
def _strips(B, H, W, C, P: tl.constexpr, CHANNELS: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr):
    """Return this program's number among those of its channels, and image, top row, left column, channel and mask."""
    blocks, across, down = tl.cdiv(C, CHANNELS), tl.cdiv(W, COLUMNS), tl.cdiv(H, ROWS)
    number = tl.program_id(0) // blocks
    channel = (tl.program_id(0) % blocks * CHANNELS + tl.arange(0, CHANNELS))[None, :]
    strip = (number * P + tl.arange(0, P))[:, None]
    image = strip // (across * down)
    inside = (image < B) & (channel < C)
    return number, image.to(tl.int64), strip // across % down * ROWS, strip % across * COLUMNS, channel, inside


@triton.jit
def _row(
    pixel, row, left, inside, H, W, by_row, by_column, lift, LIFT: tl.constexpr, GELU: tl.constexpr, WIDE: tl.constexpr,
    COUNT: tl.constexpr,
):  # fmt: skip
    """Load COUNT columns of a row from `left` on, zero outside the map, with `lift` added and GELU applied if set."""
    values = ()
    for j in tl.static_range(COUNT):
        seen = inside & (row >= 0) & (row < H) & (left + j >= 0) & (left + j < W)
        value = tl.load(pixel + row * by_row + (left + j) * by_column, mask=seen, other=0.0).to(WIDE)
        if LIFT:
            value = tl.where(seen, value + lift, 0.0)
        values += (_gelu(value) if GELU else value,)
    return values


@triton.jit
def mix(
    x, gradient, weight, bias, shift, out, B, H, W, C, x_image, x_row, x_column, g_image, g_row, g_column,
    BEFORE: tl.constexpr, AFTER: tl.constexpr, SLOPE: tl.constexpr, LIFT: tl.constexpr, WIDE: tl.constexpr,
    ROWS: tl.constexpr, P: tl.constexpr, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Convolve, with GELU before it or after it, or followed by the derivative of GELU times a gradient."""
    _, image, top, left, channel, inside = _strips(B, H, W, C, P, CHANNELS, COLUMNS, ROWS)
    taps = _taps(weight, channel, C, WIDE)
    base = tl.load(bias + channel, mask=channel < C, other=0.0).to(WIDE)
    lift = tl.load(shift + channel, mask=channel < C, other=0.0).to(WIDE)
    pixel = x + image * x_image + channel
    answer = out + image * (H * W * C) + channel
    slope = gradient + image * g_image + channel
    upper = _row(pixel, top - 1, left - 1, inside, H, W, x_row, x_column, lift, LIFT, BEFORE, WIDE, COLUMNS + 2)
    middle = _row(pixel, top, left - 1, inside, H, W, x_row, x_column, lift, LIFT, BEFORE, WIDE, COLUMNS + 2)
    for i in tl.range(0, ROWS, loop_unroll_factor=3):
        row = top + i
        lower = _row(pixel, row + 1, left - 1, inside, H, W, x_row, x_column, lift, LIFT, BEFORE, WIDE, COLUMNS + 2)
        for j in tl.static_range(COLUMNS):
            seen = inside & (row < H) & (left + j < W)
            z = base
            for v in tl.static_range(3):
                z += taps[v] * upper[j + v]
                z += taps[3 + v] * middle[j + v]
                z += taps[6 + v] * lower[j + v]
            if AFTER:
                z = _gelu(z)
            if SLOPE:
                g = tl.load(slope + row * g_row + (left + j) * g_column, mask=seen, other=0.0).to(WIDE)
                z = g * _slope(z)
            tl.store(answer + (row * W + left + j) * C, z.to(out.dtype.element_ty), mask=seen)
        upper, middle = middle, lower


@triton.jit
def unmix(
    x, gradient, weight, shift, out, sums, B, H, W, C, x_image, x_row, x_column, g_image, g_row, g_column,
    BEFORE: tl.constexpr, LIFT: tl.constexpr, WIDE: tl.constexpr,
    ROWS: tl.constexpr, P: tl.constexpr, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Compute from the gradient of the convolution's output that of x, and sums for those of the nine taps, the bias and the shift."""
    number, image, top, left, channel, inside = _strips(B, H, W, C, P, CHANNELS, COLUMNS, ROWS)
    taps = _taps(weight, channel, C, WIDE)
    lift = tl.load(shift + channel, mask=channel < C, other=0.0).to(WIDE)
    pixel = x + image * x_image + channel
    answer = out + image * (H * W * C) + channel
    g = gradient + image * g_image + channel
    upper = _row(g, top - 1, left - 1, inside, H, W, g_row, g_column, lift, False, False, WIDE, COLUMNS + 2)
    middle = _row(g, top, left - 1, inside, H, W, g_row, g_column, lift, False, False, WIDE, COLUMNS + 2)
    totals = (tl.zeros((P, CHANNELS), WIDE),) * (11 if LIFT else 10)
    for i in tl.range(0, ROWS, loop_unroll_factor=3):
        row = top + i
        lower = _row(g, row + 1, left - 1, inside, H, W, g_row, g_column, lift, False, False, WIDE, COLUMNS + 2)
        for j in tl.static_range(COLUMNS):
            seen = inside & (row < H) & (left + j < W)
            a = tl.load(pixel + row * x_row + (left + j) * x_column, mask=seen, other=0.0).to(WIDE)
            if LIFT:
                a = tl.where(seen, a + lift, 0.0)
            slope = a
            if BEFORE:
                slope = _slope(a)
                a = _gelu(a)
            # The product of this pixel with tap k contributes to the pixel on the opposite side.
            around = (
                lower[j + 2], lower[j + 1], lower[j], middle[j + 2], middle[j + 1], middle[j],
                upper[j + 2], upper[j + 1], upper[j],
            )  # fmt: skip
            d = tl.zeros((P, CHANNELS), WIDE)
            added = ()
            for k in tl.static_range(9):
                d += taps[k] * around[k]
                added += (totals[k] + a * around[k],)
            added += (totals[9] + around[4],)
            if BEFORE:
                d *= slope
            if LIFT:
                added += (totals[10] + tl.where(seen, d, 0.0),)
            totals = added
            tl.store(answer + (row * W + left + j) * C, d.to(out.dtype.element_ty), mask=seen)
        upper, middle = middle, lower
    COUNT: tl.constexpr = 11 if LIFT else 10
    for k in tl.static_range(COUNT):
        total = tl.sum(totals[k], axis=0)[None, :]
        tl.store(sums + (number.to(tl.int64) * COUNT + k) * C + channel, total, mask=channel < C)
