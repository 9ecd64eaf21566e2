"""Memory of a training run: an estimate before it starts, and the peak of a process."""

import resource
import sys
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from common.byte_size import format_bytes


@dataclass(frozen=True)
class Memory:
    """Memory of one process in bytes."""

    weights: int  # parameters and buffers
    gradients: int
    optimizer: int
    ema: int
    # Kept by a micro-batch's forward pass for the backward pass; with gradient checkpointing the peak of both passes.
    activations: int

    @property
    def total(self) -> int:
        """Return the sum of all parts."""
        return self.weights + self.gradients + self.optimizer + self.ema + self.activations

    @property
    def stored(self) -> int:
        """Return the size of a checkpoint."""
        return self.weights + self.optimizer + self.ema


def estimate(
    model: nn.Module,
    make_optimizer: Callable[[nn.Module], torch.optim.Optimizer],
    with_ema: bool,
    images: tuple[int, int, int, int],
    autocast: Callable[[], AbstractContextManager],
) -> Memory:
    """Estimate the memory of training on micro-batches of shape `images` (B, 3, H, W), without computation or change of the model."""
    return replace(estimate_state(model, make_optimizer, with_ema), activations=activations(model, images, autocast))


def estimate_state(
    model: nn.Module, make_optimizer: Callable[[nn.Module], torch.optim.Optimizer], with_ema: bool
) -> Memory:
    """Estimate the memory of training without activations; takes milliseconds."""
    parameters = sum(p.numel() * p.element_size() for p in model.parameters())
    weights = parameters + sum(b.numel() * b.element_size() for b in model.buffers())
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    return Memory(
        weights=weights,
        gradients=trained,
        optimizer=round(trained * optimizer_share(make_optimizer)),
        ema=weights if with_ema else 0,
        activations=0,
    )


def optimizer_share(make_optimizer: Callable[[nn.Module], torch.optim.Optimizer]) -> float:
    """Return the bytes of optimiser state for each byte of a weight, measured on a small layer."""
    layer = nn.Linear(64, 64, bias=False)
    with torch.random.fork_rng(devices=[]):
        optimizer = make_optimizer(layer)
        layer.weight.grad = torch.ones_like(layer.weight)
        optimizer.step()
    kept = [v for state in optimizer.state.values() for v in state.values() if isinstance(v, Tensor)]
    return sum(tensor.numel() * tensor.element_size() for tensor in kept) / (4 * layer.weight.numel())


def activations(
    model: nn.Module, images: tuple[int, int, int, int], autocast: Callable[[], AbstractContextManager]
) -> int:
    """Return the bytes that a forward pass keeps for the backward pass, on fake tensors: shapes without values.

    For a model under gradient checkpointing, which keeps little and recomputes blocks, return the peak of the two passes,
    without weights and their gradients.
    """
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    own: dict[str, Tensor] = {
        name: fake.from_tensor(t.detach()) for name, t in (*model.named_parameters(), *model.named_buffers())
    }
    for name, parameter in model.named_parameters():
        own[name].requires_grad_(parameter.requires_grad)
    not_counted = {tensor.untyped_storage()._cdata for tensor in own.values()}
    device = next(model.parameters()).device
    with fake:
        x = torch.empty(images, device=device).to(memory_format=torch.channels_last)
        not_counted.add(x.untyped_storage()._cdata)

        def forward() -> Tensor:
            with autocast():
                return torch.func.functional_call(model, own, (x,))

        if not any(getattr(module, "grad_checkpointing", False) for module in model.modules()):
            return kept_bytes(forward, not_counted)
        for tensor in own.values():
            if tensor.requires_grad:
                tensor.grad = torch.zeros_like(tensor)  # allocated before, so not counted
        return _peak_bytes(forward, not_counted)


def kept_bytes(forward: Callable[[], Tensor], not_counted: set[int]) -> int:
    """Return the bytes that a forward pass keeps for the backward pass, without the storages in `not_counted`."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in not_counted:
            kept[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = forward()  # kept alive, so that each storage is counted once
    del output
    return sum(kept.values())


def _peak_bytes(forward: Callable[[], Tensor], not_counted: set[int]) -> int:
    """Return the peak of the bytes that a forward and a backward pass hold."""
    with Alive(not_counted) as alive:
        forward().sum().backward()
    return alive.most


class Alive(TorchDispatchMode):
    """Counter of the bytes of the living tensors that were created within it, and of their peak."""

    def __init__(self, not_counted: set[int]):
        super().__init__()
        self.not_counted, self.living = not_counted, set[int]()
        self.now = self.most = 0

    def __torch_dispatch__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        made = function(*args, **(kwargs or {}))
        for tensor in tree_iter(made):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return made

    def _count(self, storage: torch.UntypedStorage) -> None:
        name, size = storage._cdata, storage.nbytes()
        if name in self.living or name in self.not_counted:
            return
        self.living.add(name)
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._forget, name, size)

    def _forget(self, name: int, size: int) -> None:
        self.living.discard(name)
        self.now -= size


def peak() -> str:
    """Describe the peak memory of this process: of its GPU, else of main memory. Does not wait for the device."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
        return f"{format_bytes(torch.cuda.max_memory_allocated())} of {format_bytes(total)}"
    unit = 1 if sys.platform == "darwin" else 1024
    return format_bytes(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)
