"""Drop path (stochastic depth) rates that change during a run: the schedule over epochs, and a layer for compiled models."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from timm.layers import DropPath
from torch import Tensor, nn

from common.timeline import Timeline


@dataclass
class DropPathSchedule:
    """Drop path rate of a model's last block over the epochs."""

    set_rate: Callable[[float], None]
    rate: Timeline

    def begin_epoch(self, epoch: int) -> None:
        """Set the rate of an epoch, counted from 0."""
        self.set_rate(self.rate.at(epoch))


def drop_path_setter(model: nn.Module, built_with: float) -> Callable[[float], None]:
    """Return a function that sets a model's drop path rate, that of its last block; `built_with` is the rate at construction.

    Models without `set_drop_path_rate` (timm's) keep the rates of their blocks in proportion. Raises ValueError if the model
    has no drop path.
    """
    if hasattr(model, "set_drop_path_rate"):
        return model.set_drop_path_rate  # type: ignore[return-value]
    initial = [(module, module.drop_prob) for module in model.modules() if isinstance(module, DropPath)]
    if not initial:
        raise ValueError(
            f"TIMELINE.DROP_PATH_RATE has no effect: {type(model).__name__} has no drop path; set it to ''"
        )

    def scale(rate: float) -> None:
        for module, initial_rate in initial:
            module.drop_prob = initial_rate * rate / built_with

    return scale


class VaryingDropPath(DropPath):
    """timm's DropPath with the rate in a tensor, so that a changed rate does not recompile the model.

    It draws its masks by another method than timm's: at the same rate it drops other samples.
    """

    rate: Tensor

    def __init__(self, like: DropPath, device: torch.device):
        nn.Module.__init__(self)
        self.scale_by_keep = like.scale_by_keep
        self.register_buffer("rate", torch.tensor(like.drop_prob, device=device), persistent=False)
        self._rate_on_host = like.drop_prob

    @property
    def drop_prob(self) -> float:
        """Return the probability that a sample is dropped."""
        return self._rate_on_host

    @drop_prob.setter
    def drop_prob(self, rate: float) -> None:
        self._rate_on_host = rate
        self.rate.fill_(rate)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        keep = 1 - self.rate
        mask = torch.bernoulli(keep.expand(len(x)))  # (B,)
        if self.scale_by_keep:
            mask = mask / keep
        return x * mask.to(x.dtype).view(-1, *[1] * (x.ndim - 1))


def vary_drop_path(model: nn.Module) -> None:
    """Replace a model's DropPath layers by VaryingDropPath, so that changed rates do not recompile it."""
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if type(child) is DropPath:
                device = next(model.parameters()).device
                setattr(parent, name, VaryingDropPath(child, device).train(child.training))
