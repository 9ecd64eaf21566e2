"""GroupMixFormer: attention among groups of several granularities.

GroupMixFormer: Advancing Vision Transformers with Group-Mix Attention (Ge et al., 2023), sections 3.2 and 3.3.
"""

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Unpack

import torch
from timm.layers import DropPath
from timm.models import generate_default_cfgs
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from .attention_maps import AttentionReading, Token
from .backbone import Backbone, HeadOptions, Stage, default_cfg, drop_path_rates, register_variant
from .inference.fold import fold_into_previous
from .layers import Conv1x1, Conv2d, DepthwiseConv, LayerNorm, Mlp, activate, batch_norm, constant_depthwise, depthwise
from .layers import wide_softmax as softmax
from .published import Rule

# B batch, C channels, H W grid, N = H*W tokens, S = C/5 channels of a segment, K heads, D = 4S/K head channels
SEGMENTS = 5
KERNELS = (3, 5, 7)  # of the aggregators of segments 1 to 3, and of the position convolutions


class SharedDepthwiseConv(nn.Conv2d):
    """Depthwise convolution with one kernel for q, k and v, which are concatenated along the channels."""

    plain_weight: ClassVar[bool] = True

    def __init__(self, dim: int, kernel_size: int):
        super().__init__(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim, bias=False)

    def forward(self, qkv: Tensor) -> Tensor:  # (B, H, W, 3S) -> same
        return depthwise(qkv, self.weight.repeat(3, 1, 1, 1), None)

    def folded_layer(self) -> nn.Module:
        """Return a plain depthwise convolution whose kernel is repeated (models/inference/fold.py)."""
        return constant_depthwise(self.weight.repeat(3, 1, 1, 1), None, self.training)


class Aggregator(nn.Module):
    """Aggregation of a segment's pixels to proxies of their k×k neighbourhoods, with the same weights for q, k and v."""

    batch_norm_after: ClassVar[Sequence[tuple[str, str]]] = (("pointwise", "norm"),)
    activation_after: ClassVar[Sequence[str]] = ("pointwise",)

    def __init__(self, dim: int, kernel_size: int):
        super().__init__()
        self.dim = dim
        self.depthwise = SharedDepthwiseConv(dim, kernel_size)
        self.pointwise = Conv1x1(dim, dim, bias=False)
        self.norm = nn.BatchNorm2d(dim)
        self.act = nn.Hardswish()

    def forward(self, qkv: Tensor) -> Tensor:  # (B, H, W, 3S) -> (B, H, 3W, S), q, k and v of a pixel side by side
        B, H, W, _ = qkv.shape
        proxies = self.pointwise(self.depthwise(qkv).reshape(B, H, 3 * W, self.dim))
        return self.act(batch_norm(self.norm, proxies))


class PlainSegment(nn.Module):
    """Segment of single pixels, normalised and activated without aggregation."""

    def __init__(self, dim: int):
        super().__init__()
        self.dim = dim
        self.norm = nn.BatchNorm2d(dim)

    def forward(self, qkv: Tensor) -> Tensor:  # (B, H, W, 3S) -> (B, H, 3W, S)
        B, H, W, _ = qkv.shape
        return F.hardswish(batch_norm(self.norm, qkv.reshape(B, H, 3 * W, self.dim)))


class Bypass(nn.Module):
    """Segment without attention: convolutions mix its q, k and v."""

    def __init__(self, dim: int):
        super().__init__()
        self.depthwise = DepthwiseConv(3 * dim, 3, bias=False)
        self.pointwise = Conv1x1(3 * dim, dim, bias=False)
        self.norm = LayerNorm(dim)

    def forward(self, qkv: Tensor) -> Tensor:  # (B, H, W, 3S) -> (B, H, W, S)
        return F.hardswish(self.norm(self.pointwise(self.depthwise(qkv))))


class RelativePosition(nn.Module):
    """Depthwise convolution of v, with windows of 3, 5 and 7 pixels for successive groups of heads."""

    def __init__(self, heads: Sequence[int], head_dim: int):
        super().__init__()
        self.dims = [n * head_dim for n in heads]
        self.convs = nn.ModuleList(DepthwiseConv(dim, k) for dim, k in zip(self.dims, KERNELS, strict=True))

    def forward(self, v: Tensor) -> Tensor:  # (B, H, W, 4S) -> same
        near, middle, far = v.split(self.dims, -1)
        return torch.cat([self.convs[0](near), self.convs[1](middle), self.convs[2](far)], -1)


class GroupMixAttention(nn.Module):
    """Attention among pixels and group proxies: four segments in linear attention, the fifth in a convolutional bypass."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        if dim % SEGMENTS or 4 * dim // SEGMENTS % num_heads:
            raise ValueError(f"dim={dim} must be a multiple of 5, and 4/5 of it a multiple of num_heads={num_heads}")
        segment = dim // SEGMENTS
        self.num_heads, self.segment = num_heads, segment
        self.scale = (dim / num_heads) ** -0.5  # of all five segments, not of the four in attention
        head = torch.arange(4 * segment) // (4 * segment // num_heads)
        self.register_buffer("other_head", head[:, None] != head, persistent=False)  # (4S, 4S)
        self.other_head: Tensor
        self.qkv = nn.Linear(dim, 3 * dim)  # rows by segment, within it q, k, v
        self.segments = nn.ModuleList([PlainSegment(segment), *(Aggregator(segment, k) for k in KERNELS)])
        self.bypass = Bypass(segment)
        few, more = num_heads // 4, num_heads - num_heads // 4
        self.position = RelativePosition((few, more // 2, more - more // 2), 4 * segment // num_heads)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:  # (B, H, W, C) -> same
        B, H, W, _ = x.shape
        q, k, v, part4 = self.mix(x)
        # One product for all heads, masked to equal heads: heads are too narrow for separate products to be faster.
        context = softmax(k.flatten(1, 2), 1).transpose(1, 2) @ v.flatten(1, 2)  # (B, 4S, 4S)
        y = q.flatten(1, 2) @ (self.scale * context).masked_fill(self.other_head, 0)
        y = torch.addcmul(y.reshape(B, H, W, 4 * self.segment), q, self.position(v))
        return self.proj(torch.cat([y, self.bypass(part4).to(y.dtype)], -1))

    def mix(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return q, k, v of pixels and proxies, each (B, H, W, 4S), and the segment of the bypass, (B, H, W, 3S)."""
        B, H, W, _ = x.shape
        part0, part1, part2, part3, part4 = self.qkv(x).split(3 * self.segment, -1)  # each (B, H, W, 3S)
        mixed = [segment(part) for segment, part in zip(self.segments, (part0, part1, part2, part3), strict=True)]
        qkv = torch.cat(mixed, -1).reshape(B, H, W, 3, 4 * self.segment)
        q, k, v = qkv.unbind(3)
        return q, k, v, part4

    def fold_constants(self) -> dict[str, int]:
        """Fold the BatchNorm of the segment of single pixels into its rows of qkv."""
        pixels = self.segments[0]
        if not isinstance(pixels.norm, _BatchNorm):
            return {}
        fold_into_previous(self.qkv, pixels.norm, slice(0, 3 * self.segment), repeats=3)
        pixels.norm = nn.Identity()
        return {"BatchNorm": 1}

    def attention_maps(self, x: Tensor, significance: None, at: Token | None) -> Iterator[AttentionReading]:
        """Yield for each group its key weights, or the signed weights that a query gives to each token."""
        B, H, W, _ = x.shape
        q, k, _v, _bypass = self.mix(x)
        weights = softmax(k.flatten(1, 2), 1) * (H * W)  # (B, N, 4S), of mean 1
        heads = self.num_heads / 4  # of a group
        for i, side in enumerate((1, *KERNELS)):
            own = slice(i * self.segment, (i + 1) * self.segment)
            part = f"{side}×{side} group"
            if at is None:
                yield AttentionReading("keys", weights[..., own].mean(-1).view(B, H, W), part)
            else:  # y = scale * q (softmax(k)ᵀ v): the weight of each token, averaged over the heads of the group
                query = q[(slice(None), *at)][:, own, None]  # (B, S, 1)
                values = self.scale / heads * (weights[..., own] @ query).view(B, H, W)
                yield AttentionReading("attention", values, part, signed=True)


class Block(nn.Module):
    """Position convolution, group-mix attention and MLP, each with a residual connection."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, drop_path: float):
        super().__init__()
        self.cpe = DepthwiseConv(dim, 3)
        self.norm1 = LayerNorm(dim, eps=1e-6)
        self.attn = GroupMixAttention(dim, num_heads)
        self.norm2 = LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, mlp_ratio)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:  # (B, H, W, C) -> same
        x = x + self.cpe(x)
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class Stem(nn.Module):
    """Two convolutions of stride 2."""

    batch_norm_after: ClassVar[Sequence[tuple[str, str]]] = (("conv1", "norm1"), ("conv2", "norm2"))
    activation_after: ClassVar[Sequence[str]] = ("conv1", "conv2")

    def __init__(self, in_chans: int, dim: int):
        super().__init__()
        self.conv1 = Conv2d(in_chans, dim // 2, 3, 2, 1)
        self.norm1 = nn.BatchNorm2d(dim // 2)
        self.conv2 = Conv2d(dim // 2, dim, 3, 2, 1)
        self.norm2 = nn.BatchNorm2d(dim)
        self.act = nn.Hardswish()

    def forward(self, x: Tensor) -> Tensor:  # (B, in_chans, H, W) -> (B, ~H/4, ~W/4, C)
        x = x.contiguous(memory_format=torch.channels_last)
        x = activate(self.act, self.norm1(self.conv1(x)))
        return activate(self.act, self.norm2(self.conv2(x))).permute(0, 2, 3, 1)


class Downsample(nn.Module):
    """Separable convolution to the width of a stage and, from the second stage on, to half the grid."""

    batch_norm_after: ClassVar[Sequence[tuple[str, str]]] = (("pointwise", "norm"),)
    activation_after: ClassVar[Sequence[str]] = ("pointwise",)

    def __init__(self, dim: int, out: int, stride: int):
        super().__init__()
        self.depthwise = DepthwiseConv(dim, 3, stride, bias=False)
        self.pointwise = Conv1x1(dim, out, bias=False)
        self.norm = nn.BatchNorm2d(out)
        self.act = nn.Hardswish()

    def forward(self, x: Tensor) -> Tensor:  # (B, H, W, C) -> (B, ~H/stride, ~W/stride, C')
        return self.act(batch_norm(self.norm, self.pointwise(self.depthwise(x))))


def _by_segment(rows: int) -> Tensor:
    """Return the order of published qkv rows (q k v, segment, channel) that sorts them by (segment, q k v, channel)."""
    return torch.arange(rows).view(3, SEGMENTS, -1).transpose(0, 1).flatten()


OURS, THEIRS = "stages.{i}.blocks.{j}", "groupmixformer_backbone.{i}.gma_stage.{j}"
PUBLISHED = (
    Rule("stem.conv{n}.*", "conv_stem.proj{n}.*"),
    Rule("stem.norm{n}.*", "conv_stem.norm{n}.*"),
    Rule("stages.{i}.downsample.depthwise.*", "patch_embed_layers.{i}.proj.conv1.*"),
    Rule("stages.{i}.downsample.pointwise.*", "patch_embed_layers.{i}.proj.pointwise_conv.*"),
    Rule("stages.{i}.downsample.norm.*", "patch_embed_layers.{i}.norm.*"),
    Rule(f"{OURS}.cpe.*", f"{THEIRS}.cpe.proj.*"),
    Rule(f"{OURS}.attn.qkv.*", f"{THEIRS}.att.qkv.*", rows=_by_segment),
    Rule(f"{OURS}.attn.segments.{{s}}.depthwise.*", f"{THEIRS}.att.aggregator.agg{{s}}.conv1.*"),
    Rule(f"{OURS}.attn.segments.{{s}}.pointwise.*", f"{THEIRS}.att.aggregator.agg{{s}}.pointwise_conv.*"),
    Rule(f"{OURS}.attn.segments.{{s}}.norm.*", f"{THEIRS}.att.aggregator.norm{{s}}.*"),
    Rule(f"{OURS}.attn.bypass.norm.*", f"{THEIRS}.att.aggregator.agg0.norm.*"),
    Rule(f"{OURS}.attn.bypass.depthwise.*", f"{THEIRS}.att.aggregator.agg0.conv.conv1.*"),
    Rule(f"{OURS}.attn.bypass.pointwise.*", f"{THEIRS}.att.aggregator.agg0.conv.pointwise_conv.*"),
    Rule(f"{OURS}.attn.position.convs.{{n}}.*", f"{THEIRS}.att.crpe.conv_list.{{n}}.*"),
    Rule(f"{OURS}.attn.proj.*", f"{THEIRS}.att.proj.*"),
    Rule(f"{OURS}.*", f"{THEIRS}.*"),  # norm1, norm2, mlp
    Rule("neck.*", "norm4.*"),
    Rule("head.*", "head.*"),
)


class GroupMixFormer(Backbone):
    """GroupMixFormer. Activations are (B, H, W, C); any image size works."""

    published: ClassVar[Sequence[Rule]] = PUBLISHED
    foldable: ClassVar[bool] = True

    def __init__(
        self,
        dims: Sequence[int],
        depths: Sequence[int],
        mlp_ratios: Sequence[float],
        num_heads: int = 8,
        in_chans: int = 3,
        drop_path_rate: float = 0.0,
        img_size: int | tuple[int, int] | None = None,  # accepted as in all families, and not used
        **head: Unpack[HeadOptions],
    ):
        rates = drop_path_rates(drop_path_rate, depths)
        inputs = (dims[0], *dims[:-1])
        stages = [
            Stage(
                Downsample(inputs[i], dim, stride=2 if i else 1),
                [Block(dim, num_heads, mlp_ratios[i], rate) for rate in rates[i]],
            )
            for i, dim in enumerate(dims)
        ]
        stem, neck = Stem(in_chans, dims[0]), nn.BatchNorm2d(dims[-1])
        super().__init__(stem, stages, neck, dims, dims[-1], in_chans=in_chans, **head)


default_cfgs = generate_default_cfgs(
    {f"groupmixformer_{size}": default_cfg("stem.conv1") for size in ("mobile", "tiny", "small", "base", "large")}
)


@register_variant(GroupMixFormer)
def groupmixformer_mobile() -> dict[str, Any]:
    """GroupMixFormer-M, "miny" in the published code: 5.7M parameters."""
    return {"dims": (40, 80, 160, 160), "depths": (3, 3, 12, 4), "mlp_ratios": (4, 4, 4, 4)}


@register_variant(GroupMixFormer)
def groupmixformer_tiny() -> dict[str, Any]:
    """GroupMixFormer-T: 10.9M parameters (11.0M in the paper)."""
    return {"dims": (80, 160, 200, 240), "depths": (4, 4, 12, 4), "mlp_ratios": (4, 4, 4, 4)}


@register_variant(GroupMixFormer)
def groupmixformer_small() -> dict[str, Any]:
    """GroupMixFormer-S: 22.4M parameters."""
    return {"dims": (80, 160, 320, 320), "depths": (2, 4, 12, 4), "mlp_ratios": (4, 4, 4, 4)}


@register_variant(GroupMixFormer)
def groupmixformer_base() -> dict[str, Any]:
    """GroupMixFormer-B: 45.8M parameters."""
    return {"dims": (200, 240, 320, 480), "depths": (8, 8, 12, 8), "mlp_ratios": (2, 2, 4, 4)}


@register_variant(GroupMixFormer)
def groupmixformer_large() -> dict[str, Any]:
    """GroupMixFormer-L: 71.8M parameters in the published configuration, 70.3M in the paper."""
    return {"dims": (240, 320, 360, 480), "depths": (8, 10, 30, 10), "mlp_ratios": (4, 4, 2, 2)}
