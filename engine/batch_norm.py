"""BatchNorm running statistics that do not depend on how a global batch was divided among processes."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from engine.distributed.processes import Processes


class RunningStatistics:
    """Move running means and variances once per update, by the mean over all of its micro-batches.

    PyTorch alone would move them once per micro-batch and keep process 0's. With one process and one micro-batch per
    update this is exactly what PyTorch does. Normalisation itself uses each micro-batch's own statistics.
    """

    def __init__(self, model: nn.Module, accumulation: int, processes: Processes, frozen: bool = False):
        norms = [m for m in model.modules() if isinstance(m, _BatchNorm)]
        self.buffers = [b for norm in norms for b in (norm.running_mean, norm.running_var) if b is not None]
        self.counters = [norm.num_batches_tracked for norm in norms if norm.num_batches_tracked is not None]
        self.accumulation, self.processes = accumulation, processes
        self.micro_batches = accumulation * processes.world
        self.active = bool(self.buffers) and not frozen
        self.divided = self.active and self.micro_batches > 1
        self.before = [torch.empty_like(b) for b in self.buffers] if self.active else []
        self.total = [torch.empty_like(b) for b in self.buffers] if self.divided else []
        recomputes = any(getattr(module, "grad_checkpointing", False) for module in model.modules())
        self.recomputed = norms if recomputes and self.active else []

    @torch.no_grad()
    def begin(self) -> None:
        """Remember the statistics at the start of an update."""
        if self.active:
            torch._foreach_copy_(self.before, self.buffers)
        if self.divided:
            torch._foreach_zero_(self.total)

    @contextmanager
    def backward(self) -> Iterator[None]:
        """Keep the statistics as they are in a backward pass that runs blocks again (gradient checkpointing)."""
        kept = [(norm.momentum, norm.num_batches_tracked) for norm in self.recomputed]
        for norm in self.recomputed:
            norm.momentum, norm.num_batches_tracked = 0.0, None
        try:
            yield
        finally:
            for norm, (momentum, counter) in zip(self.recomputed, kept, strict=True):
                norm.momentum, norm.num_batches_tracked = momentum, counter

    @torch.no_grad()
    def after_micro_batch(self) -> None:
        """Collect what one micro-batch made of them, and set them back."""
        if self.divided:
            torch._foreach_add_(self.total, self.buffers)
            torch._foreach_copy_(self.buffers, self.before)

    @torch.no_grad()
    def end(self, ok: Tensor) -> None:
        """Set them to the mean over the update's micro-batches on all processes; to what they were unless `ok`."""
        if not self.active:
            return
        if self.counters:
            # With alpha it is the overload for tensors; the one for numbers would read the tensor, and wait.
            torch._foreach_add_(self.counters, ok.long() - self.accumulation, alpha=1)
        flat = torch.cat(self.total if self.divided else self.buffers)
        if self.divided:
            self.processes.sum(flat).div_(self.micro_batches)
        flat = torch.where(ok, flat, torch.cat(self.before))
        torch._foreach_copy_(self.buffers, list(flat.split([b.numel() for b in self.buffers])))
