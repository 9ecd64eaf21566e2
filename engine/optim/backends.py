"""How an optimiser computes its update: in one kernel, in a few over all weights, or weight by weight."""

import inspect
from typing import Any

import torch
from timm.optim import get_optimizer_info
from torch import Tensor
from torch.utils._foreach_utils import _get_fused_kernels_supported_devices


def backend_settings(name: str, backend: str, device: torch.device) -> dict[str, Any]:
    """Return the arguments with which an optimiser of timm's factory takes a backend other than apex.

    auto is fused where the optimiser has it for the device, else what the optimiser chooses by itself, which is foreach on
    CUDA where it has it. Raises ValueError, naming what there is, for a backend that the optimiser lacks.
    """
    takes = inspect.signature(get_optimizer_info(name).opt_class).parameters
    has = {
        "fused": "fused" in takes and device.type in _get_fused_kernels_supported_devices(),
        "foreach": "foreach" in takes,
        "for-loop": True,
    }
    if backend == "auto":
        return {"fused": True} if has["fused"] else {}
    if not has[backend]:
        others = ", ".join(["auto", *(key for key, there in has.items() if there)])
        raise ValueError(f"OPTIM.BACKEND={backend}: {name} has none on {device.type}; take one of {others}")
    if backend == "fused":
        return {"fused": True}
    settings: dict[str, Any] = {"foreach": backend == "foreach"} if has["foreach"] else {}
    return settings | ({"fused": False} if "fused" in takes else {})


def backend_of(optimizer: torch.optim.Optimizer) -> str:
    """Return an optimiser's backend, as a person reads it."""
    group = optimizer.param_groups[0]
    if type(optimizer).__module__ == "engine.optim.apex":
        return "apex"
    if group.get("fused"):
        return "fused"
    chosen = group.get("foreach")
    return "of the optimiser's choice" if chosen is None else "foreach" if chosen else "for-loop"


def skips_on_device(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether an optimiser leaves out an update by itself, so that the host need not know (engine/optim/clip_and_step.py)."""
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))


def align_state(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Bring the state of a new or restored optimiser to the form that fused kernels rely on; return the optimiser.

    They walk through weights, gradients and state in the order of memory, so these must have the same strides, which on the
    CPU nobody checks. And fused SGD takes its momentum from memory that was never written if its first update is skipped;
    momentum that begins at zero gives the same first update.
    """
    for group in optimizer.param_groups:
        starts_at_zero = isinstance(optimizer, torch.optim.SGD) and group["fused"] and group["momentum"]
        for weight in group["params"]:
            if starts_at_zero and optimizer.state[weight].get("momentum_buffer") is None:
                optimizer.state[weight]["momentum_buffer"] = torch.zeros_like(weight)
            state = optimizer.state.get(weight, {})
            for key, value in state.items():
                if isinstance(value, Tensor) and value.shape == weight.shape and value.stride() != weight.stride():
                    state[key] = torch.empty_like(weight, dtype=value.dtype).copy_(value)
    return optimizer
