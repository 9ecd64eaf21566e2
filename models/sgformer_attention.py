"""The three attentions of SG-Former: hybrid-scale, self-guided, plain.

SG-Former: Self-guided Transformer with Evolving Token Reallocation (Ren et al., ICCV 2023), sections 3.2 and 3.3.

All map (B, H, W, C) to the same and take and give a significance (B, H, W): hybrid-scale attention makes one, self-guided
attention uses it. Any grid works: windows, reduction cells and runs that stick out of it are filled up, and the filling takes
no part in anything.
"""

from collections.abc import Sequence

import torch
from timm.layers import register_notrace_function
from torch import Tensor, nn
from torch.nn import functional as F

from .layers import DepthwiseConv, LayerNorm, attend_all, lowered

# B batch, C channels, H W grid, N = H*W tokens, K heads, D = C/K head channels, M reduced tokens
# h w windows, S their side, T = S*S tokens of one
SIDE = 7
RUNS = {8: (196, 56, 28), 4: (49, 14, 7), 2: (2, 1)}  # by reduction: tokens of a run in each piece of the sorted list


class PlainAttention(nn.Module):
    """Let every token attend to every token."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.softmax_scale: float | None = None  # D^-0.5; 1 where it is in the weights (models/inference/fold.py)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.position = LocalPosition(dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, significance: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        x = lowered(x)
        q, k, v = self.qkv(x).flatten(1, 2).chunk(3, -1)
        heads = self.num_heads
        q, k, v = to_heads(q, heads), to_heads(k, heads), to_heads(v, heads)
        y_BKND = attend_all(q, k, v, self.softmax_scale)
        return self.proj(y_BKND.transpose(1, 2).reshape(x.shape) + self.position(x)), None


class HybridScaleAttention(nn.Module):
    """Let half of the heads attend to r×r cells of the whole map, the others to the tokens of a 7×7 window.

    With `guides` it also says how significant each token is to the others, for the block after it.
    """

    def __init__(self, dim: int, num_heads: int, reduction: int, guides: bool):
        super().__init__()
        if num_heads % 2:
            raise ValueError(f"num_heads={num_heads} must be even: half of the heads are global, half local")
        self.dim, self.num_heads, self.reduction, self.guides = dim, num_heads, reduction, guides
        self.softmax_scale: float | None = None
        self.qkv = nn.Linear(dim, 2 * dim)  # rows: global q, local q, k, v, each of C/2
        self.reduce = nn.Conv2d(dim, dim, reduction, reduction)
        self.reduce_norm = LayerNorm(dim)
        self.reduced_kv = nn.Linear(dim, dim)
        self.position = LocalPosition(dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, significance: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        x, heads = lowered(x), self.num_heads // 2
        q, local_qkv = self.qkv(x).split((self.dim // 2, 3 * self.dim // 2), -1)
        k, v = self.reduced_kv(self._cells(x)).chunk(2, -1)
        q, k, v = to_heads(q.flatten(1, 2), heads), to_heads(k, heads), to_heads(v, heads)
        y_BKND, p_BKNM = attend(q, k, v, scale=self.softmax_scale)
        y, p = window_attention(local_qkv, heads, self.softmax_scale)
        both = torch.cat([y_BKND.transpose(1, 2), y.flatten(1, 2)], 2)  # (B, N, K, D), heads [global, local]
        significance = significance_map(p_BKNM, p, x, self.reduction) if self.guides else None
        return self.proj(both.reshape(x.shape) + self.position(x)), significance

    def _cells(self, x: Tensor) -> Tensor:  # (B, H, W, C) -> (B, M, C)
        cells = self.reduce(fill_up(x, self.reduction).permute(0, 3, 1, 2))  # (B, C, ~H/r, ~W/r)
        return F.gelu(self.reduce_norm(cells.flatten(2).transpose(1, 2)))


class SelfGuidedAttention(nn.Module):
    """Let every token attend to runs of tokens of like significance: the less significant, the longer the run."""

    def __init__(self, dim: int, num_heads: int, reduction: int):
        super().__init__()
        self.num_heads = num_heads
        self.softmax_scale: float | None = None
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.runs = nn.ModuleList(nn.Linear(length, 1) for length in RUNS[reduction])
        self.position = LocalPosition(dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, significance: Tensor) -> tuple[Tensor, Tensor | None]:
        x = lowered(x)
        tokens = run_tokens(sort_tokens(x, significance), [(run.weight, run.bias) for run in self.runs])
        q, heads = self.q(x).flatten(1, 2), self.num_heads
        k, v = self.kv(tokens).chunk(2, -1)
        q, k, v = to_heads(q, heads), to_heads(k, heads), to_heads(v, heads)
        y_BKND = attend_all(q, k, v, self.softmax_scale)
        return self.proj(y_BKND.transpose(1, 2).reshape(x.shape) + self.position(x)), None


class LocalPosition(nn.Module):
    """The position term that every attention adds to its heads."""

    def __init__(self, dim: int):
        super().__init__()
        self.linear = nn.Linear(dim, dim)
        self.depthwise = DepthwiseConv(dim, 3)

    def forward(self, x: Tensor) -> Tensor:  # (B, H, W, C) -> same
        return self.depthwise(self.linear(x))


def to_heads(x: Tensor, num_heads: int) -> Tensor:  # (B, N, C) -> (B, K, N, D)
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


@register_notrace_function
def attend(
    q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None = None, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """Attend with q (..., N, D) to k, v (..., M, D), but not to what is `hidden`; return also the probabilities (..., N, M).

    The probabilities are float32 or wider. scale: D^-0.5 if it is not given.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    flat_q, flat_k = q.flatten(0, -3), k.flatten(0, -3).transpose(1, 2)
    logits = torch.baddbmm(q.new_zeros(1, 1, 1), flat_q, flat_k, beta=0, alpha=scale)
    logits = logits.unflatten(0, q.shape[:-2])
    if hidden is not None:
        logits = logits.masked_fill(hidden, -torch.inf)
    p = torch.softmax(logits, -1, dtype=torch.promote_types(logits.dtype, torch.float32))
    return p.to(v.dtype) @ v, p


@register_notrace_function
def window_attention(qkv: Tensor, num_heads: int, scale: float | None = None) -> tuple[Tensor, Tensor]:
    """Attend inside 7×7 windows: (B, H, W, 3*K*D), rows q, k, v -> (B, H, W, K, D).

    Return also the mean probability (B, H, W) of each token, over the heads and the queries of its window, without gradient.
    """
    B, H, W, _ = qkv.shape
    x = fill_up(qkv, SIDE)
    h, w = x.shape[1] // SIDE, x.shape[2] // SIDE
    x = x.unflatten(3, (3, num_heads, -1)).unflatten(2, (w, SIDE)).unflatten(1, (h, SIDE))  # (B, h, S, w, S, 3, K, D)
    q, k, v = x.permute(5, 0, 1, 3, 6, 2, 4, 7).reshape(3, B, h * w, num_heads, SIDE * SIDE, -1)
    if (h * SIDE, w * SIDE) == (H, W):
        y, p = attend(q, k, v, scale=scale)
        mean = p.detach().mean((2, 3))  # (B, h*w, T)
    else:
        real = fill_up(qkv.new_ones(1, H, W, 1, dtype=torch.bool), SIDE)
        real = real.view(h, SIDE, w, SIDE).transpose(1, 2).reshape(h * w, 1, SIDE * SIDE, 1)
        y, p = attend(q, k, v, hidden=~real.transpose(2, 3), scale=scale)
        mean = (p.detach() * real).sum((2, 3)) / (num_heads * real.sum(2)[..., 0])  # (B, h*w, T)
    y = y.unflatten(3, (SIDE, SIDE)).unflatten(1, (h, w)).permute(0, 1, 4, 2, 5, 3, 6)  # (B, h, S, w, S, K, D)
    y = y.reshape(B, h * SIDE, w * SIDE, num_heads, -1)[:, :H, :W]
    mean = mean.view(B, h, w, SIDE, SIDE).transpose(2, 3).reshape(B, h * SIDE, w * SIDE)[:, :H, :W]
    return y, mean


@register_notrace_function
def significance_map(p_BKNM: Tensor, local: Tensor, x: Tensor, reduction: int) -> Tensor:
    """Add the mean probability of its cell to the local significance (B, H, W) of each token, without gradient."""
    B, H, W, _ = x.shape
    h, w = -(-H // reduction), -(-W // reduction)
    cells = p_BKNM.detach().mean((1, 2)).view(B, h, 1, w, 1).expand(-1, -1, reduction, -1, reduction)
    return local + cells.reshape(B, h * reduction, w * reduction)[:, :H, :W]


@register_notrace_function
def sort_tokens(x: Tensor, significance: Tensor) -> Tensor:
    """Order the tokens of each image by significance, the least first: (B, H, W, C) -> (B, N, C)."""
    B, H, W, C = x.shape
    first = torch.arange(B, device=x.device)[:, None] * (H * W)
    rows = significance.reshape(B, -1).argsort(1) + first  # rows of all images' tokens
    return x.reshape(-1, C).index_select(0, rows.flatten()).view(B, H * W, C)


@register_notrace_function
def run_tokens(x: Tensor, runs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Sum runs of consecutive tokens, weighted by their place in the run: (B, N, C) -> (B, M, C).

    runs: weight (1, f) and bias (1) of each piece of the list. Three pieces are its first quarter, its middle and its last
    quarter, two pieces its halves. Runs keep their lengths f at any N, so that M grows with N; the last run of a piece
    may be short, then the weights of the missing places are not used.
    """
    B, N, C = x.shape
    sums = []
    for piece, (weight, bias) in zip(x.split(piece_sizes(N, len(runs)), 1), runs, strict=True):
        length, size = weight.shape[1], piece.shape[1]
        number = -(-size // length)
        if size % length:
            piece = F.pad(piece, (0, 0, 0, number * length - size))
        tokens = torch.bmm(weight.expand(B * number, 1, length), piece.reshape(B * number, length, C))
        sums.append((tokens + bias).view(B, number, C))
    return torch.cat(sums, 1)


def piece_sizes(tokens: int, pieces: int) -> tuple[int, ...]:
    """Return the sizes of the pieces that the sorted list is cut into."""
    if pieces == 3:
        return tokens // 4, tokens - 2 * (tokens // 4), tokens // 4
    return tokens // 2, tokens - tokens // 2


@register_notrace_function
def fill_up(x: Tensor, side: int) -> Tensor:
    """Add zeros at the right and bottom of (B, H, W, C) until `side` divides H and W."""
    H, W = x.shape[1:3]
    return F.pad(x, (0, 0, 0, -W % side, 0, -H % side)) if H % side or W % side else x
