"""A trained model made ready to answer: folded, its weights in the type of its products, on the CPU with oneDNN's fused layers.

    fold        what is constant is in the weights (models/inference/fold.py)
    lower       weights of products lie in autocast's type, which would cast them anew for every batch
    fuse        on the CPU, a product or convolution and the activation after it are one operation, bias included; PyTorch's
                linear layers first spread the bias over the output, which reads and writes it once more

The same function, but for rounding; `lower` alone changes no bit under autocast. There are no gradients.
"""

from collections.abc import Iterator, Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import groupmixformer, sgformer, stvit
from ..backbone import Backbone
from ..inference.fold import fold
from ..layers import Conv1x1, DepthwiseConv, GeluDepthwiseConv, Mlp
from ..sgformer_attention import SelfGuidedAttention

FAMILIES = (sgformer.SGFormer, groupmixformer.GroupMixFormer, stvit.STViT)
ACTIVATIONS = {nn.GELU: "gelu", nn.Hardswish: "hardswish", nn.Identity: "none"}


@torch.no_grad()
def prepare_inference(model: nn.Module, dtype: torch.dtype | None = None) -> Backbone:
    """Make a model in evaluation mode ready, in place; return it. `dtype` is that of the autocast it will be called under.

    It fits no checkpoint any more, and where a BatchNorm precedes the classifier, `forward_features` leaves it out. Raises
    ValueError in training mode, and for a model that is not of our families.
    """
    if not is_known(model):
        raise ValueError(f"{type(model).__name__} is not of SG-Former, GroupMixFormer or STViT, which alone are folded")
    fold(model)
    parameter = next(model.parameters())
    fusing = parameter.device.type == "cpu" and parameter.dtype == torch.float32 and dtype in (None, torch.bfloat16)
    if dtype is not None:
        lower(model, dtype)
    if fusing:
        fuse(model, dtype or torch.float32)
    return model.requires_grad_(False)


def is_known(model: nn.Module) -> TypeGuard[Backbone]:
    """Say whether a model is of our families, and no subclass, which may use its layers in other ways."""
    return type(model) in FAMILIES


def lower(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast the weights of a folded model's products, in place, as autocast to `dtype` would for each batch."""
    for _, _, layer in _products(model):
        layer.to(dtype)


def fuse(model: nn.Module, dtype: torch.dtype = torch.float32) -> int:
    """Put oneDNN's layers in the place of linear layers and convolutions of type `dtype`, in place; return how many.

    Where this PyTorch has no such operations, this processor does not run them in this type, or they do not compute what
    PyTorch's own do, the model stays as it is: 0.
    """
    if not _usable(dtype):
        return 0
    for module in list(model.modules()):
        _join(module, _FOLLOWED_BY_ACT.get(type(module), ()))
        if isinstance(module, stvit.ConvMlp):
            _join_hidden(module, module.conv, "fc1", "conv")
        elif isinstance(module, sgformer.Mlp):
            _join_hidden(module, module.depthwise, "depthwise", "depthwise")
    for module, name, layer in _products(model):
        if isinstance(layer, nn.Linear | Conv1x1):
            setattr(module, name, _fused(layer, "none"))
    return sum(isinstance(module, OneDnnLinear | OneDnnConv) for module in model.modules())


def _products(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Linear | nn.Conv2d]]:
    """Give each linear layer and convolution that is called as one, with the module it belongs to and its name there."""
    guided = [module for module in model.modules() if isinstance(module, SelfGuidedAttention)]
    others: set[nn.Module] = {run for module in guided for run in module.runs}  # used otherwise, in their own type
    others |= {
        module for module in model.modules() if isinstance(module, GeluDepthwiseConv)
    }  # so do those with a kernel
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear | nn.Conv2d) and child not in others:
                yield module, name, child


# Layers that the activation `act` of their module follows at once, where BatchNorms between are folded.
_FOLLOWED_BY_ACT: dict[type[nn.Module], tuple[str, ...]] = {
    Mlp: ("fc1",),
    groupmixformer.Aggregator: ("pointwise",),
    groupmixformer.Downsample: ("pointwise",),
    groupmixformer.Stem: ("conv1", "conv2"),
    stvit.Stem: ("conv1", "conv2", "conv3", "conv4"),
}


def _join(module: nn.Module, names: Sequence[str]) -> None:
    """Fuse the activation of a module into the layers before it."""
    for name in names:
        setattr(module, name, _fused(getattr(module, name), ACTIVATIONS[type(module.act)]))
    if names:
        module.act = nn.Identity()


def _join_hidden(mlp: nn.Module, folded: nn.Module, before: str, convolution: str) -> None:
    """Fuse the GELU beside a folded depthwise convolution into the layer before it, which may be the convolution."""
    if isinstance(folded, nn.Sequential):  # without a kernel of Triton
        (gelu,) = (module for module in folded if isinstance(module, nn.GELU))
        (plain,) = (module for module in folded if module is not gelu)
        setattr(mlp, convolution, plain)
        setattr(mlp, before, _fused(getattr(mlp, before), ACTIVATIONS[type(gelu)]))


def _fused(layer: nn.Module, activation: str) -> nn.Module:
    if isinstance(layer, DepthwiseConv):
        return OneDnnDepthwiseConv(layer, activation)
    if isinstance(layer, nn.Conv2d) and not isinstance(layer, Conv1x1):
        return OneDnnConv(layer, activation)
    return OneDnnLinear(layer, activation)


class OneDnnLinear(nn.Module):
    """A linear layer or 1×1 convolution of (..., C) and the activation after it: (..., C')."""

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
    """A convolution of (B, C, H, W) in channels_last and the activation after it."""

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
    """The same of (B, H, W, C)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def _algorithm(layer: Any) -> str:
    return "none" if layer.activation == "gelu" else ""  # of GELU: erf, not tanh


@torch.no_grad()
def _usable(dtype: torch.dtype) -> bool:
    """Say whether oneDNN's fused operations are there and compute what PyTorch's do in float32.

    They are not a public interface, and those in bfloat16 need AVX-512, which PyTorch's own do not.
    """
    if not torch.backends.mkldnn.is_available():
        return False
    with torch.device("meta"):
        linear, convolution = nn.Linear(8, 16), DepthwiseConv(8, 3)
    for layer in (linear, convolution):  # no random numbers are drawn from PyTorch's stream
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
