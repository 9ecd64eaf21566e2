"""Exponential moving average (EMA) of a model's weights, updated on the device in one call, and the schedule of its decay."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from common.timeline import Timeline


class _Pairs(NamedTuple):
    """Tensors of one floating-point type in the averaged model and in the model itself, and their interpolation weight."""

    averaged: list[Tensor]
    current: list[Tensor]
    weight: Tensor  # 1 - decay or 0; one element, on CUDA as many as the largest tensor
    weights: list[Tensor]  # views of `weight` with the tensors' shapes, on CUDA their strides too


class ModelEma(ModelEmaV3):
    """timm's averaged model with an update that depends on a boolean on the device (engine/optim/clip_and_step.py).

    torch's foreach kernels take the interpolation weight from the host or in a tensor of each operand's shape. These are views
    of one small tensor here, which fits in the caches: one kernel reads and writes every weight once, without a wait.
    CUDA's kernels require the strides of the weights, the CPU's read a single number from a register.
    Parameters and BatchNorm statistics are averaged, counters copied, as in timm. Both models' tensors must stay in place.
    """

    def __init__(self, model: nn.Module, decay: float):
        super().__init__(model, decay=decay)
        self._pairs: list[_Pairs] | None = None
        self._counters: tuple[list[Tensor], list[Tensor]] = [], []

    @torch.no_grad()
    def update_if(self, is_finite: Tensor, model: nn.Module) -> None:
        """Move the averaged weights towards the model's by 1 - decay, if `is_finite`."""
        if self._pairs is None:
            self._pairs = self._pair(model)
        for pairs in self._pairs:
            pairs.weight.copy_(is_finite * (1.0 - self.decay))
            torch._foreach_lerp_(pairs.averaged, pairs.current, pairs.weights)
        if self._counters[0]:
            torch._foreach_copy_(*self._counters)

    def _pair(self, model: nn.Module) -> list[_Pairs]:
        by_type: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}
        both = zip(self.module.state_dict().values(), model.state_dict().values(), strict=True)
        for averaged, current in both:
            lists = by_type.setdefault(averaged.dtype, ([], [])) if averaged.is_floating_point() else self._counters
            lists[0].append(averaged)
            lists[1].append(current)
        return [
            _Pairs(averaged, current, *scalar_with_views(averaged, averaged[0].device.type == "cpu"))
            for averaged, current in by_type.values()
        ]

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_pairs": None, "_counters": ([], [])}


@dataclass
class EmaDecaySchedule:
    """Decay of the averaged weights over the epochs."""

    ema: ModelEma
    decay: Timeline

    def begin_epoch(self, epoch: int) -> None:
        """Set the decay of an epoch, counted from 0."""
        self.ema.decay = self.decay.at(epoch)


def scalar_with_views(tensors: list[Tensor], single: bool) -> tuple[Tensor, list[Tensor]]:
    """Return a tensor to be filled with one number, and views of it with the tensors' shapes.

    It has one element if `single`, else as many as the views need for the tensors' strides.
    """
    if single:
        one = tensors[0].new_empty(1)
        return one, [one.as_strided(t.shape, (0,) * t.ndim) for t in tensors]
    spans = [1 + sum((size - 1) * step for size, step in zip(t.shape, t.stride(), strict=True)) for t in tensors]
    many = tensors[0].new_empty(max(spans))
    return many, [many.as_strided(t.shape, t.stride()) for t in tensors]
