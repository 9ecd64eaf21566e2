"""Gradient clipping and a guarded optimiser step: an update whose loss or gradient is not finite leaves everything unchanged.

`is_finite` is one boolean on the device, equal on all processes because the gradients that they exchange carry it: a process
whose loss is not finite sends NaN (`gradient_seed` in skipped_updates.py), which makes the norm NaN everywhere. Its effects
are computed on the device without a wait of the host:

    weights, optimiser state, its step counters    optimisers with `found_inf` (torch's fused ones and apex's Adam, see
                                                   OPTIM.BACKEND) skip on the device; for others the host reads `is_finite`,
                                                   which is free on the CPU and on CUDA one wait per update: their step
                                                   counters are Python numbers, so no other way is correct
    averaged weights, BatchNorm statistics         unchanged (ema.py), or set back (batch_norm.py)
    skip counts                                    on the device; the host reads them an update late (skipped_updates.py)
"""

import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_

from engine.optim.backends import skips_on_device

EPS = 1e-6  # torch's, added to the norm in gradient clipping


def clip_and_step(
    is_finite: Tensor, optimizer: torch.optim.Optimizer, norm: Tensor | None = None, limit: float = 0.0
) -> None:
    """Clip the gradients, whose L2 norm is `norm`, to `limit` (0: no clipping) and step, if `is_finite`.

    Optimisers that divide gradients by a loss scale in their kernel divide them by norm / limit there, without another pass
    over the gradients.
    """
    if skips_on_device(optimizer):
        divisor = ((norm + EPS) / limit).clamp(min=1.0).float() if norm is not None and limit else None
        optimizer.grad_scale, optimizer.found_inf = divisor, (~is_finite).float()  # type: ignore[attr-defined]
        optimizer.step()
        del optimizer.grad_scale, optimizer.found_inf  # type: ignore[attr-defined]
    elif is_finite:
        if norm is not None and limit:
            clip_grads_with_norm_([w for group in optimizer.param_groups for w in group["params"]], limit, norm)
        optimizer.step()
