"""Fake of NVIDIA's apex for the CPU: its interfaces and stored state, computed in plain PyTorch."""

import types

import torch
from torch import nn


class FusedAdam(torch.optim.Optimizer):
    """Fake of apex's FusedAdam: with `capturable` learning rates are tensors, and a loss scaler holds the skip flag."""

    def __init__(
        self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, adam_w_mode=True, weight_decay=0.0, capturable=False
    ):
        rate = torch.tensor(lr, dtype=torch.float32) if capturable else lr
        super().__init__(params, {"lr": rate, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        for group in self.param_groups:
            group["lr"] = group["lr"].to(group["params"][0].device)
        self.adam_w_mode, self._step_supports_amp_scaling = adam_w_mode, capturable
        self._dummy_overflow_buf = torch.zeros(1, dtype=torch.int, device=self.param_groups[0]["params"][0].device)

    def zero_grad(self):
        raise AssertionError("apex's zero_grad has no set_to_none")

    @torch.no_grad()
    def step(self, closure=None, grad_scaler=None):
        for group in self.param_groups:
            assert isinstance(group["lr"], torch.Tensor)
            group["step"] += (self._dummy_overflow_buf != 1).to(torch.int)
            found = grad_scaler._check_inf_per_device(self)[self._dummy_overflow_buf.device]
            scale = grad_scaler._get_scale_async()
            assert scale.shape == (1,)
            self._dummy_overflow_buf.copy_(found)
            for weight in (w for w in group["params"] if w.grad is not None):
                self._move(group, weight, 1 / scale)

    def _move(self, group, weight, factor):
        state, (one, two), step = self.state[weight], group["betas"], group["step"]
        if not state:
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(weight), torch.zeros_like(weight)
        mean, square, decay = state["exp_avg"], state["exp_avg_sq"], group["weight_decay"]
        gradient = factor * weight.grad + (0 if self.adam_w_mode else decay * weight)
        new_mean, new_square = mean.lerp(gradient, 1 - one), square * two + gradient.square() * (1 - two)
        size = (new_square / (1 - two**step)).sqrt() + group["eps"]
        move = new_mean / (1 - one**step) / size + (decay * weight if self.adam_w_mode else 0)
        skip = self._dummy_overflow_buf == 1
        for old, new in ((mean, new_mean), (square, new_square), (weight, weight - group["lr"] * move)):
            old.copy_(torch.where(skip, old, new))


class FusedLAMB(torch.optim.Optimizer):
    """Fake of apex's FusedLAMB: counts steps in its groups and cannot skip. It moves by the sign of the mean gradient only."""

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.01, max_grad_norm=1.0):
        kept = {"betas": betas, "eps": eps, "bias_correction": True, "grad_averaging": True}
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "max_grad_norm": max_grad_norm, **kept})

    def zero_grad(self):
        raise AssertionError("apex's zero_grad has no set_to_none")

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            assert isinstance(group["step"], int)
            assert group["bias_correction"]
            for weight in group["params"]:
                state = self.state[weight]
                state.setdefault("exp_avg", torch.zeros_like(weight)).lerp_(weight.grad, 1 - group["betas"][0])
                state.setdefault("exp_avg_sq", torch.zeros_like(weight)).lerp_(weight.grad.square(), 0.001)
                weight.sub_(group["lr"] * state["exp_avg"].sign())


class FusedLayerNorm(nn.LayerNorm):
    """Fake of apex's FusedLayerNorm, which computes in the type of its input, and casts under autocast."""

    def forward(self, x):
        assert x.dtype == self.weight.dtype
        assert not torch.is_autocast_enabled(x.device.type)
        return super().forward(x)


def modules():
    """Return the fake modules by name, for sys.modules."""
    apex = types.ModuleType("apex")
    apex.optimizers, apex.normalization = types.ModuleType("apex.optimizers"), types.ModuleType("apex.normalization")
    apex.optimizers.FusedAdam, apex.optimizers.FusedLAMB = FusedAdam, FusedLAMB
    apex.normalization.FusedLayerNorm = FusedLayerNorm
    return {"apex": apex, "apex.optimizers": apex.optimizers, "apex.normalization": apex.normalization}
