"""GELU and residual depthwise 3×3 convolution fused, one pass over memory in each direction. Needs Triton.

The map is the widest of a block, so that the number of times it is read or written determines the cost: forward 2 instead of
4; backward 3 (GELU before the convolution) or 6 (after it) instead of 7. Only the input is kept for the backward pass, which
computes GELU, and where needed the convolution, again.

Sums are float32, or float64 for float64 maps. Weight gradients are summed within a program of the kernel
(models/kernels/depthwise_triton.py), then over programs, always in the same order.
"""

import math
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton import language as tl

from ..kernels.depthwise_triton import mix, unmix

# B batch, C channels, H W map
MAX_ROWS = 32  # of a strip
INTERPRETED = not isinstance(mix, triton.JITFunction)  # TRITON_INTERPRET=1
DEVICE = "cpu" if INTERPRETED else "cuda"  # the type of the devices where the kernels run


class Tile(NamedTuple):
    """Tile of one program: strips and channels (powers of 2), columns of a strip, and warps."""

    strips: int
    columns: int
    channels: int
    warps: int


FORWARD = Tile(strips=4, columns=4, channels=64, warps=4)
BACKWARD = Tile(strips=4, columns=2, channels=64, warps=4)


def gelu_depthwise(x: Tensor, weight: Tensor, bias: Tensor, before: bool, shift: Tensor | None = None) -> Tensor:
    """Compute x + convolution of x, with GELU before or after: (B, H, W, C) -> same, contiguous, in x's or autocast's type.

    weight (C, 1, 3, 3), bias (C); shift (C) is added to x first. Weights keep their type under autocast. There is no second derivative. Raises ValueError for
    other shapes, and for types that differ outside autocast.
    """
    vectors = [bias] if shift is None else [bias, shift]
    if x.ndim != 4 or weight.shape != (x.shape[3], 1, 3, 3) or any(v.shape != x.shape[3:] for v in vectors):
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in (x, weight, *vectors))
        raise ValueError(f"x, weight and bias must have shapes (B, H, W, C), (C, 1, 3, 3) and (C,), not {shapes}")
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(kind))
    elif x.dtype != weight.dtype:
        raise ValueError(f"x is {x.dtype} and weight {weight.dtype}: give both one type, or use autocast")
    return _forward(x, weight, bias, shift, before)


@torch.library.custom_op("retoken::gelu_depthwise", mutates_args=())
def _forward(x: Tensor, weight: Tensor, bias: Tensor, shift: Tensor | None, before: bool) -> Tensor:
    out = x.new_empty(x.shape)
    _launch_mix(x, None, weight, bias, shift, out, BEFORE=before, AFTER=not before, SLOPE=False)
    return out


@torch.library.custom_op("retoken::gelu_depthwise_backward", mutates_args=())
def _backward(
    gradient: Tensor, x: Tensor, weight: Tensor, bias: Tensor, shift: Tensor | None, before: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x, weight, bias and shift, the last one empty without a shift."""
    if not before:
        through = x.new_empty(x.shape)
        _launch_mix(x, gradient, weight, bias, shift, through, BEFORE=False, AFTER=False, SLOPE=True)
        gradient = through
    out = x.new_empty(x.shape)
    sums = _launch_unmix(x, gradient, weight, shift, out, BEFORE=before)
    taps = sums[:, :9].sum(0).t().reshape(weight.shape)  # (C, 1, 3, 3)
    return (
        out,
        taps.to(weight.dtype, copy=True, memory_format=torch.contiguous_format),
        sums[:, 9].sum(0).to(bias.dtype),
        bias.new_empty(0) if shift is None else sums[:, 10].sum(0).to(shift.dtype),
    )


@_forward.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, shift: Tensor | None, before: bool) -> Tensor:
    return x.new_empty(x.shape)


@_backward.register_fake
def _(
    gradient: Tensor, x: Tensor, weight: Tensor, bias: Tensor, shift: Tensor | None, before: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    by_shift = bias.new_empty(0) if shift is None else shift.new_empty(shift.shape)
    return x.new_empty(x.shape), weight.new_empty(weight.shape), bias.new_empty(bias.shape), by_shift


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, Tensor | None, bool], output: Tensor) -> None:
    x, weight, bias, shift, ctx.before = inputs
    ctx.save_for_backward(x, weight, bias, shift)


def _differentiate(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None, None]:
    shift = ctx.saved_tensors[3]
    by_x, by_weight, by_bias, by_shift = _backward(gradient, *ctx.saved_tensors, ctx.before)
    return by_x, by_weight, by_bias, None if shift is None else by_shift, None


def _refuse(ctx: Any, *gradients: Tensor) -> None:
    raise RuntimeError("the depthwise kernel has no second derivative: set MODEL.KERNELS to off")


_forward.register_autograd(_differentiate, setup_context=_keep)
_backward.register_autograd(_refuse)


def _launch_mix(
    x: Tensor, gradient: Tensor | None, weight: Tensor, bias: Tensor, shift: Tensor | None, out: Tensor, **mode: bool
) -> None:
    if not x.numel():
        return
    x = _by_pixel(x)
    gradient = x if gradient is None else _by_pixel(gradient)
    strides = (*x.stride()[:3], *gradient.stride()[:3])
    B, H, W, C = x.shape
    grid, options = _plan(x, FORWARD)
    with torch.cuda.device_of(x):
        lift = (bias if shift is None else shift).contiguous()
        vectors, mode["LIFT"] = (weight.contiguous(), bias.contiguous(), lift), shift is not None
        mix[grid](x, gradient, *vectors, out, B, H, W, C, *strides, **mode, **options)


def _launch_unmix(
    x: Tensor, gradient: Tensor, weight: Tensor, shift: Tensor | None, out: Tensor, **mode: bool
) -> Tensor:
    """Write the gradient of x to `out`; return the sums of each program over its pixels: (programs of a channel, 10 or 11, C)."""
    B, H, W, C = x.shape
    wide, count = torch.float64 if x.dtype == torch.float64 else torch.float32, 10 if shift is None else 11
    if not x.numel():
        return x.new_zeros((1, count, C), dtype=wide)
    x, gradient = _by_pixel(x), _by_pixel(gradient)
    strides = (*x.stride()[:3], *gradient.stride()[:3])
    grid, options = _plan(x, BACKWARD)
    sums = x.new_empty((grid[0] // triton.cdiv(C, options["CHANNELS"]), count, C), dtype=wide)
    with torch.cuda.device_of(x):
        lift, mode["LIFT"] = (weight if shift is None else shift).contiguous(), shift is not None
        unmix[grid](x, gradient, weight.contiguous(), lift, out, sums, B, H, W, C, *strides, **mode, **options)
    return sums


def _by_pixel(x: Tensor) -> Tensor:
    """Copy a map unless its channels are adjacent and an image is short enough for 32-bit offsets."""
    return x if x.stride(3) == 1 and x.shape[1] * x.stride(1) < 2**31 else x.contiguous()


def _plan(x: Tensor, tile: Tile) -> tuple[tuple[int], dict[str, Any]]:
    """Return the grid and the options of a launch."""
    B, H, W, C = x.shape
    rows = math.ceil(H / math.ceil(H / MAX_ROWS))
    channels = min(tile.channels, triton.next_power_of_2(C))
    strips = B * math.ceil(H / rows) * math.ceil(W / tile.columns)
    options = {
        "ROWS": rows,
        "P": tile.strips,
        "COLUMNS": tile.columns,
        "CHANNELS": channels,
        "WIDE": tl.float64 if x.dtype == torch.float64 else tl.float32,
        "num_warps": tile.warps,
        "enable_fp_fusion": True,
    }
    return (math.ceil(strips / tile.strips) * math.ceil(C / channels),), options
