"""Layers shared by two or more families. All operate on (B, H, W, C) maps."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import ClassVar

import torch
from timm.layers import register_notrace_function
from torch import Tensor, nn
from torch.nn import functional as F

from .kernels.depthwise_convolution import depthwise_operator, has_operator
from .kernels.whole_norm import whole_norm


class Conv2d(nn.Conv2d):
    """Convolution of (B, C, H, W). torch.compile on CUDA adds the bias apart, and joins that to what follows."""

    def forward(self, x: Tensor) -> Tensor:
        if self.bias is None or not has_operator(x):
            return super().forward(x)
        y = self._conv_forward(x, self.weight, None)
        return y + self.bias.to(y.dtype).view(-1, 1, 1)


class Conv1x1(nn.Conv2d):
    """1×1 convolution, computed as one matrix product over the pixels: (..., C) -> (..., C').

    plain_weight: the gradient is contiguous, and the weight should be so too (for gradient buckets).
    """

    plain_weight: ClassVar[bool] = True

    def __init__(self, dim: int, out: int, bias: bool = True):
        super().__init__(dim, out, 1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.flatten(1), self.bias)


def trains_lowered(x: Tensor) -> bool:
    """Return True if products of `x` are trained on the CPU in less than float32."""
    if not torch.is_grad_enabled() or x.device.type != "cpu":
        return False
    return torch.is_autocast_enabled("cpu") or x.dtype in (torch.bfloat16, torch.float16)


@register_notrace_function
def depthwise(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int = 1) -> Tensor:
    """Convolve each channel of (B, H, W, C) with its own kernel of odd size, weight (C, 1, k, k).

    In training on the CPU below float32, kernels larger than 3×3 and strides compute in float32: the gradient of such weights
    then takes a quarter of the time, that of the input of a stride a fiftieth.
    """
    k, C = weight.shape[-1], weight.shape[0]
    if has_operator(x):
        x = lowered(x).contiguous()  # of a slice of channels cuDNN would make a copy in each direction
        y = depthwise_operator(x, weight.to(x.dtype), stride)
        return y if bias is None else y + bias.to(y.dtype)  # an addition that Inductor joins to what follows
    kind = x.dtype
    wide = (k > 3 or stride > 1) and trains_lowered(x)
    if wide:
        x, weight, bias = x.float(), weight.float(), bias if bias is None else bias.float()
    with torch.autocast("cpu", enabled=False) if wide else nullcontext():
        y = F.conv2d(x.permute(0, 3, 1, 2), weight, bias, stride, k // 2, groups=C)  # sees (B, C, H, W)
    y = y.permute(0, 2, 3, 1)
    return y.to(kind) if wide and kind != torch.float32 else y


class DepthwiseConv(nn.Conv2d):
    """Depthwise convolution of odd size k: (B, H, W, C) -> (B, ceil(H / stride), ceil(W / stride), C)."""

    def __init__(self, dim: int, kernel_size: int, stride: int = 1, bias: bool = True):
        super().__init__(dim, dim, kernel_size, stride, kernel_size // 2, groups=dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return depthwise(x, self.weight, self.bias, self.stride[0])


@torch.no_grad()
def constant_depthwise(kernel: Tensor, bias: Tensor | None, training: bool) -> DepthwiseConv:
    """Build a depthwise convolution with a given kernel (C, 1, k, k) and bias (C), drawing no random numbers."""
    with torch.device("meta"):
        plain = DepthwiseConv(len(kernel), kernel.shape[-1], bias=bias is not None)
    plain = plain.to_empty(device=kernel.device).to(kernel.dtype).train(training)
    plain.weight.copy_(kernel)
    if bias is not None and plain.bias is not None:
        plain.bias.copy_(bias)
    return plain


class ResidualDepthwiseConv(DepthwiseConv):
    """x + 3×3 depthwise convolution of x, as one convolution with 1 added to its centre tap. (B, H, W, C) -> same."""

    def __init__(self, dim: int):
        super().__init__(dim, 3)

    def forward(self, x: Tensor) -> Tensor:
        return depthwise(x, self.kernel_with_itself(), self.bias)

    def kernel_with_itself(self) -> Tensor:
        """Return the weight with 1 added to the centre tap."""
        return self.weight + F.pad(self.weight.new_ones(1, 1, 1, 1), (1, 1, 1, 1))

    def folded_layer(self) -> nn.Module | None:
        """Return a plain depthwise convolution with 1 added to the centre tap (models/inference/fold.py)."""
        kernel = self.weight.detach().clone()
        kernel[:, :, 1, 1] += 1
        return constant_depthwise(kernel, self.bias, self.training)


class GeluDepthwiseConv(ResidualDepthwiseConv):
    """ResidualDepthwiseConv with GELU before it, or after. (B, H, W, C) -> same.

    kernel, if set (models/kernels/switch.py), computes both in one pass on devices of the type kernel_device.
    """

    kernel: Callable[[Tensor, Tensor, Tensor, bool, Tensor | None], Tensor] | None = None
    kernel_device = "cuda"

    def __init__(self, dim: int, gelu_before: bool):
        super().__init__(dim)
        self.gelu_before = gelu_before

    def forward(self, x: Tensor) -> Tensor:
        if self.runs_kernel(x):
            assert self.kernel is not None
            assert self.bias is not None
            return self.kernel(x, self.weight, self.bias, self.gelu_before, None)
        if self.gelu_before:
            return super().forward(F.gelu(x))
        return F.gelu(super().forward(x))

    def runs_kernel(self, x: Tensor) -> bool:
        """Return True if `forward` calls the kernel for x."""
        return self.kernel is not None and x.device.type == self.kernel_device

    def after(self, linear: nn.Linear | nn.Conv2d, x: Tensor) -> Tensor:
        """Compute forward(linear(x)); a kernel adds the linear layer's bias itself, and sums its gradient on the way."""
        if not self.runs_kernel(x):
            return self(linear(x))
        assert self.kernel is not None
        assert self.bias is not None
        hidden = F.linear(x, linear.weight.flatten(1))
        return self.kernel(hidden, self.weight, self.bias, self.gelu_before, linear.bias)

    def without_bias(self, x: Tensor) -> Tensor:
        """Convolve the GELU of x without the bias, for a layer after it that adds it."""
        return depthwise(F.gelu(x), self.kernel_with_itself(), None)

    def folded_layer(self) -> nn.Module | None:
        """Return GELU and a plain depthwise convolution in sequence; None with a kernel, which does both in one pass."""
        plain = super().folded_layer()
        if self.kernel is not None or plain is None:
            return None
        return nn.Sequential(nn.GELU(), plain) if self.gelu_before else nn.Sequential(plain, nn.GELU())

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, gelu_before={self.gelu_before}, kernel={self.kernel is not None}"


class LayerNorm(nn.LayerNorm):
    """LayerNorm over channels with float32 gradients under autocast, also on the CPU.

    PyTorch's backward pass there sums the weight gradients of a bfloat16 input in bfloat16, with errors of half and more.
    """

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype) if torch.is_grad_enabled() else x)


class Mlp(nn.Module):
    """Two linear layers with GELU between: (..., C) -> (..., C)."""

    activation_after: ClassVar[tuple[str, ...]] = ("fc1",)

    def __init__(self, dim: int, ratio: float):
        super().__init__()
        self.fc1 = nn.Linear(dim, int(dim * ratio))
        self.act = nn.GELU()
        self.fc2 = nn.Linear(int(dim * ratio), dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class ConvMlp(nn.Module):
    """Two linear layers, with GELU and a residual depthwise convolution between: (B, H, W, C) -> same."""

    gelu_convolution: ClassVar[tuple[str, str]] = ("fc1", "conv")

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = Conv1x1(dim, hidden)
        self.conv = GeluDepthwiseConv(hidden, gelu_before=True)
        self.fc2 = Conv1x1(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        if not isinstance(self.conv, GeluDepthwiseConv):  # folded
            return self.fc2(self.conv(self.fc1(x)))
        if self.conv.runs_kernel(x) or not has_operator(x):
            return self.fc2(self.conv.after(self.fc1, x))
        # Compiled, the convolution's bias is added after fc2: fewer passes over the widest map of a block.
        weight, bias = self.fc2.weight.flatten(1), self.fc2.bias
        return F.linear(self.conv.without_bias(self.fc1(x)), weight, bias_after(weight, bias, self.conv.bias))


@register_notrace_function
def bias_after(weight: Tensor, bias: Tensor, before: Tensor) -> Tensor:
    """Return the bias of a linear layer that also does what a bias `before` it did, without autocast."""
    with torch.autocast(weight.device.type, enabled=False):
        return torch.addmv(bias, weight, before)


@register_notrace_function
def lowered(x: Tensor) -> Tensor:
    """Cast to autocast's type if autocast is on, once for all products that follow."""
    kind = x.device.type
    if x.dtype == torch.float32 and torch.is_autocast_enabled(kind):
        return x.to(torch.get_autocast_dtype(kind))
    return x


@register_notrace_function
def attend_all(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """Attend with q (B, K, N, D) to k, v (B, K, M, D): (B, K, N, D). scale: D^-0.5 by default.

    In training on the CPU below float32 it computes matrix products: the gradient of PyTorch's own attention takes twice as
    long. The softmax adds up in float32 in both.
    """
    if q.dtype == torch.float32 or not trains_lowered(q):
        return F.scaled_dot_product_attention(q, k, v, scale=scale)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    p_BKNM = (q * scale @ k.transpose(2, 3)).softmax(3)
    return p_BKNM @ v


@register_notrace_function
def wide_softmax(x: Tensor, dim: int) -> Tensor:
    """Softmax in float32 or wider, returned in the type of `x`, so that products after it mix no types."""
    return torch.softmax(x, dim, dtype=torch.promote_types(x.dtype, torch.float32)).to(x.dtype)


def batch_norm(norm: nn.Module, x: Tensor) -> Tensor:
    """Apply a BatchNorm2d, or the SyncBatchNorm that replaced it, to a (B, H, W, C) map."""
    return norm(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)  # the norm sees (B, C, H, W)


def group_norm(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    """Apply a GroupNorm of one group to a (B, H, W, C) map."""
    if has_operator(x):
        return whole_norm(x, norm.weight, norm.bias, norm.eps)
    return norm(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1).contiguous()  # on GPUs the norm makes it (B, C, H, W)


def activate(act: nn.Module, x: Tensor) -> Tensor:
    """Apply an elementwise activation to a (B, C, H, W) map in channels_last.

    It sees (B, H, W, C): on the CPU PyTorch's GELU takes half the time on a contiguous tensor.
    """
    return act(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
