"""Mixed precision: autocast to bf16, to fp16 with loss scaling, or none."""

from contextlib import AbstractContextManager, nullcontext

import torch

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Precision:
    """Number format of forward passes, and the loss scaler that fp16 needs. `mode` is bf16, fp16 or off."""

    def __init__(self, mode: str, device: torch.device):
        if mode == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
            raise ValueError(
                f"TRAIN.AMP=bf16 is not supported by {torch.cuda.get_device_name(device)}; set TRAIN.AMP to fp16 or off"
            )
        self.mode, self.device = mode, device
        self.scaler = torch.amp.GradScaler(device.type, enabled=mode == "fp16")

    def autocast(self) -> AbstractContextManager:
        """Return the context manager for calls of models."""
        if self.mode == "off":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=DTYPES[self.mode])
