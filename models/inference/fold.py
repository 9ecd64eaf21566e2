"""Constants of a trained model multiplied into its weights: fewer operations, for inference only.

    BatchNorm                  into the convolution or linear layer before it, or after it where nothing is padded in between
    residual depthwise         the 1 of its centre tap into the kernel; kernels shared by q, k and v are repeated
    layer scale                into the projection before it
    softmax scale              into the rows of q

The function stays the same, but for rounding. STViT's stem keeps its BatchNorms: the convolutions after them pad with zeros,
which a shift by the mean would make non-zero. Weights of a folded model fit no other model.

A family declares its constants on its classes, and `fold` walks over the modules:

    batch_norm_after           class attribute: pairs of names, a layer and the BatchNorm that takes its output
    fold_constants()           method: fold the module's own constants; return the number of each kind
    folded_layer()             method: return the module to use instead of this one, None to keep it
"""

from collections import Counter
from collections.abc import Mapping
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..backbone import Backbone

KINDS = ("softmax scale", "BatchNorm", "layer scale", "depthwise kernel")  # in the order of results
Layer = nn.Conv2d | nn.Linear


@runtime_checkable
class FoldsConstants(Protocol):
    """Module that folds constants of its own."""

    def fold_constants(self) -> Mapping[str, int]: ...


@runtime_checkable
class FoldsIntoAnother(Protocol):
    """Layer that another one replaces in a folded model."""

    def folded_layer(self) -> nn.Module | None: ...


class ScaledAttention(Protocol):
    """Attention with a softmax scale: None for D^-0.5, 1 where the weights contain it."""

    softmax_scale: float | None


@torch.no_grad()
def fold(model: Backbone) -> dict[str, int]:
    """Fold a model in evaluation mode, in place; return the number of folded constants by kind.

    Raises ValueError in training mode.
    """
    if model.training:
        raise ValueError("a model in training mode cannot be folded, its BatchNorm statistics move; call eval() first")
    done = Counter(dict.fromkeys(KINDS, 0))
    for module in list(model.modules()):
        for layer, norm in getattr(module, "batch_norm_after", ()):
            if isinstance(getattr(module, norm), _BatchNorm):
                fold_into_previous(getattr(module, layer), getattr(module, norm))
                setattr(module, norm, nn.Identity())
                done["BatchNorm"] += 1
        if isinstance(module, FoldsConstants):
            done.update(module.fold_constants())
        for name, child in list(module.named_children()):
            if isinstance(child, FoldsIntoAnother) and (replacement := child.folded_layer()) is not None:
                setattr(module, name, replacement)
                done["depthwise kernel"] += 1
    done["BatchNorm"] += _fold_neck(model)
    return {kind: count for kind, count in done.items() if count}


def fold_into_previous(layer: Layer, norm: _BatchNorm, rows: slice = slice(None), repeats: int = 1) -> None:
    """Multiply a BatchNorm into rows of the layer before it. Rows of `repeats` times its channels repeat the channels."""
    factor, addend = (t.repeat(repeats) for t in _affine(norm))
    if layer.bias is None:
        layer.bias = nn.Parameter(layer.weight.new_zeros(len(layer.weight)))
    layer.weight[rows] *= factor.view(-1, *[1] * (layer.weight.ndim - 1))
    layer.bias[rows] = layer.bias[rows] * factor + addend


def fold_into_next(norm: _BatchNorm, layer: Layer) -> None:
    """Multiply a BatchNorm into the layer after it, which must not pad."""
    assert layer.bias is not None
    factor, addend = _affine(norm)
    layer.bias += (layer.weight.flatten(1) * addend).sum(1)  # autocast would lower a matrix product
    layer.weight *= factor.view(1, -1, *[1] * (layer.weight.ndim - 2))


def fold_softmax_scale(attention: ScaledAttention, layer: Layer, rows: Tensor, head_dim: int) -> dict[str, int]:
    """Multiply the softmax scale of an attention, head_dim^-0.5, into the rows of a layer that make q."""
    if attention.softmax_scale is not None:
        return {}
    assert layer.bias is not None
    layer.weight[rows] *= head_dim**-0.5
    layer.bias[rows] *= head_dim**-0.5
    attention.softmax_scale = 1.0
    return {"softmax scale": 1}


def fold_layer_scale(gamma: Tensor, layer: Layer) -> None:
    """Multiply a layer scale, one factor per channel, into the layer before it."""
    assert layer.bias is not None
    layer.weight *= gamma.view(-1, *[1] * (layer.weight.ndim - 1))
    layer.bias *= gamma.flatten()


def _affine(norm: _BatchNorm) -> tuple[Tensor, Tensor]:
    """Return factor and addend (C,) of a BatchNorm with fixed statistics."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    factor = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
    return factor, norm.bias - norm.running_mean * factor


def _fold_neck(model: Backbone) -> int:
    """Fold a neck that is a BatchNorm into the classifier: it commutes with the average pooling between them."""
    if not (isinstance(model.neck, _BatchNorm) and isinstance(model.head, nn.Linear) and model.global_pool == "avg"):
        return 0
    fold_into_next(model.neck, model.head)
    model.neck = nn.Identity()
    return 1
