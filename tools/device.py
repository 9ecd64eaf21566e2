"""Choice of the device of a command."""

import torch


def choose_device(asked: str) -> torch.device:
    """Return the device for --device auto, cpu or cuda. Raises ValueError for CUDA without a CUDA device."""
    if asked == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no CUDA device; leave it out, or check the driver with nvidia-smi")
    return torch.device("cuda" if asked != "cpu" and torch.cuda.is_available() else "cpu")
