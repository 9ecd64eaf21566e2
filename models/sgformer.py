"""SG-Former: attention to fine tokens in significant regions and to merged tokens elsewhere.

SG-Former: Self-guided Transformer with Evolving Token Reallocation (Ren et al., ICCV 2023), sections 3.1 to 3.4.
"""

import math
from collections.abc import Sequence
from typing import Any, ClassVar, Unpack

import torch
from timm.layers import DropPath, register_notrace_function
from timm.models import generate_default_cfgs
from torch import Tensor, nn
from torch.nn import functional as F

from .backbone import Backbone, HeadOptions, Stage, default_cfg, drop_path_rates, register_variant
from .layers import Conv1x1, DepthwiseConv, GeluDepthwiseConv, LayerNorm, group_norm
from .published import Rule
from .sgformer_attention import HybridScaleAttention, PlainAttention, SelfGuidedAttention

# B batch, C channels, H W grid, N = H*W tokens
REDUCTIONS = (8, 4, 2, 1)  # of the stages; 1 for plain attention


class DepthwiseMlp(nn.Module):
    """Two linear layers, with a residual depthwise convolution and GELU between."""

    gelu_convolution: ClassVar[tuple[str, str]] = ("fc1", "depthwise")

    def __init__(self, dim: int, ratio: float):
        super().__init__()
        hidden = int(dim * ratio)
        self.fc1 = nn.Linear(dim, hidden)
        self.depthwise = GeluDepthwiseConv(hidden, gelu_before=False)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:  # (B, H, W, C) -> same
        if isinstance(self.depthwise, GeluDepthwiseConv):
            return self.fc2(self.depthwise.after(self.fc1, x))
        return self.fc2(self.depthwise(self.fc1(x)))  # folded


class Block(nn.Module):
    """Attention and MLP, each with a residual connection. Takes and returns a significance map (B, H, W) or None."""

    def __init__(self, dim: int, attn: nn.Module, mlp_ratio: float, drop_path: float):
        super().__init__()
        self.norm1 = LayerNorm(dim, eps=1e-6)
        self.attn = attn
        self.norm2 = LayerNorm(dim, eps=1e-6)
        self.mlp = DepthwiseMlp(dim, mlp_ratio)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, significance: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        y, significance = self.attn(self.norm1(x), significance)
        x = x + self.drop_path(y)
        return x + self.drop_path(self.mlp(self.norm2(x))), significance


class Stem(nn.Module):
    """Three convolutions, two of stride 2, and a learned position embedding for the grid of `img_size`."""

    def __init__(self, in_chans: int, dim: int, img_size: tuple[int, int]):
        super().__init__()
        self.grid = (math.ceil(img_size[0] / 4), math.ceil(img_size[1] / 4))
        self.conv1 = nn.Conv2d(in_chans, dim, 3, 2, 1, bias=False)
        self.norm1 = nn.GroupNorm(1, dim)
        self.conv2 = nn.Conv2d(dim, dim, 3, 1, 1, bias=False)
        self.norm2 = nn.GroupNorm(1, dim)
        self.conv3 = nn.Conv2d(dim, dim, 3, 2, 1, bias=False)
        self.norm3 = nn.GroupNorm(1, dim)
        self.norm = LayerNorm(dim)
        self.act = nn.GELU()
        self.pos_embed = nn.Parameter(sine_cosine(*self.grid, dim))  # (1, N, C)

    def forward(self, x: Tensor) -> Tensor:  # (B, in_chans, H, W) -> (B, ~H/4, ~W/4, C)
        x = x.contiguous(memory_format=torch.channels_last)
        for conv, norm in ((self.conv1, self.norm1), (self.conv2, self.norm2)):
            y = self.act(group_norm(norm, conv(x).permute(0, 2, 3, 1)))  # (B, H, W, C)
            x = y.permute(0, 3, 1, 2)
        x = group_norm(self.norm3, self.conv3(x).permute(0, 2, 3, 1))
        return self.norm(x) + positions(self.pos_embed, self.grid, x.shape[1], x.shape[2])


class Downsample(nn.Module):
    """Three convolutions to the width of a stage, the second of stride 2."""

    def __init__(self, dim: int, out: int):
        super().__init__()
        self.conv1 = Conv1x1(dim, out, bias=False)
        self.norm1 = nn.GroupNorm(1, out)
        self.conv2 = DepthwiseConv(out, 3, stride=2, bias=False)
        self.norm2 = nn.GroupNorm(1, out)
        self.conv3 = Conv1x1(out, out, bias=False)
        self.norm3 = nn.GroupNorm(1, out)

    def forward(self, x: Tensor) -> Tensor:  # (B, H, W, C) -> (B, ~H/2, ~W/2, C')
        x = F.gelu(group_norm(self.norm1, self.conv1(x)))
        x = F.gelu(group_norm(self.norm2, self.conv2(x)))
        return group_norm(self.norm3, self.conv3(x))


class GuidedStage(Stage):
    """Stage whose blocks pass on a significance map."""

    def forward(self, x: Tensor) -> Tensor:
        x, significance = self.downsample(x), None
        for block in self.blocks:
            x, significance = self.run(block, x, significance)
        return self.norm(x)


def sine_cosine(H: int, W: int, dim: int) -> Tensor:
    """Return sines and cosines of the column, then of the row, at dim/4 frequencies from 1 to 1/10000: (1, N, C)."""
    if dim % 4:
        raise ValueError(f"dim={dim} must be a multiple of 4: sines and cosines of column and row share it")
    frequencies = 10000 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))

    def waves(length: int) -> Tensor:
        angles = torch.arange(length, dtype=torch.float64)[:, None] * frequencies
        return torch.cat([angles.sin(), angles.cos()], 1)  # (length, C/2)

    columns = waves(W).expand(H, -1, -1)
    rows = waves(H)[:, None].expand(-1, W, -1)
    return torch.cat([columns, rows], 2).view(1, H * W, dim).to(torch.get_default_dtype())


@register_notrace_function
def positions(embed: Tensor, grid: tuple[int, int], H: int, W: int) -> Tensor:
    """Resize a position embedding (1, N, C) of a grid bicubically to (1, H, W, C)."""
    embed = embed.unflatten(1, grid)
    if grid == (H, W):
        return embed
    wide = embed.to(torch.promote_types(embed.dtype, torch.float32)).permute(0, 3, 1, 2)
    return F.interpolate(wide, (H, W), mode="bicubic", antialias=True).permute(0, 2, 3, 1).to(embed.dtype)


def _keys_first(rows: int) -> Tensor:
    """Return the order of published rows (half of the heads, k v, channel) that sorts them by (k v, half, channel)."""
    return torch.arange(rows).view(2, 2, -1).transpose(0, 1).flatten()


OURS, THEIRS = "stages.{i}.blocks.{j}", "block{i+1}.{j}"
PUBLISHED = (
    Rule("stem.pos_embed", "pos_embed"),
    *(Rule(f"stem.conv{n + 1}.*", f"patch_embed1.conv.{2 * n}.c.*") for n in range(3)),
    *(Rule(f"stem.norm{n + 1}.*", f"patch_embed1.conv.{2 * n}.bn.*") for n in range(3)),
    Rule("stem.norm.*", "patch_embed1.norm.*"),
    Rule("stages.{i}.downsample.conv{n}.*", "patch_embed{i+1}.conv{n}.c.*"),
    Rule("stages.{i}.downsample.norm{n}.*", "patch_embed{i+1}.conv{n}.bn.*"),
    Rule("stages.3.blocks.{j}.attn.qkv.*", ("block4.{j}.attn.q.*", "block4.{j}.attn.kv.*"), parts=(1, 2)),
    Rule(
        f"{OURS}.attn.qkv.*",
        (f"{THEIRS}.attn.q1.*", f"{THEIRS}.attn.q2.*", f"{THEIRS}.attn.kv2.*"),
        parts=(1, 1, 2),
    ),
    Rule(f"{OURS}.attn.reduce.*", f"{THEIRS}.attn.sr.*"),
    Rule(f"{OURS}.attn.reduce_norm.*", f"{THEIRS}.attn.norm.*"),
    Rule(f"{OURS}.attn.reduced_kv.*", f"{THEIRS}.attn.kv1.*"),
    Rule(f"{OURS}.attn.kv.*", (f"{THEIRS}.attn.kv1.*", f"{THEIRS}.attn.kv2.*"), rows=_keys_first),
    Rule(f"{OURS}.attn.runs.{{n}}.*", f"{THEIRS}.attn.f{{n+1}}.*"),
    Rule(f"{OURS}.attn.position.linear.*", f"{THEIRS}.attn.lepe_linear.*"),
    Rule(f"{OURS}.attn.position.depthwise.*", f"{THEIRS}.attn.lepe_conv.*"),
    Rule(f"{OURS}.mlp.depthwise.*", f"{THEIRS}.mlp.dwconv.dwconv.*"),
    Rule(f"{OURS}.*", f"{THEIRS}.*"),  # norm1, norm2, q, proj, fc1, fc2
    Rule("stages.{i}.norm.*", "norm{i+1}.*"),
    Rule("head.*", "head.*"),
)


class SGFormer(Backbone):
    """SG-Former. Activations are (B, H, W, C); built for img_size, any other works."""

    published: ClassVar[Sequence[Rule]] = PUBLISHED
    resizable: ClassVar[Sequence[str]] = ("stem.pos_embed",)
    foldable: ClassVar[bool] = True
    stem: Stem

    def __init__(
        self,
        dims: Sequence[int],
        depths: Sequence[int],
        num_heads: Sequence[int],
        mlp_ratios: Sequence[float] = (4, 4, 4, 4),
        in_chans: int = 3,
        drop_path_rate: float = 0.0,
        img_size: int | tuple[int, int] | None = None,  # None is 224
        **head: Unpack[HeadOptions],
    ):
        size = img_size or 224
        rates = drop_path_rates(drop_path_rate, depths)
        stages = [
            GuidedStage(
                Downsample(dims[i - 1], dim) if i else nn.Identity(),
                [
                    Block(dim, make_attention(j, depths[i], dim, num_heads[i], REDUCTIONS[i]), mlp_ratios[i], rate)
                    for j, rate in enumerate(rates[i])
                ],
                LayerNorm(dim, eps=1e-6),
            )
            for i, dim in enumerate(dims)
        ]
        stem = Stem(in_chans, dims[0], (size, size) if isinstance(size, int) else size)
        super().__init__(stem, stages, nn.Identity(), dims, dims[-1], in_chans=in_chans, **head)

    def init_module(self, module: nn.Module) -> None:
        super().init_module(module)
        if isinstance(module, nn.Conv2d):
            k1, k2 = module.kernel_size
            nn.init.normal_(module.weight, std=math.sqrt(2 * module.groups / (k1 * k2 * module.out_channels)))
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    def fit_entry(self, name: str, tensor: Tensor) -> Tensor:
        """Resize a position embedding of another size, which must be square: its shape does not tell the grid."""
        if name != "stem.pos_embed" or tensor.ndim != 3 or tensor.shape[1] == math.prod(self.stem.grid):
            return tensor
        side = math.isqrt(tensor.shape[1])
        if side * side != tensor.shape[1]:
            raise ValueError(
                f"{name} has {tensor.shape[1]} positions, which make no square: build the model with the img_size that "
                f"these weights were trained at (it resizes to any image), not for a grid of {self.stem.grid}"
            )
        return positions(tensor, (side, side), *self.stem.grid).flatten(1, 2)


def make_attention(index: int, depth: int, dim: int, num_heads: int, reduction: int) -> nn.Module:
    """Build the attention of block `index` of a stage: hybrid-scale and self-guided in turn, plain without reduction."""
    if dim % num_heads:
        raise ValueError(f"dim={dim} must be a multiple of num_heads={num_heads}")
    if reduction == 1:
        return PlainAttention(dim, num_heads)
    if index % 2:
        return SelfGuidedAttention(dim, num_heads, reduction)
    return HybridScaleAttention(dim, num_heads, reduction, guides=index + 1 < depth)


default_cfgs = generate_default_cfgs(
    {f"sgformer_{size}": default_cfg("stem.conv1", crop_pct=0.9) for size in ("small", "medium", "base")}
)


@register_variant(SGFormer)
def sgformer_small() -> dict[str, Any]:
    """SG-Former-S: 22.5M parameters."""
    return {"dims": (64, 128, 256, 512), "depths": (2, 4, 16, 1), "num_heads": (2, 4, 8, 16)}


@register_variant(SGFormer)
def sgformer_medium() -> dict[str, Any]:
    """SG-Former-M: 39M parameters."""
    return {"dims": (64, 128, 256, 512), "depths": (2, 6, 28, 2), "num_heads": (2, 4, 8, 16)}


@register_variant(SGFormer)
def sgformer_base() -> dict[str, Any]:
    """SG-Former-B: 78M parameters."""
    return {"dims": (96, 192, 384, 768), "depths": (4, 6, 24, 2), "num_heads": (4, 6, 12, 24)}
