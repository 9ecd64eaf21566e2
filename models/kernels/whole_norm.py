"""Normalisation of whole (H, W, C) maps, GroupNorm with one group, in a form that torch.compile fuses without copies.

PyTorch's operator first copies maps to (B, C, H, W). Here maps keep their strides, the backward pass takes all its sums in one
pass over the map, and only the input and two numbers an image are kept for it.
"""

from typing import Any

import torch
from torch import Tensor


def whole_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Normalise each image of x (B, H, W, C) over H, W and C; scale and shift by channel. Computes in float32 or wider."""
    return _WholeNorm.apply(x, weight, bias, eps)


class _WholeNorm(torch.autograd.Function):
    """GroupNorm(1) of (B, H, W, C) with its gradient written out."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        var, mean = torch.var_mean(wide, (1, 2, 3), correction=0, keepdim=True)
        scale = torch.rsqrt(var + eps)  # (B, 1, 1, 1)
        ctx.save_for_backward(x, weight, mean, scale)
        return (wide - mean) * scale * weight + bias

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x, weight, mean, scale = ctx.saved_tensors
        count = x[0].numel()
        wide, grad = x.to(mean.dtype), grad.to(mean.dtype)
        products = (grad * wide).sum((1, 2))  # (B, C)
        sums = grad.sum((1, 2))
        mean_B1, scale_B1 = mean.view(-1, 1), scale.view(-1, 1)
        by_weight = ((products - sums * mean_B1) * scale_B1).sum(0)
        along = ((products - sums * mean_B1) * weight).sum(1).view_as(mean)  # of the gradient with the centred map
        total = (sums * weight).sum(1).view_as(mean)
        slope = scale.pow(3) * along / count
        by_x = grad * (weight * scale) - (wide - mean) * slope - scale * total / count
        return by_x.to(x.dtype), by_weight.to(weight.dtype), sums.sum(0).to(weight.dtype), None
