"""Sums of losses and gradient norms over updates, kept on the device until a logging step reads their means."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from engine.distributed.processes import Processes


class Sums(NamedTuple):
    """Sums over updates, averaged over the processes."""

    loss: float  # of the updates whose loss is finite
    finite_losses: float  # number of those
    grad_norm: float  # of the updates whose gradient is finite
    finite_norms: float  # number of those
    updates: float
    skipped: float

    @property
    def mean_loss(self) -> float:
        """Return the mean of the finite losses; nan if there is none."""
        return self.loss / self.finite_losses if self.finite_losses else math.nan

    @property
    def mean_grad_norm(self) -> float:
        """Return the mean of the finite gradient norms; inf if there is none."""
        return self.grad_norm / self.finite_norms if self.finite_norms else math.inf


class RunningSums:
    """Sums since the epoch began and since the last logging step, float64 on the device."""

    def __init__(self, tensor: Tensor | None = None):
        """`tensor` is the stored form: (2, 6), a row since the epoch began and one since the logging step, columns as in Sums."""
        self.tensor = torch.zeros(2, len(Sums._fields), dtype=torch.float64) if tensor is None else tensor

    @property
    def since_epoch(self) -> Tensor:
        """Return the sums since the epoch began, (6,)."""
        return self.tensor[0]

    @property
    def since_logging(self) -> Tensor:
        """Return the sums since the last logging step, (6,)."""
        return self.tensor[1]

    def to(self, device: torch.device) -> "RunningSums":
        """Return the sums on a device."""
        return RunningSums(self.tensor.to(device))

    def add(self, loss: Tensor, grad_norm: Tensor, skipped: Tensor) -> None:
        """Add an update: its loss and gradient norm if they are finite, and whether it counts as skipped."""
        loss_is_finite, norm_is_finite = loss.isfinite(), grad_norm.isfinite()
        loss, norm = torch.where(loss_is_finite, loss, 0.0), torch.where(norm_is_finite, grad_norm, 0.0)
        self.tensor += torch.stack([loss, loss_is_finite, norm, norm_is_finite, torch.ones_like(norm), skipped])

    def begin_logging(self) -> None:
        """Set the sums since the last logging step to 0."""
        self.since_logging.zero_()

    def begin_epoch(self) -> None:
        """Set all sums to 0."""
        self.tensor.zero_()

    def mean(self, processes: Processes) -> Tensor:
        """Return the stored form, averaged over the processes, on their device. Called by all processes."""
        sums = processes.sum(self.tensor.to(processes.device, copy=True))  # NCCL takes no CPU tensor
        return sums.div_(processes.world)

    def read(self, processes: Processes) -> tuple[Sums, Sums]:
        """Return the sums since the epoch began and since the last logging step; waits for the device."""
        since_epoch, since_logging = self.mean(processes).tolist()
        return Sums(*since_epoch), Sums(*since_logging)


def from_format_1(sums: Tensor) -> Tensor:
    """Return sums stored in checkpoints of format 1, (2, 4) of loss, grad_norm, finite_norms, updates, in the present form.

    Format 1 counted the loss of every update, and ended the run at a skipped one.
    """
    loss, grad_norm, finite_norms, updates = sums.T
    return torch.stack([loss, updates, grad_norm, finite_norms, updates, torch.zeros_like(updates)], dim=1)
