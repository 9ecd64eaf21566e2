"""Schedules of a run: learning rate by update, drop path rate and EMA decay by epoch.

All are functions of the number of updates done, so they have no state of their own in a checkpoint.
"""

from dataclasses import dataclass

from engine.drop_path import DropPathSchedule
from engine.optim.ema import EmaDecaySchedule
from engine.optim.lr_schedule import LrSchedule


@dataclass
class Schedules:
    """Schedules of the engine; those of the data (image size, mixing, magnitude) are in data/."""

    learning_rate: LrSchedule
    drop_path: DropPathSchedule | None = None
    ema_decay: EmaDecaySchedule | None = None

    def set(self, update: int) -> None:
        """Set the learning rate for an update, counted from 0."""
        self.learning_rate.set(update)

    def lr_at(self, update: int) -> float:
        """Return the largest learning rate of any parameter group at an update, counted from 0; change nothing."""
        return self.learning_rate.lr_at(update)

    def begin_epoch(self, epoch: int) -> None:
        """Set the values that are constant within an epoch, counted from 0."""
        if self.drop_path:
            self.drop_path.begin_epoch(epoch)
        if self.ema_decay:
            self.ema_decay.begin_epoch(epoch)
