"""Choice of the device of a command."""

import torch


def choose_device(asked: str) -> torch.device:
    """Return the device for --device auto, cpu or cuda, a GPU with its index, which torch.cuda's settings by device need.

    Raises ValueError for CUDA without a CUDA device.
    """
    if asked == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no CUDA device; leave it out, or check the driver with nvidia-smi")
    if asked == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())
