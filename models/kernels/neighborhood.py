"""3×3 neighbourhoods of the cells of a grid, for STViT's super tokens: gather from them, and the adjoint, add to them.

The two linear maps are each other's gradient, which autograd alone would build from some fifty small kernels.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def unfold_neighbors(x: Tensor) -> Tensor:
    """Gather the 3×3 neighbours of each cell, row by row, zeros outside the grid: (B, h, w, C) -> (B, h, w, 9, C)."""
    return _Neighborhood.apply(x, True)


def overlap_add(x: Tensor) -> Tensor:
    """Add the nine values of each cell to the 3×3 cells around it: (B, h, w, 9, C) -> (B, h, w, C).

    Values for cells outside the grid are dropped. Adds up in float32 or wider.
    """
    return _Neighborhood.apply(x, False)


def _gather(x: Tensor) -> Tensor:
    windows = F.pad(x, (0, 0, 1, 1, 1, 1)).unfold(1, 3, 1).unfold(2, 3, 1)  # (B, h, w, C, 3, 3)
    return windows.permute(0, 1, 2, 4, 5, 3).flatten(3, 4)


def _scatter(x: Tensor) -> Tensor:
    _, h, w, _, _ = x.shape
    padded = F.pad(x, (0, 0, 0, 0, 1, 1, 1, 1))
    # Value 3 * i + j of a cell is for the cell i - 1 rows below and j - 1 columns to the right.
    parts = [padded[:, 2 - i : 2 - i + h, 2 - j : 2 - j + w, 3 * i + j] for i in range(3) for j in range(3)]
    total = sum(parts[1:], parts[0].to(torch.promote_types(x.dtype, torch.float32)))
    # Not a cast in all cases: compiled by torch 2.11, a Function whose forward ends with one that does nothing has no gradient.
    return total if total.dtype == x.dtype else total.to(x.dtype)


class _Neighborhood(torch.autograd.Function):
    """Gather or scatter, each with the other one as its gradient."""

    @staticmethod
    def forward(x: Tensor, gather: bool) -> Tensor:
        return _gather(x) if gather else _scatter(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, bool], output: Tensor) -> None:
        ctx.gather = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return (_scatter(grad) if ctx.gather else _gather(grad)), None
