"""GroupMixFormer: attention among groups of several granularities.

GroupMixFormer: Advancing Vision Transformers with Group-Mix Attention (Ge et al., 2023), sections 3.2 and 3.3.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from timm.layers import DropPath
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn
from torch.nn import functional as F

from .backbone import Backbone, Stage, build_variant, default_cfg, per_stage, spread
from .layers import Conv1x1, DepthwiseConv, LayerNorm, Mlp, activate, batch_norm, depthwise
from .layers import wide_softmax as softmax
from .published import Rule

# B batch, C channels, H W grid, N = H*W tokens, S = C/5 channels of a segment, K heads, D = 4S/K head channels
SEGMENTS = 5
KERNELS = (3, 5, 7)  # of the aggregators of segments 1 to 3, and of the position convolutions


class SharedDepthwiseConv(nn.Conv2d):
    """A depthwise convolution that does the same to q, k and v, lying one after the other in the channels."""

    plain_weight: ClassVar[bool] = True

    def __init__(self, dim: int, kernel_size: int):
        super().__init__(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim, bias=False)

    def forward(self, qkv: Tensor) -> Tensor:  # (B, H, W, 3S) -> same
        return depthwise(qkv, self.weight.repeat(3, 1, 1, 1), None)


class Aggregator(nn.Module):
    """Turn the pixels of a segment into proxies of their k×k neighbourhoods, alike for q, k and v."""

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
    """The segment that keeps single pixels: only normalised and activated."""

    def __init__(self, dim: int):
        super().__init__()
        self.dim = dim
        self.norm = nn.BatchNorm2d(dim)

    def forward(self, qkv: Tensor) -> Tensor:  # (B, H, W, 3S) -> (B, H, 3W, S)
        B, H, W, _ = qkv.shape
        return F.hardswish(batch_norm(self.norm, qkv.reshape(B, H, 3 * W, self.dim)))


class Bypass(nn.Module):
    """The segment that skips attention: a convolution mixes its q, k and v."""

    def __init__(self, dim: int):
        super().__init__()
        self.depthwise = DepthwiseConv(3 * dim, 3, bias=False)
        self.pointwise = Conv1x1(3 * dim, dim, bias=False)
        self.norm = LayerNorm(dim)

    def forward(self, qkv: Tensor) -> Tensor:  # (B, H, W, 3S) -> (B, H, W, S)
        return F.hardswish(self.norm(self.pointwise(self.depthwise(qkv))))


class RelativePosition(nn.Module):
    """Convolve v with a window that grows from head to head."""

    def __init__(self, heads: Sequence[int], head_dim: int):
        super().__init__()
        self.dims = [n * head_dim for n in heads]
        self.convs = nn.ModuleList(DepthwiseConv(dim, k) for dim, k in zip(self.dims, KERNELS, strict=True))

    def forward(self, v: Tensor) -> Tensor:  # (B, H, W, 4S) -> same
        near, middle, far = v.split(self.dims, -1)
        return torch.cat([self.convs[0](near), self.convs[1](middle), self.convs[2](far)], -1)


class GroupMixAttention(nn.Module):
    """Attend among pixels and group proxies: four segments attend linearly in the tokens, the fifth goes by."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        if dim % SEGMENTS or 4 * dim // SEGMENTS % num_heads:
            raise ValueError(f"dim={dim} must be a multiple of 5, and 4/5 of it a multiple of num_heads={num_heads}")
        segment = dim // SEGMENTS
        self.num_heads, self.segment = num_heads, segment
        self.scale = (dim / num_heads) ** -0.5  # of the whole width, not of the four attending segments
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
        # One product for all heads, zeros where they differ: heads are too narrow for products of their own to be faster.
        context = softmax(k.flatten(1, 2), 1).transpose(1, 2) @ v.flatten(1, 2)  # (B, 4S, 4S)
        y = q.flatten(1, 2) @ (self.scale * context).masked_fill(self.other_head, 0)
        y = torch.addcmul(y.reshape(B, H, W, 4 * self.segment), q, self.position(v))
        return self.proj(torch.cat([y, self.bypass(part4).to(y.dtype)], -1))

    def mix(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return q, k, v of pixels and proxies, each (B, H, W, 4S), and what goes by attention, (B, H, W, 3S)."""
        B, H, W, _ = x.shape
        part0, part1, part2, part3, part4 = self.qkv(x).split(3 * self.segment, -1)  # each (B, H, W, 3S)
        mixed = [segment(part) for segment, part in zip(self.segments, (part0, part1, part2, part3), strict=True)]
        qkv = torch.cat(mixed, -1).reshape(B, H, W, 3, 4 * self.segment)
        q, k, v = qkv.unbind(3)
        return q, k, v, part4


class Block(nn.Module):
    """Position convolution, group-mix attention, MLP, each added to its input."""

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

    def __init__(self, in_chans: int, dim: int):
        super().__init__()
        self.conv1 = nn.Conv2d(in_chans, dim // 2, 3, 2, 1)
        self.norm1 = nn.BatchNorm2d(dim // 2)
        self.conv2 = nn.Conv2d(dim // 2, dim, 3, 2, 1)
        self.norm2 = nn.BatchNorm2d(dim)
        self.act = nn.Hardswish()

    def forward(self, x: Tensor) -> Tensor:  # (B, in_chans, H, W) -> (B, ~H/4, ~W/4, C)
        x = x.contiguous(memory_format=torch.channels_last)
        x = activate(self.act, self.norm1(self.conv1(x)))
        return activate(self.act, self.norm2(self.conv2(x))).permute(0, 2, 3, 1)


class Downsample(nn.Module):
    """A separable convolution into the width, and from the second stage on half the grid, of a stage."""

    def __init__(self, dim: int, out: int, stride: int):
        super().__init__()
        self.depthwise = DepthwiseConv(dim, 3, stride, bias=False)
        self.pointwise = Conv1x1(dim, out, bias=False)
        self.norm = nn.BatchNorm2d(out)
        self.act = nn.Hardswish()

    def forward(self, x: Tensor) -> Tensor:  # (B, H, W, C) -> (B, ~H/stride, ~W/stride, C')
        return self.act(batch_norm(self.norm, self.pointwise(self.depthwise(x))))


def _by_segment(rows: int) -> Tensor:
    """Published qkv rows are (q k v, segment, channel); give their order by (segment, q k v, channel)."""
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

    def __init__(
        self,
        dims: Sequence[int],
        depths: Sequence[int],
        mlp_ratios: Sequence[float],
        num_heads: int = 8,
        num_classes: int = 1000,
        in_chans: int = 3,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        global_pool: str = "avg",
        img_size: int | tuple[int, int] | None = None,  # nothing depends on it
    ):
        rates = per_stage(spread(drop_path_rate, sum(depths)), depths)
        inputs = (dims[0], *dims[:-1])
        stages = [
            Stage(
                Downsample(inputs[i], dim, stride=2 if i else 1),
                [Block(dim, num_heads, mlp_ratios[i], rate) for rate in rates[i]],
            )
            for i, dim in enumerate(dims)
        ]
        super().__init__(
            Stem(in_chans, dims[0]),
            stages,
            nn.BatchNorm2d(dims[-1]),
            dims,
            dims[-1],
            num_classes,
            in_chans,
            drop_rate,
            global_pool,
        )


default_cfgs = generate_default_cfgs(
    {f"groupmixformer_{size}": default_cfg("stem.conv1") for size in ("mobile", "tiny", "small", "base", "large")}
)


@register_model
def groupmixformer_mobile(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """GroupMixFormer-M, "miny" in the published code: 5.7M parameters."""
    shape = {"dims": (40, 80, 160, 160), "depths": (3, 3, 12, 4), "mlp_ratios": (4, 4, 4, 4)}
    return build_variant(GroupMixFormer, "groupmixformer_mobile", pretrained, **{**shape, **kwargs})


@register_model
def groupmixformer_tiny(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """GroupMixFormer-T: 10.9M parameters (11.0M in the paper)."""
    shape = {"dims": (80, 160, 200, 240), "depths": (4, 4, 12, 4), "mlp_ratios": (4, 4, 4, 4)}
    return build_variant(GroupMixFormer, "groupmixformer_tiny", pretrained, **{**shape, **kwargs})


@register_model
def groupmixformer_small(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """GroupMixFormer-S: 22.4M parameters."""
    shape = {"dims": (80, 160, 320, 320), "depths": (2, 4, 12, 4), "mlp_ratios": (4, 4, 4, 4)}
    return build_variant(GroupMixFormer, "groupmixformer_small", pretrained, **{**shape, **kwargs})


@register_model
def groupmixformer_base(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """GroupMixFormer-B: 45.8M parameters."""
    shape = {"dims": (200, 240, 320, 480), "depths": (8, 8, 12, 8), "mlp_ratios": (2, 2, 4, 4)}
    return build_variant(GroupMixFormer, "groupmixformer_base", pretrained, **{**shape, **kwargs})


@register_model
def groupmixformer_large(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """GroupMixFormer-L: 71.8M parameters as the published config counts, 70.3M in the paper."""
    shape = {"dims": (240, 320, 360, 480), "depths": (8, 10, 30, 10), "mlp_ratios": (4, 4, 2, 2)}
    return build_variant(GroupMixFormer, "groupmixformer_large", pretrained, **{**shape, **kwargs})
