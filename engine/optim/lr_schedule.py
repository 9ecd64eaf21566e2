"""What changes with the position in a run: the learning rate, and by epoch drop path and the EMA decay.

All of it is a function of the number of updates done, so nothing of it is stored and a run continues anywhere.
"""

from collections.abc import Callable
from dataclasses import dataclass

from timm.layers import DropPath
from timm.scheduler.scheduler import Scheduler
from torch import nn

from common.timeline import Timeline
from engine.optim.ema import ModelEma


@dataclass
class LrSchedule:
    """timm's schedule over steps of one update or of an epoch's; step s gets its value at s - delay, within 0 .. last."""

    scheduler: Scheduler
    updates_per_step: int
    delay: int
    last: int

    def set(self, update: int) -> None:
        """Set the learning rate of every parameter group for an update, counted from 0."""
        self.scheduler.step(self._step(update))

    def lr_at(self, update: int) -> float:
        """Return the largest learning rate of any parameter group at an update, counted from 0; change nothing."""
        values = self.scheduler._get_values(self._step(update), on_epoch=True)
        assert values is not None  # timm's schedulers are stepped by "epochs" here, which are our steps
        groups = self.scheduler.optimizer.param_groups
        return max(value * group.get("lr_scale", 1.0) for value, group in zip(values, groups, strict=True))

    def _step(self, update: int) -> int:
        return min(max(update // self.updates_per_step - self.delay, 0), self.last)


@dataclass
class Schedule:
    """Everything that the position decides in the engine. What it decides about the data lies in data/."""

    learning_rate: LrSchedule
    set_drop_path: Callable[[float], None] | None = None
    drop_path: Timeline | None = None
    ema: ModelEma | None = None
    ema_decay: Timeline | None = None

    def set(self, update: int) -> None:
        """Set the learning rate for an update, counted from 0."""
        self.learning_rate.set(update)

    def lr_at(self, update: int) -> float:
        """Return the largest learning rate of any parameter group at an update, counted from 0; change nothing."""
        return self.learning_rate.lr_at(update)

    def begin_epoch(self, epoch: int) -> None:
        """Set what is constant within an epoch, counted from 0."""
        if self.drop_path and self.set_drop_path:
            self.set_drop_path(self.drop_path.at(epoch))
        if self.ema_decay and self.ema:
            self.ema.decay = self.ema_decay.at(epoch)


def drop_path_setter(model: nn.Module, built_with: float) -> Callable[[float], None]:
    """Return what sets a model's drop path rate, the one of its last block; it was built with the rate `built_with`.

    A model of timm's that cannot do it itself keeps its blocks' rates in proportion. ValueError if it has no drop path.
    """
    if hasattr(model, "set_drop_path_rate"):
        return model.set_drop_path_rate  # type: ignore[return-value]
    found = [(module, module.drop_prob) for module in model.modules() if isinstance(module, DropPath)]
    if not found:
        raise ValueError(
            f"TIMELINE.DROP_PATH_RATE has no effect: {type(model).__name__} has no drop path; set it to ''"
        )

    def scale(rate: float) -> None:
        for module, rate_there in found:
            module.drop_prob = rate_there * rate / built_with

    return scale
