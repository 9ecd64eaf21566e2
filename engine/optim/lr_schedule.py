"""Learning rate schedule: warmup, one of timm's decay formulas, delay and cooldown, as a function of the updates done."""

from dataclasses import dataclass

from timm.scheduler.scheduler import Scheduler


@dataclass
class LrSchedule:
    """A schedule of timm in steps of one update or of one epoch's updates; step s has the value of s - delay, within 0 .. last.

    timm's scheduler holds the warmup and the decay. Clamping to `last` keeps the final value during the cooldown epochs.
    """

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
        assert values is not None  # build.py creates schedulers that step by timm's "epochs"
        groups = self.scheduler.optimizer.param_groups
        return max(value * group.get("lr_scale", 1.0) for value, group in zip(values, groups, strict=True))

    def _step(self, update: int) -> int:
        return min(max(update // self.updates_per_step - self.delay, 0), self.last)
