"""Permutation of rows whose gradient is the inverse permutation, where autograd would add rows up into zeros, one by one."""

from typing import Any

import torch
from torch import Tensor


def permute_rows(x: Tensor, order: Tensor) -> Tensor:
    """Return the rows of x (N, C) in another order; order (N,) holds each row's number once."""
    return _PermutedRows.apply(x, order)


class _PermutedRows(torch.autograd.Function):
    """Gather by a permutation, with a gather by its inverse as the gradient."""

    @staticmethod
    def forward(x: Tensor, order: Tensor) -> Tensor:
        return x.index_select(0, order)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (order,) = ctx.saved_tensors
        places = torch.arange(len(order), device=order.device)
        return grad.index_select(0, torch.empty_like(order).scatter_(0, order, places)), None
