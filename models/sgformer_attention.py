"""Attentions of SG-Former: hybrid-scale, self-guided and plain.

SG-Former: Self-guided Transformer with Evolving Token Reallocation (Ren et al., ICCV 2023), sections 3.2 and 3.3.

All map (B, H, W, C) to the same shape and take and return a significance (B, H, W) or None: hybrid-scale attention computes
one, self-guided attention uses it. Any grid works: windows, reduction cells and runs that exceed it are padded, and the padding
does not change the result.
"""

from collections.abc import Iterator, Sequence
from typing import ClassVar

import torch
from timm.layers import register_notrace_function
from torch import Tensor, nn
from torch.nn import functional as F

from .attention_maps import AttentionReading, Token, attention_to_tokens, softmax_probabilities
from .inference.fold import fold_softmax_scale
from .kernels.permuted_rows import permute_rows
from .layers import Conv2d, DepthwiseConv, LayerNorm, attend_all, lowered

# B batch, C channels, H W grid, N = H*W tokens, K heads, D = C/K head channels, M reduced tokens
# h w windows, S their side, T = S*S tokens of one
SIDE = 7
RUNS = {8: (196, 56, 28), 4: (49, 14, 7), 2: (2, 1)}  # by reduction: tokens of a run in each piece of the sorted list


class PlainAttention(nn.Module):
    """Multi-head attention among all tokens."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.softmax_scale: float | None = None  # D^-0.5; 1 once it is folded into the weights
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

    def fold_constants(self) -> dict[str, int]:
        """Fold the softmax scale into the rows of q."""
        dim = self.proj.in_features
        return fold_softmax_scale(self, self.qkv, torch.arange(dim), dim // self.num_heads)

    def attention_maps(self, x: Tensor, significance: Tensor | None, at: Token | None) -> Iterator[AttentionReading]:
        """Yield the mean attention over the heads."""
        q, k, _v = self.qkv(x).flatten(1, 2).chunk(3, -1)
        p = softmax_probabilities(to_heads(q, self.num_heads), to_heads(k, self.num_heads)).mean(1)
        yield AttentionReading("attention", attention_to_tokens(p, x, at))


class HybridScaleAttention(nn.Module):
    """Attention to r×r cells of the whole map in half of the heads, to the tokens of a 7×7 window in the others.

    With `guides` it also returns the significance of each token, for the next block.
    """

    def __init__(self, dim: int, num_heads: int, reduction: int, guides: bool):
        super().__init__()
        if num_heads % 2:
            raise ValueError(f"num_heads={num_heads} must be even: half of the heads are global, half local")
        self.dim, self.num_heads, self.reduction, self.guides = dim, num_heads, reduction, guides
        self.softmax_scale: float | None = None
        self.qkv = nn.Linear(dim, 2 * dim)  # rows: global q, local q, k, v, each of C/2
        self.reduce = Conv2d(dim, dim, reduction, reduction)
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

    def fold_constants(self) -> dict[str, int]:
        """Fold the softmax scale into the rows of q, of both halves of the heads."""
        return fold_softmax_scale(self, self.qkv, torch.arange(self.dim), self.dim // self.num_heads)

    def attention_maps(self, x: Tensor, significance: Tensor | None, at: Token | None) -> Iterator[AttentionReading]:
        """Yield the significance map, or the attention of a query in the global and in the local heads."""
        heads, side = self.num_heads // 2, self.reduction
        q, local_qkv = self.qkv(x).split((self.dim // 2, 3 * self.dim // 2), -1)
        k, v = self.reduced_kv(self._cells(x)).chunk(2, -1)
        p_BKNM = attend(to_heads(q.flatten(1, 2), heads), to_heads(k, heads), to_heads(v, heads))[1]
        if at is None:
            _, received = window_attention(local_qkv, heads)
            yield AttentionReading("significance", significance_map(p_BKNM, received, x, side))
            return
        B, H, W, _ = x.shape
        row, column = at
        counts = pad_to_multiple(x.new_ones(1, H, W, 1), side).unflatten(2, (-1, side)).unflatten(1, (-1, side))
        counts = counts.sum((2, 4))[..., 0]  # tokens of each cell, (1, h, w)
        p = p_BKNM[:, :, row * W + column].mean(1).view(B, *counts.shape[1:]) / counts
        yield AttentionReading("attention", H * W * cells_to_tokens(p, side, H, W), "global heads")
        yield AttentionReading("attention", H * W * window_probabilities(local_qkv, heads, row, column), "local heads")

    def _cells(self, x: Tensor) -> Tensor:  # (B, H, W, C) -> (B, M, C)
        cells = self.reduce(pad_to_multiple(x, self.reduction).permute(0, 3, 1, 2))  # (B, C, ~H/r, ~W/r)
        return F.gelu(self.reduce_norm(cells.flatten(2).transpose(1, 2)))


class SelfGuidedAttention(nn.Module):
    """Attention of every token to runs of tokens of similar significance: the less significant, the longer the run."""

    guided: ClassVar[bool] = True  # attention maps show it with the block before, which computes the significance
    uncalled: ClassVar[Sequence[str]] = ("runs",)

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

    def fold_constants(self) -> dict[str, int]:
        """Fold the softmax scale into q."""
        dim = self.proj.in_features
        return fold_softmax_scale(self, self.q, torch.arange(dim), dim // self.num_heads)

    def attention_maps(self, x: Tensor, significance: Tensor, at: Token | None) -> Iterator[AttentionReading]:
        """Yield the merged token that each token goes into, or the attention of a query."""
        B, H, W, C = x.shape
        lengths = [len(run.weight[0]) for run in self.runs]  # type: ignore[index]
        numbers, level = merge_plan(H * W, lengths)
        order = significance.reshape(B, -1).argsort(1)
        regions = torch.empty_like(order).scatter_(1, order, numbers.to(x.device).expand(B, -1))  # (B, N)
        levels = torch.empty_like(order).scatter_(1, order, level.to(x.device).expand(B, -1))
        if at is None:
            yield AttentionReading("merged", regions.view(B, H, W), level=levels.view(B, H, W))
            return
        tokens = x.flatten(1, 2).gather(1, order[..., None].expand(-1, -1, C))
        merged = run_tokens(tokens, [(run.weight, run.bias) for run in self.runs])  # (B, M, C)
        q, (k, _v) = self.q(x).flatten(1, 2), self.kv(merged).chunk(2, -1)
        p = softmax_probabilities(to_heads(q, self.num_heads), to_heads(k, self.num_heads)).mean(1)  # (B, N, M)
        members = torch.zeros_like(p[:, 0]).scatter_add_(1, regions, torch.ones_like(regions, dtype=p.dtype))
        p = p[:, at[0] * W + at[1]] / members
        yield AttentionReading("attention", H * W * p.gather(1, regions).view(B, H, W))


class LocalPosition(nn.Module):
    """Position term of every attention: a depthwise convolution of its input, added to its output before the projection."""

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
    """Attend with q (..., N, D) to k, v (..., M, D), except where `hidden`; return (..., N, D) and the probabilities (..., N, M).

    The probabilities are float32 or wider. scale: D^-0.5 by default.
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
    """Attend inside 7×7 windows: (B, H, W, 3*K*D), channels q, k, v -> (B, H, W, K, D).

    Returns also the mean probability (B, H, W) of each token, over the heads and the queries of its window, without gradient.
    """
    B, H, W, _ = qkv.shape
    x = pad_to_multiple(qkv, SIDE)
    h, w = x.shape[1] // SIDE, x.shape[2] // SIDE
    x = x.unflatten(3, (3, num_heads, -1)).unflatten(2, (w, SIDE)).unflatten(1, (h, SIDE))  # (B, h, S, w, S, 3, K, D)
    q, k, v = x.permute(5, 0, 1, 3, 6, 2, 4, 7).reshape(3, B, h * w, num_heads, SIDE * SIDE, -1)
    if (h * SIDE, w * SIDE) == (H, W):
        y, p = attend(q, k, v, scale=scale)
        mean = p.detach().mean((2, 3))  # (B, h*w, T)
    else:
        inside = pad_to_multiple(qkv.new_ones(1, H, W, 1, dtype=torch.bool), SIDE)
        inside = inside.view(h, SIDE, w, SIDE).transpose(1, 2).reshape(h * w, 1, SIDE * SIDE, 1)
        y, p = attend(q, k, v, hidden=~inside.transpose(2, 3), scale=scale)
        mean = (p.detach() * inside).sum((2, 3)) / (num_heads * inside.sum(2)[..., 0])  # (B, h*w, T)
    y = y.unflatten(3, (SIDE, SIDE)).unflatten(1, (h, w)).permute(0, 1, 4, 2, 5, 3, 6)  # (B, h, S, w, S, K, D)
    y = y.reshape(B, h * SIDE, w * SIDE, num_heads, -1)[:, :H, :W]
    mean = mean.view(B, h, w, SIDE, SIDE).transpose(2, 3).reshape(B, h * SIDE, w * SIDE)[:, :H, :W]
    return y, mean


@register_notrace_function
def significance_map(p_BKNM: Tensor, local: Tensor, x: Tensor, reduction: int) -> Tensor:
    """Add the mean probability of its cell to the local significance (B, H, W) of each token, without gradient."""
    B, H, W, _ = x.shape
    cells = p_BKNM.detach().mean((1, 2)).view(B, -(-H // reduction), -(-W // reduction))
    return local + cells_to_tokens(cells, reduction, H, W)


@register_notrace_function
def sort_tokens(x: Tensor, significance: Tensor) -> Tensor:
    """Sort the tokens of each image by ascending significance: (B, H, W, C) -> (B, N, C)."""
    B, H, W, C = x.shape
    first = torch.arange(B, device=x.device)[:, None] * (H * W)
    rows = significance.reshape(B, -1).argsort(1) + first  # rows of all images' tokens
    return permute_rows(x.reshape(-1, C), rows.flatten()).view(B, H * W, C)


@register_notrace_function
def run_tokens(x: Tensor, runs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Sum runs of consecutive tokens, weighted by their position in the run: (B, N, C) -> (B, M, C).

    runs: weight (1, f) and bias (1) of each piece of the list. Three pieces are its first quarter, its middle and its last
    quarter, two pieces its halves. Runs keep their lengths f at any N, so that M grows with N; the last run of a piece may be
    short, and then uses the first weights only.
    """
    B, N, C = x.shape
    sums = []
    for piece, (weight, bias) in zip(x.split(piece_sizes(N, len(runs)), 1), runs, strict=True):
        length, size = weight.shape[1], piece.shape[1]
        number = -(-size // length)
        if size % length:
            piece = F.pad(piece, (0, 0, 0, number * length - size))
        if length <= 2:  # sums of one or two terms are no product for a matrix unit
            taps = weight.view(length, 1)
            tokens = sum((piece[:, i::length] * taps[i] for i in range(1, length)), piece[:, ::length] * taps[0])
        else:
            tokens = torch.bmm(weight.expand(B * number, 1, length), piece.reshape(B * number, length, C))
        sums.append((tokens + bias).view(B, number, C))
    return torch.cat(sums, 1)


def piece_sizes(tokens: int, pieces: int) -> tuple[int, ...]:
    """Return the sizes of the pieces that the sorted list of tokens is split into."""
    if pieces == 3:
        return tokens // 4, tokens - 2 * (tokens // 4), tokens // 4
    return tokens // 2, tokens - tokens // 2


@register_notrace_function
def pad_to_multiple(x: Tensor, side: int) -> Tensor:
    """Add zeros at the right and bottom of (B, H, W, C) until `side` divides H and W."""
    H, W = x.shape[1:3]
    return F.pad(x, (0, 0, 0, -W % side, 0, -H % side)) if H % side or W % side else x


def merge_plan(tokens: int, lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return for each position of the sorted list the merged token it goes into, and the run length of its piece: (N,) each."""
    numbers, levels, first = [], [], 0
    for size, length in zip(piece_sizes(tokens, len(lengths)), lengths, strict=True):
        numbers.append(first + torch.arange(size) // length)
        levels.append(torch.full((size,), length))
        first += -(-size // length)
    return torch.cat(numbers), torch.cat(levels)


def window_probabilities(qkv: Tensor, num_heads: int, row: int, column: int) -> Tensor:
    """Return the mean probabilities (B, H, W) over the heads of the token at row, column in its window, 0 outside of it."""
    B, H, W, _ = qkv.shape
    rows, columns = (slice(n // SIDE * SIDE, n // SIDE * SIDE + SIDE) for n in (row, column))
    window = qkv[:, rows, columns]  # smaller at the border of the map
    h, w = window.shape[1:3]
    q, k, _v = window.unflatten(3, (3, num_heads, -1)).permute(3, 0, 4, 1, 2, 5).flatten(3, 4)  # each (B, K, T, D)
    query = (row - rows.start) * w + column - columns.start
    p = qkv.new_zeros(B, H, W)
    p[:, rows, columns] = softmax_probabilities(q, k)[:, :, query].mean(1).view(B, h, w)
    return p


def cells_to_tokens(cells: Tensor, side: int, H: int, W: int) -> Tensor:
    """Copy the value of each cell to its tokens: (B, h, w) -> (B, H, W)."""
    B, h, w = cells.shape
    tokens = cells.view(B, h, 1, w, 1).expand(B, h, side, w, side)
    return tokens.reshape(B, h * side, w * side)[:, :H, :W]
