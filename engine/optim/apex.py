"""Optimisers of NVIDIA's apex, fused Adam and LAMB, adapted to skipped updates and to the stored state of torch and timm."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

BUILD = (
    "git clone https://github.com/NVIDIA/apex && cd apex && "
    "APEX_CPP_EXT=1 APEX_CUDA_EXT=1 pip install -v --no-build-isolation --no-cache-dir ."
)
CLASSES = {"adamw": "FusedAdam", "adam": "FusedAdam", "lamb": "FusedLAMB"}
STORED_AS = {"adamw": "AdamW", "adam": "Adam", "lamb": "Lamb"}  # optimisers with interchangeable checkpoints


def apex_optimizer(name: str, groups: Sequence[dict[str, Any]], lr: float, **settings: Any) -> torch.optim.Optimizer:
    """Return apex's counterpart of timm's optimiser `name`; `settings` are betas and eps, if given.

    Raises ValueError if apex has no counterpart or is not installed, the latter with the command that builds it.
    """
    if name not in CLASSES:
        raise ValueError(f"OPTIM.BACKEND=apex has {', '.join(CLASSES)}, not OPTIM.NAME={name}; set BACKEND to auto")
    try:
        from apex import optimizers

        base = getattr(optimizers, CLASSES[name])
        if name == "lamb":
            return _lamb(base)([dict(group) for group in groups], lr=lr, weight_decay=0.0, **settings)
        adam = _adam(base, STORED_AS[name])
        return adam(
            [dict(group) for group in groups],
            lr=lr,
            weight_decay=0.0,
            adam_w_mode=name == "adamw",
            capturable=True,
            **settings,
        )
    except (ImportError, AttributeError, RuntimeError) as error:
        raise ValueError(
            f"OPTIM.BACKEND=apex: NVIDIA's apex with its CUDA extensions is missing ({error}); build it with `{BUILD}`, or set "
            "BACKEND to auto"
        ) from error


class _ScalerInterface:
    """Interface of a loss scaler as apex reads it: a skip flag, and a divisor of the gradients, 1 or that of clipping."""

    def __init__(self, found_inf: Tensor, scale: Tensor | None):
        self.found_inf = found_inf.reshape(1)
        self.scale = torch.ones_like(self.found_inf) if scale is None else scale.reshape(1)

    def _check_inf_per_device(self, optimizer: torch.optim.Optimizer) -> dict[torch.device, Tensor]:
        return {self.found_inf.device: self.found_inf}

    def _get_scale_async(self) -> Tensor:
        return self.scale


def _adam(base: Any, name: str) -> Any:
    class Adam(base):
        """apex's FusedAdam, `capturable`: learning rate, step counter and skip flag are on the device, without a wait.

        The groups' learning rates stay plain numbers, as schedules and checkpoints require. The step counter is kept here,
        one for all groups: apex counts some skipped updates. State is stored in the format of torch's Adam.
        """

        stored_as = name

        def __init__(self, groups: Sequence[dict[str, Any]], lr: float, **settings: Any):
            super().__init__(groups, lr=lr, **settings)
            self._rates = [group["lr"] for group in self.param_groups]
            for group in self.param_groups:
                group["lr"] = lr
            self._done = torch.zeros_like(self._dummy_overflow_buf)

        def zero_grad(self, set_to_none: bool = True) -> None:
            torch.optim.Optimizer.zero_grad(self, set_to_none)

        @torch.no_grad()
        def step(self, closure: None = None) -> None:
            """Update the weights by gradients / `grad_scale`, unless `found_inf` is set and not 0 (engine/optim/clip_and_step.py)."""
            numbers = [group["lr"] for group in self.param_groups]
            found_inf, scale = getattr(self, "found_inf", None), getattr(self, "grad_scale", None)
            self._dummy_overflow_buf.zero_()
            for group, rate in zip(self.param_groups, self._rates, strict=True):
                group["lr"], group["step"] = rate.fill_(group["lr"]), self._done.clone()
            try:
                super().step(grad_scaler=None if found_inf is None else _ScalerInterface(found_inf, scale))
            finally:
                for group, number in zip(self.param_groups, numbers, strict=True):
                    group["lr"] = number
                    del group["step"]
            self._done += 1 if found_inf is None else found_inf == 0

        def state_dict(self) -> dict[str, Any]:
            packed = super().state_dict()
            step = self._done.to(torch.float32).reshape(())
            return {**packed, "state": {i: {**entry, "step": step.clone()} for i, entry in packed["state"].items()}}

        def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
            state = {
                i: {key: entry[key] for key in ("exp_avg", "exp_avg_sq")} for i, entry in state_dict["state"].items()
            }
            super().load_state_dict({**state_dict, "state": state})
            self._done.fill_(max((int(entry["step"]) for entry in state_dict["state"].values()), default=0))

    Adam.__module__ = __name__
    return Adam


def _lamb(base: Any) -> Any:
    class Lamb(base):
        """apex's FusedLAMB, with the step counter of timm's Lamb in its stored state. It cannot skip an update on the device."""

        stored_as = STORED_AS["lamb"]

        def zero_grad(self, set_to_none: bool = True) -> None:
            torch.optim.Optimizer.zero_grad(self, set_to_none)

        def state_dict(self) -> dict[str, Any]:
            packed = super().state_dict()
            groups = [
                {**group, "step": torch.tensor(float(group["step"]))} if "step" in group else group
                for group in packed["param_groups"]
            ]
            return {**packed, "param_groups": groups}

        def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
            super().load_state_dict(dict(state_dict))
            for group in self.param_groups:
                if "step" in group:
                    group["step"] = int(group["step"])

    Lamb.__module__ = __name__
    return Lamb
