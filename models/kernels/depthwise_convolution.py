"""Depthwise convolution of (B, H, W, C) maps as one operator with fixed strides, for torch.compile on CUDA.

Inductor chooses the strides of convolutions itself, and in backward graphs copies whole maps into those of the weight's
gradient. Maps stay (B, H, W, C) around an operator that it does not know.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def has_operator(x: Tensor) -> bool:
    """Return True while torch.compile, but not torch.export, captures an operation on a CUDA tensor."""
    return torch.compiler.is_compiling() and not torch.compiler.is_exporting() and x.device.type == "cuda"


@torch.library.custom_op("retoken::depthwise", mutates_args=())
def depthwise_operator(x: Tensor, weight: Tensor, stride: int) -> Tensor:
    """Convolve each channel of (B, H, W, C) with its own kernel of odd size: weight (C, 1, k, k) of x's type, no bias.

    Returns (B, ceil(H / stride), ceil(W / stride), C), contiguous. There is no second derivative.
    """
    y = F.conv2d(x.permute(0, 3, 1, 2), weight, None, stride, weight.shape[-1] // 2, groups=len(weight))
    return y.permute(0, 2, 3, 1).contiguous()


@torch.library.custom_op("retoken::depthwise_backward", mutates_args=())
def _backward(gradient: Tensor, x: Tensor, weight: Tensor, stride: int) -> tuple[Tensor, Tensor]:
    """Return the gradients of x, contiguous, and of the weight, with the weight's strides."""
    pad = [weight.shape[-1] // 2] * 2
    by_x, by_weight, _ = torch.ops.aten.convolution_backward(
        gradient.permute(0, 3, 1, 2),
        x.permute(0, 3, 1, 2),
        weight,
        None,
        [stride] * 2,
        pad,
        [1, 1],
        False,
        [0, 0],
        len(weight),
        [True, True, False],
    )
    return by_x.permute(0, 2, 3, 1).contiguous(), torch.empty_like(weight).copy_(by_weight)


@depthwise_operator.register_fake
def _(x: Tensor, weight: Tensor, stride: int) -> Tensor:
    B, H, W, C = x.shape
    return x.new_empty(B, -(-H // stride), -(-W // stride), C)


@_backward.register_fake
def _(gradient: Tensor, x: Tensor, weight: Tensor, stride: int) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), torch.empty_like(weight)


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, int], output: Tensor) -> None:
    x, weight, ctx.stride = inputs
    ctx.save_for_backward(x, weight)


def _differentiate(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
    return *_backward(gradient, *ctx.saved_tensors, ctx.stride), None


depthwise_operator.register_autograd(_differentiate, setup_context=_keep)
