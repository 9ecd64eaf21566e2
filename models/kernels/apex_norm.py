"""LayerNorm of NVIDIA's apex (MODEL.NORM_BACKEND apex)."""

from typing import Any

import torch
from torch import Tensor, nn

from ..layers import LayerNorm

BUILD = (
    "git clone https://github.com/NVIDIA/apex && cd apex && "
    "APEX_CPP_EXT=1 APEX_CUDA_EXT=1 pip install -v --no-build-isolation --no-cache-dir ."
)


def use_apex_norms(model: nn.Module) -> None:
    """Replace every plain LayerNorm by apex's FusedLayerNorm, with the same weights and names.

    It computes in float32 under autocast, like LayerNorm. Raises ValueError if the model has none, or apex is missing.
    """
    try:
        from apex.normalization import FusedLayerNorm
    except ImportError as error:
        raise ValueError(
            f"MODEL.NORM_BACKEND=apex: NVIDIA's apex with its CUDA extensions is missing ({error}); build it with `{BUILD}`, "
            "or set NORM_BACKEND to torch"
        ) from error
    fused = _wide(FusedLayerNorm)
    replaced = 0
    for parent in list(model.modules()):
        for name, norm in parent.named_children():
            if type(norm) in (LayerNorm, nn.LayerNorm) and norm.bias is not None:
                own = fused(norm.normalized_shape, eps=norm.eps).train(norm.training)
                own.weight, own.bias = norm.weight, norm.bias
                setattr(parent, name, own)
                replaced += 1
    if not replaced:
        raise ValueError(
            f"MODEL.NORM_BACKEND=apex has no effect: {type(model).__name__} has no LayerNorm; set it to torch"
        )


def _wide(base: Any) -> Any:
    class ApexLayerNorm(base):
        """FusedLayerNorm of apex in the type of its weights, with autocast off."""

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast(x.device.type, enabled=False):
                return super().forward(x.to(self.weight.dtype))

    return ApexLayerNorm
