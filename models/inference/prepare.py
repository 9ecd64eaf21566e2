"""Trained models prepared for inference: folded, weights in the type of their products, on the CPU oneDNN's fused layers.

    fold        multiply constants into the weights (models/inference/fold.py)
    lower       store weights of products in autocast's type, which would otherwise cast them for every batch
    fuse        on the CPU, run a product or convolution and the activation after it as one operation, bias included; PyTorch's
                linear layers first copy the bias over the output, which reads and writes it once more

The function stays the same, but for rounding; `lower` alone changes no bit under autocast. There are no gradients.

A family declares on its classes which of its layers are fused:

    foldable                   on the Backbone itself: True admits it here; not inherited by its subclasses
    activation_after           names of the layers that the module's `act` follows at once, folded BatchNorms aside
    gelu_convolution           names of a layer and of the GeluDepthwiseConv after it
    uncalled                   names of children whose weights the module reads without calling them; they keep their type
"""

from collections.abc import Iterator
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..backbone import Backbone
from ..inference.fold import fold
from ..layers import Conv1x1, DepthwiseConv, GeluDepthwiseConv

ACTIVATIONS = {nn.GELU: "gelu", nn.Hardswish: "hardswish", nn.Identity: "none"}


@torch.no_grad()
def prepare_inference(model: nn.Module, dtype: torch.dtype | None = None) -> Backbone:
    """Prepare a model in evaluation mode for inference, in place; return it.

    dtype: the type of the autocast that it will run under. A prepared model no longer fits checkpoints, and where a BatchNorm
    precedes the classifier, `forward_features` omits it. Raises ValueError in training mode, and for a model whose class does
    not declare `foldable`.
    """
    if not is_foldable(model):
        raise ValueError(f"{type(model).__name__} cannot be folded: its class does not declare `foldable = True`")
    fold(model)
    parameter = next(model.parameters())
    fusing = parameter.device.type == "cpu" and parameter.dtype == torch.float32 and dtype in (None, torch.bfloat16)
    if dtype is not None:
        lower(model, dtype)
    if fusing:
        fuse(model, dtype or torch.float32)
    return model.requires_grad_(False)


def is_foldable(model: nn.Module) -> TypeGuard[Backbone]:
    """Return True if a model's own class declares `foldable`; a subclass may use the layers in other ways."""
    return isinstance(model, Backbone) and bool(vars(type(model)).get("foldable", False))


def lower(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast the weights of a folded model's products, in place, as autocast to `dtype` would for each batch."""
    for _, _, layer in _products(model):
        layer.to(dtype)


def fuse(model: nn.Module, dtype: torch.dtype = torch.float32) -> int:
    """Replace linear layers and convolutions of type `dtype` by oneDNN's fused ones, in place; return their number.

    The model stays unchanged, and the number is 0, where this PyTorch lacks the operations, this processor does not run them
    in this type, or they do not compute the same as PyTorch's own.
    """
    if not _usable(dtype):
        return 0
    for module in list(model.modules()):
        _fuse_activation(module)
        _fuse_hidden_gelu(module)
    for module, name, layer in _products(model):
        if isinstance(layer, nn.Linear | Conv1x1):
            setattr(module, name, _fused(layer, "none"))
    return sum(isinstance(module, OneDnnLinear | OneDnnConv) for module in model.modules())


def _products(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Linear | nn.Conv2d]]:
    """Yield each linear layer and convolution that is called as such, with its parent module and its name there."""
    others: set[nn.Module] = set()
    for module in model.modules():
        if isinstance(
            module, GeluDepthwiseConv
        ):  # left by `fold`: it runs a kernel, which takes weights in their own type
            others.add(module)
        for name in getattr(module, "uncalled", ()):
            others.update(getattr(module, name).modules())
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear | nn.Conv2d) and child not in others:
                yield module, name, child


def _fuse_activation(module: nn.Module) -> None:
    """Fuse the activation of a module into the layers before it."""
    names = getattr(module, "activation_after", ())
    for name in names:
        setattr(module, name, _fused(getattr(module, name), ACTIVATIONS[type(module.act)]))
    if names:
        module.act = nn.Identity()


def _fuse_hidden_gelu(module: nn.Module) -> None:
    """Fuse the GELU of a folded GeluDepthwiseConv into the layer before it: the module's layer or the convolution itself."""
    before, convolution = getattr(module, "gelu_convolution", ("", ""))
    folded = getattr(module, convolution) if convolution else None
    if not isinstance(folded, nn.Sequential):  # a kernel computes both
        return
    (gelu,) = (layer for layer in folded if isinstance(layer, nn.GELU))
    (plain,) = (layer for layer in folded if layer is not gelu)
    setattr(module, convolution, plain)
    name = before if folded[0] is gelu else convolution
    setattr(module, name, _fused(getattr(module, name), ACTIVATIONS[type(gelu)]))


def _fused(layer: nn.Module, activation: str) -> nn.Module:
    if isinstance(layer, DepthwiseConv):
        return OneDnnDepthwiseConv(layer, activation)
    if isinstance(layer, nn.Conv2d) and not isinstance(layer, Conv1x1):
        return OneDnnConv(layer, activation)
    return OneDnnLinear(layer, activation)


class OneDnnLinear(nn.Module):
    """Linear layer or 1×1 convolution of (..., C) and the activation after it: (..., C')."""

    def __init__(self, layer: nn.Module, activation: str):
        super().__init__()
        assert isinstance(layer, nn.Linear | nn.Conv2d)
        self.weight, self.bias, self.activation = nn.Parameter(layer.weight.flatten(1)), layer.bias, activation
        self.in_features, self.out_features = self.weight.shape[1], self.weight.shape[0]

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.weight.dtype).contiguous()
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, self.activation, [], _algorithm(self))

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, activation={self.activation}"


class OneDnnConv(nn.Module):
    """Convolution of (B, C, H, W) in channels_last and the activation after it."""

    def __init__(self, layer: nn.Conv2d, activation: str):
        super().__init__()
        assert not isinstance(layer.padding, str)
        self.weight, self.bias, self.activation = layer.weight, layer.bias, activation
        self.geometry = (list(layer.padding), list(layer.stride), list(layer.dilation), layer.groups)

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.weight.dtype)
        return torch.ops.mkldnn._convolution_pointwise(
            x, self.weight, self.bias, *self.geometry, self.activation, [], _algorithm(self)
        )

    def extra_repr(self) -> str:
        return f"{len(self.weight)}, {tuple(self.weight.shape[2:])}, activation={self.activation}"


class OneDnnDepthwiseConv(OneDnnConv):
    """Depthwise convolution of (B, H, W, C) and the activation after it."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def _algorithm(layer: Any) -> str:
    return "none" if layer.activation == "gelu" else ""  # of GELU: erf, not tanh


@torch.no_grad()
def _usable(dtype: torch.dtype) -> bool:
    """Return True if oneDNN's fused operations exist and agree with PyTorch's in float32.

    They are no public interface, and those in bfloat16 need AVX-512, unlike PyTorch's own.
    """
    if not torch.backends.mkldnn.is_available():
        return False
    with torch.device("meta"):
        linear, convolution = nn.Linear(8, 16), DepthwiseConv(8, 3)
    for layer in (linear, convolution):  # constant weights: PyTorch's random number generator is not used
        layer.to_empty(device="cpu").float()
        for parameter in layer.parameters():
            parameter.copy_(torch.linspace(-1, 1, parameter.numel()).to(dtype).view(parameter.shape))
    x = torch.linspace(-3, 3, 2 * 4 * 4 * 8).to(dtype).float().view(2, 4, 4, 8)
    with torch.autocast("cpu", enabled=False):
        want = (F.gelu(linear(x)), F.hardswish(linear(x)), linear(x), F.gelu(convolution(x)))
        try:
            got = [OneDnnLinear(linear.to(dtype), act)(x) for act in ("gelu", "hardswish", "none")]
            got.append(OneDnnDepthwiseConv(convolution.to(dtype), "gelu")(x))
        except (AttributeError, RuntimeError, TypeError):
            return False
    near = 1e-4 if dtype == torch.float32 else 0.02
    return all(torch.allclose(a.float(), b, rtol=near, atol=near) for a, b in zip(got, want, strict=True))
