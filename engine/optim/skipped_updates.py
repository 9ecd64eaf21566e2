"""Skipped updates: counts of those that were not finite, and the divergence of a run with too many in a row."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor


class DivergedError(RuntimeError):
    """Too many consecutive updates were skipped: `consecutive` of them, the last one update `last_update` of the run, from 1."""

    def __init__(self, message: str, consecutive: int = 0, last_update: int = 0):
        super().__init__(message)
        self.consecutive, self.last_update = consecutive, last_update


class Skips(NamedTuple):
    """Numbers of skipped updates on the host: consecutive ones, all of the run, and fp16 overflows of the run."""

    consecutive: int
    in_run: int
    overflows: int


class SkipCounts:
    """Numbers of skipped updates, on the device: consecutive ones, all of the run, and fp16 overflows of the run.

    An overflow of scaled gradients is part of the loss scaler's search for a scale: it is counted separately, and neither
    adds to the consecutive skips nor ends them.
    """

    def __init__(self, tensor: Tensor | None = None):
        """`tensor` is the stored form: int64 (3,) of consecutive, in_run, overflows."""
        self.tensor = torch.zeros(3, dtype=torch.int64) if tensor is None else tensor

    @property
    def consecutive(self) -> Tensor:
        """Return the number of consecutive skipped updates up to the last one."""
        return self.tensor[0]

    @property
    def in_run(self) -> Tensor:
        """Return the number of skipped updates of the run, without overflows."""
        return self.tensor[1]

    @property
    def overflows(self) -> Tensor:
        """Return the number of updates of the run skipped because scaled gradients overflowed."""
        return self.tensor[2]

    def read(self) -> "Skips":
        """Return the counts as numbers; waits for the device."""
        return Skips(*self.tensor.tolist())

    def to(self, device: torch.device) -> "SkipCounts":
        """Return the counts on a device."""
        return SkipCounts(self.tensor.to(device))

    def count(self, is_finite: Tensor, is_overflow: Tensor) -> Tensor:
        """Count an update; return whether it counts as skipped, which an overflow does not."""
        skipped = ~is_finite & ~is_overflow
        consecutive = torch.where(is_finite, 0, self.consecutive + skipped)
        overflows = self.overflows + (~is_finite & is_overflow)
        self.tensor.copy_(torch.stack([consecutive, self.in_run + skipped, overflows]))
        return skipped


class ConsecutiveSkips:
    """Reader of the number of consecutive skips: on CUDA an update late, so that the host does not wait."""

    def __init__(self) -> None:
        self._pinned: Tensor | None = None
        self._copied: torch.cuda.Event | None = None

    def read(self, skips: SkipCounts) -> int:
        """Return the number of consecutive skips after the last update, or on CUDA after the one before."""
        if not skips.tensor.is_cuda:
            return int(skips.consecutive)
        before = 0
        if self._pinned is None or self._copied is None:
            self._pinned = torch.empty((), dtype=torch.int64, pin_memory=True)
            self._copied = torch.cuda.Event(blocking=True)  # sleeps: a spinning wait takes a core from the loader
        else:
            self._copied.synchronize()
            before = int(self._pinned)
        self._pinned.copy_(skips.consecutive, non_blocking=True)
        self._copied.record()
        return before


def gradient_seed(loss: Tensor) -> Tensor:
    """Return the gradient of a loss by itself, with which the backward pass begins: 1, or NaN if the loss is not finite."""
    return torch.where(loss.detach().isfinite(), torch.ones_like(loss), math.nan)


def is_rollback_target(stored: Mapping[str, Any]) -> bool:
    """Return True if a run can go back to a stored state: no update skipped just before it, all weights and moments finite."""
    consecutive = int(SkipCounts(stored["skips"]).consecutive) if "skips" in stored else 0
    parts = (stored["model"], stored.get("ema") or {}, moments(stored.get("optimizer") or {}))
    tensors = (value for part in parts for value in part.values() if isinstance(value, Tensor))
    return not consecutive and all(bool(w.isfinite().all()) for w in tensors if w.is_floating_point())


def moments(optimizer: Mapping[str, Any]) -> dict[str, Any]:
    """Return the tensors and numbers of an optimiser's state dict, by a name for messages."""
    state = optimizer.get("state", {})
    return {f"optimiser {name} of parameter {key}": value for key, own in state.items() for name, value in own.items()}


def tensor_norms(weights: Mapping[str, Tensor]) -> dict[str, float | str]:
    """Return the L2 norm of every floating-point tensor, for JSON."""
    return {name: json_number(float(w.float().norm())) for name, w in weights.items() if w.is_floating_point()}


def json_number(number: float) -> float | str:
    """Return a number for JSON, which has no nan and inf: these as strings."""
    return number if math.isfinite(number) else str(number)
