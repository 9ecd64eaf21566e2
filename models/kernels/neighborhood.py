"""A cell and the eight around it: the sparse neighbourhood of STViT's super tokens, and its adjoint.

The two maps are each other's gradient, which autograd alone would build from some fifty small kernels.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def unfold_neighbors(x: Tensor) -> Tensor:
    """Put beside each cell its 3×3 neighbours, row by row, zeros outside the grid: (B, h, w, C) -> (B, h, w, 9, C)."""
    return _Neighbours.apply(x)


def overlap_add(x: Tensor) -> Tensor:
    """Add what each cell holds for its 3×3 neighbours where it belongs: (B, h, w, 9, C) -> (B, h, w, C).

    What is held for cells outside the grid is lost. Adds up in float32 or wider.
    """
    return _OverlapAdd.apply(x)


def _neighbours(x: Tensor) -> Tensor:
    windows = F.pad(x, (0, 0, 1, 1, 1, 1)).unfold(1, 3, 1).unfold(2, 3, 1)  # (B, h, w, C, 3, 3)
    return windows.permute(0, 1, 2, 4, 5, 3).flatten(3, 4)


def _overlap_add(x: Tensor) -> Tensor:
    _, h, w, _, _ = x.shape
    padded = F.pad(x, (0, 0, 0, 0, 1, 1, 1, 1))
    # What a cell holds at 3 * i + j goes i - 1 rows down and j - 1 columns right.
    parts = [padded[:, 2 - i : 2 - i + h, 2 - j : 2 - j + w, 3 * i + j] for i in range(3) for j in range(3)]
    return sum(parts[1:], parts[0].to(torch.promote_types(x.dtype, torch.float32))).to(x.dtype)


class _Neighbours(torch.autograd.Function):
    forward = staticmethod(_neighbours)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return _overlap_add(grad)


class _OverlapAdd(torch.autograd.Function):
    forward = staticmethod(_overlap_add)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return _neighbours(grad)
