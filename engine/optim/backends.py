"""Backends of an optimiser: fused (one kernel), foreach (a few kernels over all weights) or for-loop (weight by weight)."""

import inspect
from typing import Any

import torch
from timm.optim import get_optimizer_info
from torch import Tensor
from torch.utils._foreach_utils import _get_fused_kernels_supported_devices


def backend_settings(name: str, backend: str, device: torch.device) -> dict[str, Any]:
    """Return the arguments that select a backend other than apex in timm's optimiser factory.

    auto is fused where the optimiser has it for the device, else the optimiser's own choice, which is foreach on CUDA where
    it has it. Raises ValueError for a backend that the optimiser lacks; it lists those available.
    """
    parameters = inspect.signature(get_optimizer_info(name).opt_class).parameters
    has = {
        "fused": "fused" in parameters and device.type in _get_fused_kernels_supported_devices(),
        "foreach": "foreach" in parameters,
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
    return settings | ({"fused": False} if "fused" in parameters else {})


def backend_of(optimizer: torch.optim.Optimizer) -> str:
    """Return the name of an optimiser's backend, for logs."""
    group = optimizer.param_groups[0]
    if type(optimizer).__module__ == "engine.optim.apex":
        return "apex"
    if group.get("fused"):
        return "fused"
    chosen = group.get("foreach")
    return "of the optimiser's choice" if chosen is None else "foreach" if chosen else "for-loop"


def skips_on_device(optimizer: torch.optim.Optimizer) -> bool:
    """Return True if an optimiser can skip an update on the device, without a read on the host (engine/optim/clip_and_step.py)."""
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))


def align_state(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Give the state of a new or restored optimiser the memory layout that fused kernels need; return the optimiser.

    Fused kernels traverse weights, gradients and state in the order of memory, so these must have the same strides, which is
    not checked on the CPU. Fused SGD reads uninitialised momentum if its first update is skipped; momentum that begins at zero
    gives the same first update.
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
