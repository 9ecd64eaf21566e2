"""The averaged weights of a model (EMA), moved on the device in one call and only by updates that count."""

from typing import Any, NamedTuple

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn


class _Pairs(NamedTuple):
    """Tensors of one floating-point type in the averaged and in the model itself, and how far the former move."""

    own: list[Tensor]
    new: list[Tensor]
    share: Tensor  # one number, on CUDA as often as the largest of them has elements
    shares: list[Tensor]  # views of it with their shapes, on CUDA their strides too


class ModelEma(ModelEmaV3):
    """timm's averaged model, whose update obeys a verdict that only the device knows (engine/optim/clip_and_step.py).

    torch's foreach kernels take the share by which weights move from the host or in a tensor of their own shape. The latter
    are views of one small tensor here, which the caches hold: one kernel reads and writes every weight once, nothing waits.
    CUDA's kernels want their strides to be the weights', the CPU's read a single number from a register.
    Parameters and BatchNorm statistics are averaged, counters copied, as timm does. Both models' tensors must stay in place.
    """

    def __init__(self, model: nn.Module, decay: float):
        super().__init__(model, decay=decay)
        self._pairs: list[_Pairs] | None = None
        self._counters: tuple[list[Tensor], list[Tensor]] = [], []

    @torch.no_grad()
    def move_if(self, ok: Tensor, model: nn.Module) -> None:
        """Move the averaged weights towards the model's by 1 - decay, unless the verdict is against it."""
        if self._pairs is None:
            self._pairs = self._pair(model)
        for pairs in self._pairs:
            pairs.share.copy_(ok * (1.0 - self.decay))
            torch._foreach_lerp_(pairs.own, pairs.new, pairs.shares)
        if self._counters[0]:
            torch._foreach_copy_(*self._counters)

    def _pair(self, model: nn.Module) -> list[_Pairs]:
        found: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}
        both = zip(self.module.state_dict().values(), model.state_dict().values(), strict=True)
        for own, new in both:
            lists = found.setdefault(own.dtype, ([], [])) if own.is_floating_point() else self._counters
            lists[0].append(own)
            lists[1].append(new)
        return [_Pairs(own, new, *views_of_one(own, own[0].device.type == "cpu")) for own, new in found.values()]

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_pairs": None, "_counters": ([], [])}


def views_of_one(tensors: list[Tensor], single: bool) -> tuple[Tensor, list[Tensor]]:
    """Return a tensor that is to hold one number, and views of it with the tensors' shapes.

    It has a single element, or as many as give the views the tensors' strides, too.
    """
    if single:
        one = tensors[0].new_empty(1)
        return one, [one.as_strided(t.shape, (0,) * t.ndim) for t in tensors]
    spans = [1 + sum((size - 1) * step for size, step in zip(t.shape, t.stride(), strict=True)) for t in tensors]
    many = tensors[0].new_empty(max(spans))
    return many, [many.as_strided(t.shape, t.stride()) for t in tensors]
