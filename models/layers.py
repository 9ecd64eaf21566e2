"""Layers that two or more families share. All work on (B, H, W, C) maps."""

from collections.abc import Callable
from typing import ClassVar

import torch
from timm.layers import register_notrace_function
from torch import Tensor, nn
from torch.nn import functional as F


class Conv1x1(nn.Conv2d):
    """A 1×1 convolution, run as one matrix product over the pixels: (..., C) -> (..., C').

    plain_weight says that the gradient comes in contiguous memory, and so should the weight be (for gradient buckets).
    """

    plain_weight: ClassVar[bool] = True

    def __init__(self, dim: int, out: int, bias: bool = True):
        super().__init__(dim, out, 1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.flatten(1), self.bias)


class DepthwiseConv(nn.Conv2d):
    """A depthwise convolution of odd size k: (B, H, W, C) -> (B, ceil(H / stride), ceil(W / stride), C)."""

    def __init__(self, dim: int, kernel_size: int, stride: int = 1, bias: bool = True):
        super().__init__(dim, dim, kernel_size, stride, kernel_size // 2, groups=dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)  # the convolution sees (B, C, H, W)


class ResidualDepthwiseConv(DepthwiseConv):
    """x + a 3×3 depthwise convolution of x, as one convolution: its centre tap has 1 added. (B, H, W, C) -> same."""

    def __init__(self, dim: int):
        super().__init__(dim, 3)

    def forward(self, x: Tensor) -> Tensor:
        itself = F.pad(self.weight.new_ones(1, 1, 1, 1), (1, 1, 1, 1))
        y = F.conv2d(x.permute(0, 3, 1, 2), self.weight + itself, self.bias, padding=1, groups=self.groups)
        return y.permute(0, 2, 3, 1)


class GeluDepthwiseConv(ResidualDepthwiseConv):
    """ResidualDepthwiseConv with GELU before it, or after. (B, H, W, C) -> same.

    kernel, if set (models/kernels.py), computes both at once on devices of the type kernel_device.
    """

    kernel: Callable[[Tensor, Tensor, Tensor, bool], Tensor] | None = None
    kernel_device = "cuda"

    def __init__(self, dim: int, gelu_before: bool):
        super().__init__(dim)
        self.gelu_before = gelu_before

    def forward(self, x: Tensor) -> Tensor:
        if self.kernel is not None and x.device.type == self.kernel_device:
            assert self.bias is not None
            return self.kernel(x, self.weight, self.bias, self.gelu_before)
        if self.gelu_before:
            return super().forward(F.gelu(x))
        return F.gelu(super().forward(x))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, gelu_before={self.gelu_before}, kernel={self.kernel is not None}"


class LayerNorm(nn.LayerNorm):
    """LayerNorm over channels whose training keeps float32 gradients under autocast on the CPU, too.

    PyTorch's backward pass there sums a bfloat16 input's weight gradients in bfloat16, off by half and more.
    """

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype) if torch.is_grad_enabled() else x)


class Mlp(nn.Module):
    """Two linear layers with GELU between: (..., C) -> (..., C)."""

    def __init__(self, dim: int, ratio: float):
        super().__init__()
        self.fc1 = nn.Linear(dim, int(dim * ratio))
        self.fc2 = nn.Linear(int(dim * ratio), dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


@register_notrace_function
def wide_softmax(x: Tensor, dim: int) -> Tensor:
    """Softmax in float32 or wider, returned in the type of `x`, so that products after it mix no types."""
    return torch.softmax(x, dim, dtype=torch.promote_types(x.dtype, torch.float32)).to(x.dtype)


def batch_norm(norm: nn.Module, x: Tensor) -> Tensor:
    """Apply a BatchNorm2d, or what SyncBatchNorm made of it, to a (B, H, W, C) map."""
    return norm(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)  # the norm sees (B, C, H, W)
