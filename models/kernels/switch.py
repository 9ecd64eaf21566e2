"""Switch from PyTorch's operators to Triton kernels, for layers that have one."""

import importlib.util

import torch
from torch import nn

from ..layers import GeluDepthwiseConv


def use_kernels(model: nn.Module) -> None:
    """Let each GeluDepthwiseConv run the Triton kernel on CUDA devices; parameters are unchanged.

    Raises ValueError without Triton and for a model that has no such layer.
    """
    layers = [module for module in model.modules() if isinstance(module, GeluDepthwiseConv)]
    if not layers:
        raise ValueError("no layer of this model has a Triton kernel: those of SG-Former and STViT do")
    try:
        from ..kernels import depthwise
    except ImportError as error:
        raise ValueError(f"Triton is missing ({error}): the CUDA builds of PyTorch bring it") from error
    for layer in layers:
        layer.kernel, layer.kernel_device = depthwise.gelu_depthwise, depthwise.DEVICE


def wins(model: nn.Module) -> bool:
    """Return True if the kernels move fewer bytes than PyTorch's operators here: with Triton, on a GPU that has bfloat16."""
    if not any(isinstance(module, GeluDepthwiseConv) for module in model.modules()):
        return False
    found = importlib.util.find_spec("triton") is not None
    return found and torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)


def uses_kernels(model: nn.Module) -> int:
    """Return the number of layers that run a Triton kernel on CUDA."""
    layers = (module for module in model.modules() if isinstance(module, GeluDepthwiseConv))
    return sum(layer.kernel is not None for layer in layers)
