"""STViT: attention among super tokens, with a sparse affinity between pixels and super tokens.

Vision Transformer with Super Token Sampling (Huang et al., CVPR 2023), sections 3.1 to 3.3.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, ClassVar, Unpack

import torch
from timm.layers import DropPath, register_notrace_module
from timm.models import generate_default_cfgs
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from .attention_maps import AttentionReading, Token, attention_to_tokens, softmax_probabilities
from .backbone import Backbone, HeadOptions, Stage, default_cfg, drop_path_rates, register_variant
from .inference.fold import fold_into_next, fold_layer_scale, fold_softmax_scale
from .kernels.neighborhood import overlap_add, unfold_neighbors
from .layers import Conv1x1, Conv2d, ConvMlp, DepthwiseConv, LayerNorm, activate, attend_all, batch_norm, lowered
from .published import Constant, Rule

# B batch, C channels, H W grid, N = H*W tokens, h w cells, M pixels of a cell, K heads, D = C/K
MLP_RATIO = 4
NECK_DIM = 1024
LAYER_SCALE = 1e-6  # at initialisation
EPS = 1e-12  # below the smallest float16: sums that it is added to are float32 or wider


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


def neighbor_affinity(cells: Tensor, tokens: Tensor) -> Tensor:
    """Return the affinity of each pixel to the nine super tokens around it, in float32 or wider.

    cells (B, h, w, M, C), tokens (B, h, w, C) -> (B, h, w, 9, M), a softmax over the nine. Neighbours outside the grid are
    zero vectors and take part in the softmax.
    """
    scaled = tokens * tokens.shape[-1] ** -0.5
    logits = unfold_neighbors(scaled) @ cells.transpose(3, 4)
    return logits.softmax(3, dtype=torch.promote_types(logits.dtype, torch.float32))


def affinity_sums(affinity: Tensor) -> Tensor:
    """Return the sum over the pixels of their affinity to each super token: (B, h, w, 9, M) -> (B, h, w, 1)."""
    return overlap_add(affinity.sum(4).unsqueeze(-1)) + EPS


def average(cells: Tensor, affinity: Tensor) -> Tensor:
    """Average the pixels of each super token, weighted by their affinity to it: (B, h, w, M, C) -> (B, h, w, C).

    Affinity to neighbours outside the grid is dropped. It is divided by its sums before the product with the pixels, not after
    it, so that the product adds up the weights of a mean, whatever its precision.
    """
    weights = affinity * unfold_neighbors(1 / affinity_sums(affinity))
    return overlap_add(weights.to(cells.dtype) @ cells)


class Attention(nn.Module):
    """Multi-head attention among all positions of a map."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"dim={dim} must be a multiple of num_heads={num_heads}")
        self.num_heads = num_heads
        self.softmax_scale: float | None = None  # D^-0.5; 1 once it is folded into the weights
        self.qkv = Conv1x1(dim, 3 * dim)  # rows by head, within it q, k, v
        self.proj = Conv1x1(dim, dim)

    def forward(self, x: Tensor) -> Tensor:  # (B, H, W, C) -> same
        B, H, W, C = x.shape
        q, k, v = self.qkv(x).reshape(B, H * W, self.num_heads, 3, C // self.num_heads).unbind(3)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        y_BKND = attend_all(q, k, v, self.softmax_scale)
        return self.proj(y_BKND.transpose(1, 2).reshape(B, H, W, C))

    def fold_constants(self) -> dict[str, int]:
        """Fold the softmax scale into the rows of q."""
        dim = self.proj.in_channels
        rows = torch.arange(3 * dim).view(self.num_heads, 3, -1)[:, 0].flatten()
        return fold_softmax_scale(self, self.qkv, rows, dim // self.num_heads)

    def attention_maps(self, x: Tensor, significance: None, at: Token | None) -> Iterator[AttentionReading]:
        """Yield the mean attention over the heads."""
        yield AttentionReading("attention", attention_to_tokens(self.mean_probabilities(x), x, at))

    def mean_probabilities(self, x: Tensor) -> Tensor:
        """Return the probabilities among all positions, averaged over the heads: (B, H, W, C) -> (B, N, N)."""
        q, k, _v = self.qkv(x).flatten(1, 2).unflatten(2, (self.num_heads, 3, -1)).unbind(3)
        return softmax_probabilities(q.transpose(1, 2), k.transpose(1, 2)).mean(1)


@register_notrace_module
class SuperTokenAttention(Attention):
    """Attention among super tokens: means of pixels weighted by their affinity to a cell and its eight neighbours.

    No gradient passes through the affinity, nor through iterations before the last.
    """

    def __init__(self, dim: int, num_heads: int, cell: int, num_iters: int = 1):
        super().__init__(dim, num_heads)
        if num_iters < 1:
            raise ValueError(f"num_iters={num_iters}: super tokens need at least 1 iteration")
        self.cell, self.num_iters = cell, num_iters

    def forward(self, x: Tensor) -> Tensor:  # (B, H, W, C) -> same
        _, H, W, _ = x.shape
        cells = to_cells(lowered(x), self.cell)
        affinity = self.affinity(cells.detach())
        tokens = super().forward(average(cells, affinity))
        pixels = affinity.to(tokens.dtype).transpose(3, 4) @ unfold_neighbors(tokens)
        return from_cells(pixels, self.cell, H, W)

    def affinity(self, cells: Tensor) -> Tensor:  # (B, h, w, M, C) -> (B, h, w, 9, M)
        """Return the affinity of each pixel to the nine super tokens around it, after all iterations."""
        affinity = neighbor_affinity(cells, cells.mean(3))
        for _ in range(self.num_iters - 1):
            affinity = neighbor_affinity(cells, average(cells, affinity))
        return affinity

    def attention_maps(self, x: Tensor, significance: None, at: Token | None) -> Iterator[AttentionReading]:
        """Yield the super token of each pixel, without a query, and the attention of pixels through super tokens."""
        B, H, W, _ = x.shape
        cells = to_cells(x, self.cell)
        affinity = self.affinity(cells)  # (B, h, w, 9, M)
        sums = affinity_sums(affinity)  # (B, h, w, 1)
        if at is None:
            yield AttentionReading("super tokens", super_tokens(affinity, self.cell, H, W))
            queries = sums / (H * W)  # mean affinity of all pixels to each super token, (B, h, w, 1)
        else:
            query = torch.zeros(B, H, W, 1, dtype=x.dtype, device=x.device)
            query[(slice(None), *at)] = 1
            queries = overlap_add(affinity @ to_cells(query, self.cell))
        p = self.mean_probabilities(average(cells, affinity))  # (B, h*w, h*w)
        received = (queries.view(B, 1, -1) @ p).view_as(sums)
        # A super token is a weighted mean of pixels: its attention is divided among them by the same weights.
        pixels = affinity.transpose(3, 4) @ unfold_neighbors(received / sums)  # (B, h, w, M, 1)
        yield AttentionReading("attention", H * W * from_cells(pixels, self.cell, H, W)[..., 0])


def super_tokens(affinity: Tensor, cell: int, H: int, W: int) -> Tensor:
    """Return the super token (B, H, W), numbered row by row, of the largest affinity (B, h, w, 9, M) of each pixel."""
    _, h, w, _, _ = affinity.shape
    numbers = torch.arange(1, h * w + 1, device=affinity.device, dtype=affinity.dtype).view(1, h, w, 1)
    around = unfold_neighbors(numbers)  # (1, h, w, 9, 1), 0 outside the grid
    best = affinity.masked_fill(around == 0, -1).argmax(3, keepdim=True)  # (B, h, w, 1, M)
    chosen = around.expand_as(affinity).gather(3, best) - 1
    return from_cells(chosen.transpose(3, 4), cell, H, W)[..., 0].long()


class Block(nn.Module):
    """Position convolution, attention and MLP, each with a residual connection; `scaled`: with layer scale on the last two."""

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
        if scaled:  # in the published shape: with four dimensions they are subject to weight decay, as published
            self.gamma1 = nn.Parameter(torch.full((1, dim, 1, 1), LAYER_SCALE))
            self.gamma2 = nn.Parameter(torch.full((1, dim, 1, 1), LAYER_SCALE))

    def forward(self, x: Tensor) -> Tensor:  # (B, H, W, C) -> same
        x = x + self.cpe(x)  # not ResidualDepthwiseConv, which under autocast would round x too
        y = self.attn(self.norm1(x))  # float32 under autocast on any device
        x = x + self.drop_path(self.gamma1.flatten() * y if self.scaled else y)
        y = self.mlp(batch_norm(self.norm2, x))
        return x + self.drop_path(self.gamma2.flatten() * y if self.scaled else y)

    def fold_constants(self) -> dict[str, int]:
        """Fold norm2 into the layer after it, and layer scale into the layers before it."""
        done: dict[str, int] = {}
        if isinstance(self.norm2, _BatchNorm):
            fold_into_next(self.norm2, self.mlp.fc1)
            self.norm2 = nn.Identity()
            done["BatchNorm"] = 1
        if self.scaled:
            fold_layer_scale(self.gamma1, self.attn.proj)
            fold_layer_scale(self.gamma2, self.mlp.fc2)
            self.scaled = False
            del self.gamma1, self.gamma2
            done["layer scale"] = 2
        return done


class Stem(nn.Module):
    """Four convolutions, the first and third of stride 2."""

    activation_after: ClassVar[Sequence[str]] = ("conv1", "conv2", "conv3", "conv4")

    def __init__(self, in_chans: int, dim: int):
        super().__init__()
        self.conv1 = Conv2d(in_chans, dim // 2, 3, 2, 1)
        self.norm1 = nn.BatchNorm2d(dim // 2)
        self.conv2 = Conv2d(dim // 2, dim // 2, 3, 1, 1)
        self.norm2 = nn.BatchNorm2d(dim // 2)
        self.conv3 = Conv2d(dim // 2, dim, 3, 2, 1)
        self.norm3 = nn.BatchNorm2d(dim)
        self.conv4 = Conv2d(dim, dim, 3, 1, 1)
        self.norm4 = nn.BatchNorm2d(dim)
        self.act = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:  # (B, in_chans, H, W) -> (B, ~H/4, ~W/4, C)
        x = x.contiguous(memory_format=torch.channels_last)
        x = self.norm1(activate(self.act, self.conv1(x)))
        x = self.norm2(activate(self.act, self.conv2(x)))
        x = self.norm3(activate(self.act, self.conv3(x)))
        return self.norm4(activate(self.act, self.conv4(x))).permute(0, 2, 3, 1)


class Downsample(nn.Module):
    """Convolution to the width of a stage and half the grid."""

    batch_norm_after: ClassVar[Sequence[tuple[str, str]]] = (("conv", "norm"),)

    def __init__(self, dim: int, out: int):
        super().__init__()
        self.conv = Conv2d(dim, out, 3, 2, 1)
        self.norm = nn.BatchNorm2d(out)

    def forward(self, x: Tensor) -> Tensor:  # (B, H, W, C) -> (B, ~H/2, ~W/2, C')
        return self.norm(self.conv(x.permute(0, 3, 1, 2))).permute(0, 2, 3, 1)


class Neck(nn.Module):
    """Expansion of the last feature map before pooling."""

    batch_norm_after: ClassVar[Sequence[tuple[str, str]]] = (("conv", "norm"),)

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

IDENTITY_KERNELS = Constant(  # with which the published code gathers and adds neighbours
    "stoken_refine.qkv.weight", ("unfold.weights", "fold.weights"), lambda t: torch.eye(9, dtype=t).view(9, 1, 3, 3)
)


class STViT(Backbone):
    """STViT. Activations are (B, H, W, C); any image size works."""

    published: ClassVar[Sequence[Rule]] = PUBLISHED
    published_constants: ClassVar[Sequence[Constant]] = (IDENTITY_KERNELS,)
    foldable: ClassVar[bool] = True

    def __init__(
        self,
        dims: Sequence[int],
        depths: Sequence[int],
        num_heads: Sequence[int],
        scaled_stages: Sequence[int] = (),  # those with layer scale
        cells: Sequence[int] = (8, 4, 1, 1),  # side of a cell; 1: attention among all pixels
        num_iters: int = 1,
        in_chans: int = 3,
        drop_path_rate: float = 0.0,
        img_size: int | tuple[int, int] | None = None,  # accepted as in all families, and not used
        **head: Unpack[HeadOptions],
    ):
        rates, block = drop_path_rates(drop_path_rate, depths), partial(Block, num_iters=num_iters)
        stages = [
            Stage(
                Downsample(dims[i - 1], dim) if i else nn.Identity(),
                [block(dim, num_heads[i], cells[i], scaled=i in scaled_stages, drop_path=rate) for rate in rates[i]],
            )
            for i, dim in enumerate(dims)
        ]
        stem, neck = Stem(in_chans, dims[0]), Neck(dims[-1], NECK_DIM)
        super().__init__(stem, stages, neck, dims, NECK_DIM, in_chans=in_chans, **head)


default_cfgs = generate_default_cfgs(
    {f"stvit_{size}": default_cfg("stem.conv1") for size in ("small", "base", "large")}
)


@register_variant(STViT)
def stvit_small() -> dict[str, Any]:
    """STViT-S: 25M parameters."""
    return {"dims": (64, 128, 320, 512), "depths": (3, 5, 9, 3), "num_heads": (1, 2, 5, 8)}


@register_variant(STViT)
def stvit_base() -> dict[str, Any]:
    """STViT-B: 52M parameters."""
    return {"dims": (96, 192, 384, 512), "depths": (4, 6, 14, 6), "num_heads": (2, 3, 6, 8), "scaled_stages": (2, 3)}


@register_variant(STViT)
def stvit_large() -> dict[str, Any]:
    """STViT-L: 95M parameters."""
    return {"dims": (96, 192, 448, 640), "depths": (4, 7, 19, 8), "num_heads": (2, 3, 7, 10), "scaled_stages": (2, 3)}
