"""A trained model for inference only, with fewer operations: what is constant is multiplied into the weights.

    BatchNorm                  into the convolution or matrix product before it, or after it where nothing is padded in between
    residual depthwise         the 1 of its centre tap into the kernel; kernels shared by q, k and v are laid out
    layer scale                into the projection before it
    softmax scale              into the rows of q

The same function, but for rounding. STViT's stem keeps its BatchNorms: the convolutions after them pad with zeros, which are no
longer zeros once a mean is subtracted. Weights of a folded model fit no other model.
"""

from collections import Counter

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .. import groupmixformer, sgformer_attention, stvit
from ..backbone import Backbone
from ..layers import DepthwiseConv, GeluDepthwiseConv, ResidualDepthwiseConv

Layer = nn.Conv2d | nn.Linear


@torch.no_grad()
def fold(model: Backbone) -> dict[str, int]:
    """Fold a model in evaluation mode, in place; return what was folded and how often. ValueError in training mode."""
    if model.training:
        raise ValueError("a model in training mode cannot be folded, its BatchNorm statistics move; call eval() first")
    done: Counter[str] = Counter()
    for module in list(model.modules()):
        for before, after in _PAIRS.get(type(module), ()):
            if isinstance(getattr(module, after), _BatchNorm):
                _into_layer_before(getattr(module, before), getattr(module, after))
                setattr(module, after, nn.Identity())
                done["BatchNorm"] += 1
        if isinstance(module, stvit.Block):
            done["BatchNorm"] += _fold_norm2(module)
            done["layer scale"] += _fold_layer_scale(module)
        elif isinstance(module, groupmixformer.GroupMixAttention):
            done["BatchNorm"] += _fold_plain_segment(module)
        done["softmax scale"] += _fold_scale(module)
        for name, child in list(module.named_children()):
            if (kernel := _plain_kernel(child)) is not None:
                setattr(module, name, kernel)
                done["depthwise kernel"] += 1
    done["BatchNorm"] += _fold_neck(model)
    return {what: count for what, count in done.items() if count}


# Where a BatchNorm follows a layer at once, by their names in the module.
_PAIRS: dict[type[nn.Module], tuple[tuple[str, str], ...]] = {
    groupmixformer.Stem: (("conv1", "norm1"), ("conv2", "norm2")),
    groupmixformer.Downsample: (("pointwise", "norm"),),
    groupmixformer.Aggregator: (("pointwise", "norm"),),
    stvit.Downsample: (("conv", "norm"),),
    stvit.Neck: (("conv", "norm"),),
}


def _affine(norm: _BatchNorm) -> tuple[Tensor, Tensor]:
    """Return factor and addend (C,) of a BatchNorm with fixed statistics."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    factor = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
    return factor, norm.bias - norm.running_mean * factor


def _into_layer_before(layer: Layer, norm: _BatchNorm, rows: slice = slice(None), repeats: int = 1) -> None:
    """Multiply a BatchNorm into rows of the layer whose output it takes, `repeats` times one below the other."""
    factor, addend = (t.repeat(repeats) for t in _affine(norm))
    if layer.bias is None:
        layer.bias = nn.Parameter(layer.weight.new_zeros(len(layer.weight)))
    layer.weight[rows] *= factor.view(-1, *[1] * (layer.weight.ndim - 1))
    layer.bias[rows] = layer.bias[rows] * factor + addend


def _into_layer_after(norm: _BatchNorm, layer: Layer) -> None:
    """Multiply a BatchNorm into the layer that takes its output, which must not pad."""
    assert layer.bias is not None
    factor, addend = _affine(norm)
    layer.bias += (layer.weight.flatten(1) * addend).sum(1)  # a product of matrices would be autocast's
    layer.weight *= factor.view(1, -1, *[1] * (layer.weight.ndim - 2))


def _fold_norm2(block: stvit.Block) -> int:
    if not isinstance(block.norm2, _BatchNorm):
        return 0
    _into_layer_after(block.norm2, block.mlp.fc1)
    block.norm2 = nn.Identity()
    return 1


def _fold_layer_scale(block: stvit.Block) -> int:
    if not block.scaled:
        return 0
    for gamma, layer in ((block.gamma1, block.attn.proj), (block.gamma2, block.mlp.fc2)):
        assert layer.bias is not None
        layer.weight *= gamma.view(-1, 1, 1, 1)
        layer.bias *= gamma.flatten()
    block.scaled = False
    del block.gamma1, block.gamma2
    return 2


def _fold_plain_segment(attention: groupmixformer.GroupMixAttention) -> int:
    """Fold the BatchNorm of the plain segment into its rows of qkv."""
    segment = attention.segments[0]
    if not isinstance(segment.norm, _BatchNorm):
        return 0
    _into_layer_before(attention.qkv, segment.norm, slice(0, 3 * attention.segment), repeats=3)
    segment.norm = nn.Identity()
    return 1


def _fold_neck(model: Backbone) -> int:
    """Fold the BatchNorm before the pooling, with which it commutes, into the classifier."""
    if not (isinstance(model.neck, _BatchNorm) and isinstance(model.head, nn.Linear) and model.global_pool == "avg"):
        return 0
    _into_layer_after(model.neck, model.head)
    model.neck = nn.Identity()
    return 1


def _fold_scale(module: nn.Module) -> int:
    """Multiply the scale of a softmax attention into the rows of q."""
    kinds = (
        stvit.Attention,
        sgformer_attention.PlainAttention,
        sgformer_attention.SelfGuidedAttention,
        sgformer_attention.HybridScaleAttention,
    )
    if not isinstance(module, kinds) or module.softmax_scale is not None:
        return 0
    layer: Layer = module.q if isinstance(module, sgformer_attention.SelfGuidedAttention) else module.qkv
    assert layer.bias is not None
    width = module.proj.in_features if isinstance(module.proj, nn.Linear) else module.proj.in_channels
    head_dim = width // module.num_heads
    if isinstance(module, stvit.Attention):  # rows by head, within it q, k, v
        rows = torch.arange(3 * width).view(module.num_heads, 3, head_dim)[:, 0].flatten()
    else:  # q first; of a hybrid attention the global and the local half
        rows = torch.arange(width)
    layer.weight[rows] *= head_dim**-0.5
    layer.bias[rows] *= head_dim**-0.5
    module.softmax_scale = 1.0
    return 1


def _plain_kernel(module: nn.Module) -> nn.Module | None:
    """Return the depthwise convolution, with its GELU, that does what a residual or shared one does; None for other modules."""
    if isinstance(module, GeluDepthwiseConv) and module.kernel is not None:  # it does all that in one pass
        return None
    if isinstance(module, ResidualDepthwiseConv):
        kernel = module.weight.clone()
        kernel[:, :, 1, 1] += 1
        bias = module.bias
    elif isinstance(module, groupmixformer.SharedDepthwiseConv):
        kernel, bias = module.weight.repeat(3, 1, 1, 1), None
    else:
        return None
    with torch.device("meta"):  # no random numbers are drawn
        plain = DepthwiseConv(len(kernel), kernel.shape[-1], bias=bias is not None)
    plain = plain.to_empty(device=kernel.device).to(kernel.dtype).train(module.training)
    plain.weight.copy_(kernel)
    if bias is not None and plain.bias is not None:
        plain.bias.copy_(bias)
    if isinstance(module, GeluDepthwiseConv):
        return nn.Sequential(nn.GELU(), plain) if module.gelu_before else nn.Sequential(plain, nn.GELU())
    return plain
