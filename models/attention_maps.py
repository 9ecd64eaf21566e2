"""What each attention of the three families does with a picture, as maps over its tokens.

`read(attention, x, ...)` computes them anew from what went into an attention, as an attention weight per token; the attention
itself need not know. Weights are stated as multiples of an even one: 1 everywhere is a query that attends to all alike.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import singledispatch

import torch
from torch import Tensor, nn

from .groupmixformer import KERNELS, GroupMixAttention
from .kernels.neighborhood import overlap_add, unfold_neighbors
from .layers import wide_softmax
from .sgformer_attention import (
    SIDE,
    HybridScaleAttention,
    PlainAttention,
    SelfGuidedAttention,
    attend,
    fill_up,
    piece_sizes,
    run_tokens,
    significance_map,
    to_heads,
    window_attention,
)
from .stvit import EPS, Attention, SuperTokenAttention, average, from_cells, to_cells

# B batch, H W grid, N = H*W tokens, K heads, D head channels, M reduced tokens, S channels of a segment
Token = tuple[int, int]  # row and column of a token


@dataclass(frozen=True)
class AttentionReading:
    """One map of an attention: values (B, H, W) of a quantity, or the number of the region that each token lies in."""

    kind: str  # significance, merged, super tokens, attention, keys
    values: Tensor
    part: str = ""  # of the heads or channels, where there are several
    level: Tensor | None = None  # (B, H, W) of regions: how many tokens the region takes together, as planned
    signed: bool = False  # values may be negative


@singledispatch
def read(attention: nn.Module, x: Tensor, significance: Tensor | None, at: Token | None) -> Iterator[AttentionReading]:
    """Yield the maps of an attention that got x (B, H, W, C) and, where it uses one, a significance (B, H, W).

    Attention is that of the query `at` a token, or without one the mean over all queries: what each token receives.
    """
    return iter(())


@read.register
def _(
    attention: PlainAttention, x: Tensor, significance: Tensor | None, at: Token | None
) -> Iterator[AttentionReading]:
    q, k, _v = attention.qkv(x).flatten(1, 2).chunk(3, -1)
    p = _probabilities(to_heads(q, attention.num_heads), to_heads(k, attention.num_heads))
    yield AttentionReading("attention", _as_map(p.mean(1), x, at))


@read.register
def _(
    attention: HybridScaleAttention, x: Tensor, significance: Tensor | None, at: Token | None
) -> Iterator[AttentionReading]:
    heads, side = attention.num_heads // 2, attention.reduction
    q, local_qkv = attention.qkv(x).split((attention.dim // 2, 3 * attention.dim // 2), -1)
    k, v = attention.reduced_kv(attention._cells(x)).chunk(2, -1)
    p_BKNM = attend(to_heads(q.flatten(1, 2), heads), to_heads(k, heads), to_heads(v, heads))[1]
    if at is None:
        _, received = window_attention(local_qkv, heads)
        yield AttentionReading("significance", significance_map(p_BKNM, received, x, side))
        return
    B, H, W, _ = x.shape
    row, column = at
    tokens = x.new_ones(1, H, W, 1)
    cells = fill_up(tokens, side).unflatten(2, (-1, side)).unflatten(1, (-1, side)).sum((2, 4))[..., 0]  # in each cell
    p = (p_BKNM[:, :, row * W + column].mean(1).view(B, *cells.shape[1:]) / cells)[:, :, None, :, None]
    yield AttentionReading("attention", H * W * _spread(p, side, H, W), "global heads")
    yield AttentionReading("attention", H * W * _in_window(local_qkv, heads, row, column), "local heads")


@read.register
def _(attention: SelfGuidedAttention, x: Tensor, significance: Tensor, at: Token | None) -> Iterator[AttentionReading]:
    B, H, W, _ = x.shape
    lengths = [len(run.weight[0]) for run in attention.runs]  # type: ignore[index]
    numbers, level = merge_plan(H * W, lengths)
    order = significance.reshape(B, -1).argsort(1)
    regions = torch.empty_like(order).scatter_(1, order, numbers.to(x.device).expand(B, -1))  # (B, N)
    levels = torch.empty_like(order).scatter_(1, order, level.to(x.device).expand(B, -1))
    if at is None:
        yield AttentionReading("merged", regions.view(B, H, W), level=levels.view(B, H, W))
        return
    tokens = _merge(attention, x, order)
    q, (k, _v) = attention.q(x).flatten(1, 2), attention.kv(tokens).chunk(2, -1)
    p = _probabilities(to_heads(q, attention.num_heads), to_heads(k, attention.num_heads)).mean(1)  # (B, N, M)
    row, column = at
    members = torch.zeros_like(p[:, 0]).scatter_add_(1, regions, torch.ones_like(regions, dtype=p.dtype))
    yield AttentionReading("attention", H * W * (p[:, row * W + column] / members).gather(1, regions).view(B, H, W))


@read.register
def _(attention: Attention, x: Tensor, significance: Tensor | None, at: Token | None) -> Iterator[AttentionReading]:
    yield AttentionReading("attention", _as_map(_among(attention, x).mean(1), x, at))


@read.register
def _(
    attention: SuperTokenAttention, x: Tensor, significance: Tensor | None, at: Token | None
) -> Iterator[AttentionReading]:
    B, H, W, _ = x.shape
    cells = to_cells(x, attention.cell)
    shares = attention.share_out(cells)  # (B, h, w, 9, M)
    h, w = shares.shape[1:3]
    sums = overlap_add(shares.sum(4).unsqueeze(-1)) + EPS  # (B, h, w, 1)
    if at is None:
        yield AttentionReading("super tokens", super_tokens(shares, attention.cell, H, W))
        asked = sums / (H * W)  # the mean share of all pixels in each super token, (B, h, w, 1)
    else:
        query = torch.zeros(B, H, W, 1, dtype=x.dtype, device=x.device)
        query[(slice(None), *at)] = 1
        asked = overlap_add(shares @ to_cells(query, attention.cell))
    p = _among(attention, average(cells, shares)).mean(1)  # (B, T, T)
    answered = (asked.view(B, 1, h * w) @ p).view(B, h, w, 1)
    # A super token is a weighted mean of pixels, so what it gets goes to these in the same proportion.
    pixels = shares.transpose(3, 4) @ unfold_neighbors(answered / sums)  # (B, h, w, M, 1)
    yield AttentionReading("attention", H * W * from_cells(pixels, attention.cell, H, W)[..., 0])


@read.register
def _(
    attention: GroupMixAttention, x: Tensor, significance: Tensor | None, at: Token | None
) -> Iterator[AttentionReading]:
    B, H, W, _ = x.shape
    q, k, _v, _bypass = attention.mix(x)
    weights = wide_softmax(k.flatten(1, 2), 1) * (H * W)  # (B, N, 4S), of mean 1
    scale, heads = attention.scale, attention.num_heads / 4
    for i, side in enumerate((1, *KERNELS)):
        own = slice(i * attention.segment, (i + 1) * attention.segment)
        part = f"{side}×{side} group"
        if at is None:
            yield AttentionReading("keys", weights[..., own].mean(-1).view(B, H, W), part)
        else:  # y = scale * q (softmax(k)ᵀ v): what q gives to each token, the mean over the heads that the group fills
            query = q[(slice(None), *at)][:, own, None]  # (B, S, 1)
            yield AttentionReading(
                "attention", scale / heads * (weights[..., own] @ query).view(B, H, W), part, signed=True
            )


def super_tokens(shares: Tensor, cell: int, H: int, W: int) -> Tensor:
    """Return the super token (B, H, W), counted row by row, that each pixel has its largest share (B, h, w, 9, M) in."""
    _, h, w, _, _ = shares.shape
    numbers = torch.arange(1, h * w + 1, device=shares.device, dtype=shares.dtype).view(1, h, w, 1)
    around = unfold_neighbors(numbers)  # (1, h, w, 9, 1), 0 outside the grid
    best = shares.masked_fill(around == 0, -1).argmax(3, keepdim=True)  # (B, h, w, 1, M)
    chosen = around.expand_as(shares).gather(3, best) - 1
    return from_cells(chosen.transpose(3, 4), cell, H, W)[..., 0].long()


def merge_plan(tokens: int, lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return for each place of the sorted list the merged token it goes into, and the run length of its piece: (N,) each."""
    numbers, levels, first = [], [], 0
    for size, length in zip(piece_sizes(tokens, len(lengths)), lengths, strict=True):
        numbers.append(first + torch.arange(size) // length)
        levels.append(torch.full((size,), length))
        first += -(-size // length)
    return torch.cat(numbers), torch.cat(levels)


def _merge(attention: SelfGuidedAttention, x: Tensor, order: Tensor) -> Tensor:
    """Return the merged tokens (B, M, C) of tokens in an order (B, N)."""
    tokens = x.flatten(1, 2).gather(1, order[..., None].expand(-1, -1, x.shape[-1]))
    return run_tokens(tokens, [(run.weight, run.bias) for run in attention.runs])


def _among(attention: Attention, x: Tensor) -> Tensor:
    """Return the probabilities (B, K, N, N) of STViT's attention among all positions of x (B, H, W, C)."""
    B, H, W, C = x.shape
    q, k, _v = attention.qkv(x).reshape(B, H * W, attention.num_heads, 3, C // attention.num_heads).unbind(3)
    return _probabilities(q.transpose(1, 2), k.transpose(1, 2))


def _probabilities(q: Tensor, k: Tensor) -> Tensor:  # (B, K, N, D), (B, K, M, D) -> (B, K, N, M)
    return (q * q.shape[-1] ** -0.5 @ k.transpose(2, 3)).softmax(-1)


def _as_map(p: Tensor, x: Tensor, at: Token | None) -> Tensor:
    """Return the row of p (B, N, N) that belongs to a token, or the mean of all rows, as a map (B, H, W)."""
    B, H, W, _ = x.shape
    if at is None:
        return H * W * p.mean(1).view(B, H, W)
    return H * W * p[:, at[0] * W + at[1]].view(B, H, W)


def _in_window(qkv: Tensor, num_heads: int, row: int, column: int) -> Tensor:
    """Return the probabilities (B, H, W) that the token at row, column gives in its 7×7 window, 0 outside it."""
    B, H, W, _ = qkv.shape
    rows, columns = (slice(n // SIDE * SIDE, n // SIDE * SIDE + SIDE) for n in (row, column))
    window = qkv[:, rows, columns]  # what sticks out of the map is not there
    h, w = window.shape[1:3]
    q, k, _v = window.unflatten(3, (3, num_heads, -1)).permute(3, 0, 4, 1, 2, 5).flatten(3, 4)  # each (B, K, T, D)
    inside = (row - rows.start) * w + column - columns.start
    p = qkv.new_zeros(B, H, W)
    p[:, rows, columns] = _probabilities(q, k)[:, :, inside].mean(1).view(B, h, w)
    return p


def _spread(cells: Tensor, side: int, H: int, W: int) -> Tensor:  # (B, h, 1, w, 1) -> (B, H, W)
    B, h, _, w, _ = cells.shape
    return cells.expand(B, h, side, w, side).reshape(B, h * side, w * side)[:, :H, :W]
