"""STViT: attention among super tokens, which pixels join and leave by a sparse association.

Vision Transformer with Super Token Sampling (Huang et al., CVPR 2023), sections 3.1 to 3.3.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from timm.layers import DropPath, register_notrace_module
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn
from torch.nn import functional as F

from .backbone import Backbone, Stage, build_variant, default_cfg, per_stage, spread
from .kernels.neighborhood import overlap_add, unfold_neighbors
from .layers import (
    Conv1x1,
    DepthwiseConv,
    GeluDepthwiseConv,
    LayerNorm,
    activate,
    attend_all,
    batch_norm,
    lowered,
)
from .published import Rule

# B batch, C channels, H W grid, N = H*W tokens, h w cells, M pixels of a cell, K heads, D = C/K
MLP_RATIO = 4
NECK_DIM = 1024
LAYER_SCALE = 1e-6  # at initialisation
EPS = 1e-12  # below the smallest float16: what it is added to is float32 or wider


def to_cells(x: Tensor, size: int) -> Tensor:
    """Cut a (B, H, W, C) map, padded with zeros, into cells of size × size pixels: (B, h, w, M, C)."""
    _, H, W, _ = x.shape
    if H % size or W % size:
        x = F.pad(x, (0, 0, 0, -W % size, 0, -H % size))
    x = x.unflatten(2, (-1, size)).unflatten(1, (-1, size))  # (B, h, size, w, size, C)
    return x.transpose(2, 3).flatten(3, 4)


def from_cells(x: Tensor, size: int, H: int, W: int) -> Tensor:
    """Undo `to_cells`: (B, h, w, M, C) -> (B, H, W, C)."""
    x = x.unflatten(3, (size, size)).transpose(2, 3)  # (B, h, size, w, size, C)
    return x.flatten(3, 4).flatten(1, 2)[:, :H, :W]


def affinity(cells: Tensor, tokens: Tensor) -> Tensor:
    """Share each pixel out among the nine super tokens around it, in float32 or wider.

    cells (B, h, w, M, C), tokens (B, h, w, C) -> (B, h, w, 9, M), a softmax over the nine. A neighbour outside the grid
    is a zero vector and takes its share.
    """
    scaled = tokens * tokens.shape[-1] ** -0.5
    logits = unfold_neighbors(scaled) @ cells.transpose(3, 4)
    return logits.softmax(3, dtype=torch.promote_types(logits.dtype, torch.float32))


def average(cells: Tensor, shares: Tensor) -> Tensor:
    """Average the pixels of each super token by their shares in it: (B, h, w, M, C) -> (B, h, w, C).

    What falls outside the grid is lost. Shares are divided by their sums before the product with the pixels, not
    after it: whatever its precision, that then adds up the weights of a mean.
    """
    factors = 1 / (overlap_add(shares.sum(4).unsqueeze(-1)) + EPS)  # (B, h, w, 1)
    weights = shares * unfold_neighbors(factors)
    return overlap_add(weights.to(cells.dtype) @ cells)


class Attention(nn.Module):
    """Multi-head attention among all positions of a map."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"dim={dim} must be a multiple of num_heads={num_heads}")
        self.num_heads = num_heads
        self.softmax_scale: float | None = None  # D^-0.5; 1 where it is in the weights (models/inference/fold.py)
        self.qkv = Conv1x1(dim, 3 * dim)  # rows by head, within it q, k, v
        self.proj = Conv1x1(dim, dim)

    def forward(self, x: Tensor) -> Tensor:  # (B, H, W, C) -> same
        B, H, W, C = x.shape
        q, k, v = self.qkv(x).reshape(B, H * W, self.num_heads, 3, C // self.num_heads).unbind(3)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        y_BKND = attend_all(q, k, v, self.softmax_scale)
        return self.proj(y_BKND.transpose(1, 2).reshape(B, H, W, C))


@register_notrace_module
class SuperTokenAttention(Attention):
    """Attention among super tokens: averages of the pixels associated with a cell and its eight neighbours.

    No gradient passes through the association of pixels with super tokens, nor through iterations before the last.
    """

    def __init__(self, dim: int, num_heads: int, cell: int, num_iters: int = 1):
        super().__init__(dim, num_heads)
        if num_iters < 1:
            raise ValueError(f"num_iters={num_iters}: super tokens need at least 1 iteration")
        self.cell, self.num_iters = cell, num_iters

    def forward(self, x: Tensor) -> Tensor:  # (B, H, W, C) -> same
        _, H, W, _ = x.shape
        cells = to_cells(lowered(x), self.cell)
        shares = self.share_out(cells.detach())
        tokens = super().forward(average(cells, shares))
        pixels = shares.to(tokens.dtype).transpose(3, 4) @ unfold_neighbors(tokens)
        return from_cells(pixels, self.cell, H, W)

    def share_out(self, cells: Tensor) -> Tensor:  # (B, h, w, M, C) -> (B, h, w, 9, M)
        """Share each pixel out among the nine super tokens around it."""
        shares = affinity(cells, cells.mean(3))
        for _ in range(self.num_iters - 1):
            shares = affinity(cells, average(cells, shares))
        return shares


class ConvMlp(nn.Module):
    """Two linear layers, with GELU and a residual depthwise convolution between."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = Conv1x1(dim, hidden)
        self.conv = GeluDepthwiseConv(hidden, gelu_before=True)
        self.fc2 = Conv1x1(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:  # (B, H, W, C) -> same
        return self.fc2(self.conv(self.fc1(x)))


class Block(nn.Module):
    """Position convolution, attention, MLP, each added to its input, the latter two scaled by channel if asked."""

    def __init__(
        self, dim: int, num_heads: int, cell: int, num_iters: int = 1, scaled: bool = False, drop_path: float = 0.0
    ):
        super().__init__()
        self.cpe = DepthwiseConv(dim, 3)
        self.norm1 = LayerNorm(dim, eps=1e-6)
        self.attn = SuperTokenAttention(dim, num_heads, cell, num_iters) if cell > 1 else Attention(dim, num_heads)
        self.norm2: nn.Module = nn.BatchNorm2d(dim)
        self.mlp = ConvMlp(dim, MLP_RATIO * dim)
        self.drop_path = DropPath(drop_path)
        self.scaled = scaled
        if scaled:  # in the published shape: of four dimensions, so that weight decay takes them, as it did
            self.gamma1 = nn.Parameter(torch.full((1, dim, 1, 1), LAYER_SCALE))
            self.gamma2 = nn.Parameter(torch.full((1, dim, 1, 1), LAYER_SCALE))

    def forward(self, x: Tensor) -> Tensor:  # (B, H, W, C) -> same
        x = x + self.cpe(x)  # not ResidualDepthwiseConv, which under autocast would round x too
        y = self.attn(self.norm1(x))  # float32 under autocast on any device
        x = x + self.drop_path(self.gamma1.flatten() * y if self.scaled else y)
        y = self.mlp(batch_norm(self.norm2, x))
        return x + self.drop_path(self.gamma2.flatten() * y if self.scaled else y)


class Stem(nn.Module):
    """Four convolutions, the first and third of stride 2."""

    def __init__(self, in_chans: int, dim: int):
        super().__init__()
        self.conv1 = nn.Conv2d(in_chans, dim // 2, 3, 2, 1)
        self.norm1 = nn.BatchNorm2d(dim // 2)
        self.conv2 = nn.Conv2d(dim // 2, dim // 2, 3, 1, 1)
        self.norm2 = nn.BatchNorm2d(dim // 2)
        self.conv3 = nn.Conv2d(dim // 2, dim, 3, 2, 1)
        self.norm3 = nn.BatchNorm2d(dim)
        self.conv4 = nn.Conv2d(dim, dim, 3, 1, 1)
        self.norm4 = nn.BatchNorm2d(dim)
        self.act = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:  # (B, in_chans, H, W) -> (B, ~H/4, ~W/4, C)
        x = x.contiguous(memory_format=torch.channels_last)
        x = self.norm1(activate(self.act, self.conv1(x)))
        x = self.norm2(activate(self.act, self.conv2(x)))
        x = self.norm3(activate(self.act, self.conv3(x)))
        return self.norm4(activate(self.act, self.conv4(x))).permute(0, 2, 3, 1)


class Downsample(nn.Module):
    """A convolution into the width, and half the grid, of a stage."""

    def __init__(self, dim: int, out: int):
        super().__init__()
        self.conv = nn.Conv2d(dim, out, 3, 2, 1)
        self.norm = nn.BatchNorm2d(out)

    def forward(self, x: Tensor) -> Tensor:  # (B, H, W, C) -> (B, ~H/2, ~W/2, C')
        return self.norm(self.conv(x.permute(0, 3, 1, 2))).permute(0, 2, 3, 1)


class Neck(nn.Module):
    """What widens the last map before it is pooled."""

    def __init__(self, dim: int, out: int):
        super().__init__()
        self.conv = Conv1x1(dim, out)
        self.norm = nn.BatchNorm2d(out)

    def forward(self, x: Tensor) -> Tensor:  # (B, C, H, W) -> (B, C', H, W)
        x = self.conv(x.permute(0, 2, 3, 1))
        return F.silu(batch_norm(self.norm, x)).permute(0, 3, 1, 2)


OURS, THEIRS = "stages.{i}.blocks.{j}", "layers.{i}.blocks.{j}"
PUBLISHED = (
    *(Rule(f"stem.conv{n}.*", f"patch_embed.proj.{3 * n - 3}.*") for n in (1, 2, 3, 4)),
    *(Rule(f"stem.norm{n}.*", f"patch_embed.proj.{3 * n - 1}.*") for n in (1, 2, 3, 4)),
    Rule("stages.{i}.downsample.conv.*", "layers.{i-1}.downsample.proj.0.*"),
    Rule("stages.{i}.downsample.norm.*", "layers.{i-1}.downsample.proj.1.*"),
    Rule(f"{OURS}.cpe.*", f"{THEIRS}.pos_embed.conv.*"),
    Rule(f"{OURS}.norm1.*", f"{THEIRS}.norm1.norm.*"),
    Rule(f"{OURS}.attn.*", f"{THEIRS}.attn.stoken_refine.*"),
    Rule(f"{OURS}.norm2.*", f"{THEIRS}.norm2.*"),
    Rule(f"{OURS}.mlp.conv.*", f"{THEIRS}.mlp2.conv.conv.*"),
    Rule(f"{OURS}.mlp.*", f"{THEIRS}.mlp2.*"),
    Rule(f"{OURS}.gamma{{n}}", f"{THEIRS}.gamma_{{n}}"),
    Rule("neck.conv.*", "proj.*"),
    Rule("neck.norm.*", "norm.*"),
    Rule("head.*", "head.*"),
)


class STViT(Backbone):
    """STViT. Activations are (B, H, W, C); any image size works."""

    published: ClassVar[Sequence[Rule]] = PUBLISHED

    def __init__(
        self,
        dims: Sequence[int],
        depths: Sequence[int],
        num_heads: Sequence[int],
        scaled_stages: Sequence[int] = (),  # those with layer scale
        cells: Sequence[int] = (8, 4, 1, 1),  # side of a cell; 1: attention among all pixels
        num_iters: int = 1,
        num_classes: int = 1000,
        in_chans: int = 3,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        global_pool: str = "avg",
        img_size: int | tuple[int, int] | None = None,  # nothing depends on it
    ):
        rates = per_stage(spread(drop_path_rate, sum(depths)), depths)
        stages = [
            Stage(
                Downsample(dims[i - 1], dim) if i else nn.Identity(),
                [Block(dim, num_heads[i], cells[i], num_iters, i in scaled_stages, rate) for rate in rates[i]],
            )
            for i, dim in enumerate(dims)
        ]
        super().__init__(
            Stem(in_chans, dims[0]),
            stages,
            Neck(dims[-1], NECK_DIM),
            dims,
            NECK_DIM,
            num_classes,
            in_chans,
            drop_rate,
            global_pool,
        )


default_cfgs = generate_default_cfgs(
    {f"stvit_{size}": default_cfg("stem.conv1") for size in ("small", "base", "large")}
)


@register_model
def stvit_small(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """STViT-S: 25M parameters."""
    shape = {"dims": (64, 128, 320, 512), "depths": (3, 5, 9, 3), "num_heads": (1, 2, 5, 8)}
    return build_variant(STViT, "stvit_small", pretrained, **{**shape, **kwargs})


@register_model
def stvit_base(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """STViT-B: 52M parameters."""
    shape = {"dims": (96, 192, 384, 512), "depths": (4, 6, 14, 6), "num_heads": (2, 3, 6, 8), "scaled_stages": (2, 3)}
    return build_variant(STViT, "stvit_base", pretrained, **{**shape, **kwargs})


@register_model
def stvit_large(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """STViT-L: 95M parameters."""
    shape = {"dims": (96, 192, 448, 640), "depths": (4, 7, 19, 8), "num_heads": (2, 3, 7, 10), "scaled_stages": (2, 3)}
    return build_variant(STViT, "stvit_large", pretrained, **{**shape, **kwargs})
