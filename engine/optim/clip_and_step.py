"""Updates that must not happen: a loss or a gradient that is not finite leaves everything as it was, and is counted.

The verdict is one boolean on the device, the same on all processes, because the gradients that they exchange carry it: a
process whose loss is not finite sends NaN (`seed_of`), and a norm that is not finite is so everywhere. What follows from it
is computed on the device as well; the host is not asked to wait:

    weights, optimiser state and its step counters    an optimiser that takes `found_inf` (torch's fused ones and apex's
                                                      Adam: OPTIM.BACKEND) skips by itself; for others the host reads the
                                                      verdict, which is free on the CPU and on CUDA costs a wait per update:
                                                      their counters are Python's, nothing else is sound
    averaged weights, BatchNorm statistics            moved by nought (ema.py), or set back (batchnorm.py)
    counters                                          on the device; the host reads them an update late
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_

from engine.optim.backends import skips_on_device

MARGIN = 1e-6  # torch's, beside the norm that it clips


class DivergedError(RuntimeError):
    """Too many updates in a row had to be skipped: `consecutive` of them, the last one update `last_update` of the run, from 1."""

    def __init__(self, message: str, consecutive: int = 0, last_update: int = 0):
        super().__init__(message)
        self.consecutive, self.last_update = consecutive, last_update


def gradient_seed(loss: Tensor) -> Tensor:
    """Return the gradient that a loss begins its backward pass with: 1, or NaN if it is not finite."""
    return torch.where(loss.detach().isfinite(), torch.ones_like(loss), math.nan)


def clip_and_step(ok: Tensor, optimizer: torch.optim.Optimizer, norm: Tensor | None = None, limit: float = 0.0) -> None:
    """Step, unless the verdict is against it, with gradients whose L2 norm, `norm`, is brought down to `limit` (0: left).

    A kernel that would divide gradients by a loss scale divides them by what they are too long: no pass over them of its own.
    """
    if skips_on_device(optimizer):
        too_long = ((norm + MARGIN) / limit).clamp(min=1.0).float() if norm is not None and limit else None
        optimizer.grad_scale, optimizer.found_inf = too_long, (~ok).float()  # type: ignore[attr-defined]
        optimizer.step()
        del optimizer.grad_scale, optimizer.found_inf  # type: ignore[attr-defined]
    elif ok:
        if norm is not None and limit:
            clip_grads_with_norm_([w for group in optimizer.param_groups for w in group["params"]], limit, norm)
        optimizer.step()


def count_skipped(skips: Tensor, ok: Tensor, overflow: Tensor) -> Tensor:
    """Bring (skipped in a row, skipped, overflows) up to date; return whether this update counts as skipped.

    An overflow of scaled gradients is the scaler's own search for a scale: it neither lengthens a row nor ends it.
    """
    counted = ~ok & ~overflow
    row = torch.where(ok, 0, skips[0] + counted)
    skips.copy_(torch.stack([row, skips[1] + counted, skips[2] + (~ok & overflow)]))
    return counted


class ConsecutiveSkips:
    """Tells the host how many updates in a row were skipped: on CUDA an update late, so that it need not wait."""

    def __init__(self) -> None:
        self._box: Tensor | None = None
        self._copied: torch.cuda.Event | None = None

    def read(self, skips: Tensor) -> int:
        """Return the length of the row after the last update, or on CUDA after the one before."""
        if not skips.is_cuda:
            return int(skips[0])
        before = 0
        if self._box is None or self._copied is None:
            self._box, self._copied = torch.empty(1, dtype=skips.dtype, pin_memory=True), torch.cuda.Event()
        else:
            self._copied.synchronize()
            before = int(self._box)
        self._box.copy_(skips[:1], non_blocking=True)
        self._copied.record()
        return before


def is_sound(stored: Mapping[str, Any]) -> bool:
    """Return whether a stored state is worth going back to: no update skipped just before it, all weights finite."""
    row = int(stored["skips"][0]) if "skips" in stored else 0
    return not row and all(bool(w.isfinite().all()) for w in stored["model"].values() if w.is_floating_point())


def tensor_norms(weights: Mapping[str, Tensor]) -> dict[str, float | str]:
    """Return the L2 norm of every floating-point tensor, for JSON."""
    return {name: json_number(float(w.float().norm())) for name, w in weights.items() if w.is_floating_point()}


def json_number(number: float) -> float | str:
    """Return a number as JSON takes it: nan and inf as words."""
    return number if math.isfinite(number) else str(number)
