"""Check of an optimiser's stored state against its parameters: a checkpoint may come from somebody else.

Fused kernels check neither shapes nor the number of values, and would read beyond them; the others end in errors of Python.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

# Entries that the optimisers of OPTIM.NAME need for each parameter that was updated, by the names under which they are stored.
# Those whose entries differ between parameters are in `_needed`.
ENTRIES = {
    **dict.fromkeys(("Adam", "AdamW", "NAdamW", "RAdam", "Adopt"), ("step", "exp_avg", "exp_avg_sq")),
    "NAdam": ("step", "mu_product", "exp_avg", "exp_avg_sq"),
    "Lamb": ("exp_avg", "exp_avg_sq"),
    "SGD": ("momentum_buffer",),
    "Adagrad": ("step", "sum"),
    "AdaBelief": ("step", "exp_avg", "exp_avg_var"),
    "Adan": ("exp_avg", "exp_avg_sq", "exp_avg_diff", "neg_pre_grad"),
    "Lion": ("exp_avg",),
    "RMSpropTF": ("step", "square_avg"),
    "MADGRAD": ("step", "grad_sum_sq", "s"),
}
SINGLE = ("step", "mu_product", "RMS")  # numbers; nearly all other entries have the shape of the parameter
MAX_STEP = 1 << 50


def check_moments(optimizer: torch.optim.Optimizer, name: str, stored: Mapping[int, Mapping[str, Any]]) -> None:
    """Raise ValueError for a stored state, by the parameters' numbers, that does not fit the optimiser's parameters."""
    own = [(weight, group) for group in optimizer.param_groups for weight in group["params"]]
    for index, entry in stored.items():
        if not 0 <= index < len(own):
            wrong = ["no such parameter"]
        else:
            weight, group = own[index]
            wrong = [key for key in _needed(name, entry, group) if key not in entry] if entry else []
            wrong += [key for key, value in entry.items() if not _fits(key, value, weight.shape)]
        if wrong:
            raise ValueError(
                f"a state of the optimiser for parameter {index} that does not fit it ({str(wrong)[1:60]})"
            )


def _needed(name: str, entry: Mapping[str, Any], group: Mapping[str, Any]) -> tuple[str, ...]:
    if name == "Muon":
        return ("momentum_buffer",) if entry.get("use_muon") is True else ("use_muon", "step", "exp_avg", "exp_avg_sq")
    if name == "Adafactor":
        factors = ("exp_avg_sq_row", "exp_avg_sq_col")
        return ("step", *(factors if "exp_avg_sq_row" in entry else ("exp_avg_sq",)))
    momentum = {"RMSpropTF": ("momentum_buffer",), "MADGRAD": ("x0",)}.get(name, ())
    return (*ENTRIES.get(name, ()), *(momentum if group.get("momentum") else ()))


def _fits(key: str, value: Any, shape: torch.Size) -> bool:
    """Return True for a number, or a tensor of a parameter's shape; None for SGD's first momentum."""
    if key in SINGLE:
        return _is_number(value)
    if key == "use_muon":
        return isinstance(value, bool)
    if not isinstance(value, Tensor):
        return value is None and key == "momentum_buffer"
    if key.endswith(("_row", "_col")):  # of Adafactor: means over one dimension
        return value.is_floating_point() and value.shape in [shape[:i] + shape[i + 1 :] for i in range(len(shape))]
    return value.is_floating_point() and value.shape == shape


def _is_number(value: Any) -> bool:
    if isinstance(value, Tensor) and value.shape in ((), (1,)) and not value.is_complex():
        value = value.item()
    return isinstance(value, int | float) and 0 <= value < MAX_STEP
