"""BatchNorm across processes: running statistics independent of how a global batch is divided, and SyncBatchNorm."""

import torch
from timm.layers import convert_sync_batchnorm
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from engine.distributed.processes import Processes


def to_sync_batch_norm(model: nn.Module, processes: Processes) -> nn.Module:
    """Return the model with its BatchNorm layers replaced by SyncBatchNorm. Raises ValueError on the CPU."""
    if processes.device.type != "cuda":
        raise ValueError("MODEL.SYNC_BN: torch's SyncBatchNorm runs on CUDA only; set it to false on the CPU")
    return convert_sync_batchnorm(model)  # timm's function keeps the activation of its fused norms


class RunningStatistics:
    """Update of running means and variances once per update, by the mean over all of its micro-batches.

    PyTorch alone would update them once per micro-batch and keep those of process 0. With one process and one micro-batch per
    update the result is exactly PyTorch's. Normalisation itself uses the statistics of each micro-batch.

    Under gradient checkpointing the backward pass runs blocks again, which updates their statistics and batch counters a
    second time; `after_backward` sets both back to their values after the forward pass.

    Order of calls: `begin` once per update; `after_forward` and `after_backward` for each micro-batch; `end`.
    """

    def __init__(self, model: nn.Module, accumulation: int, processes: Processes, frozen: bool = False):
        norms = [m for m in model.modules() if isinstance(m, _BatchNorm)]
        self.buffers = [b for norm in norms for b in (norm.running_mean, norm.running_var) if b is not None]
        self.counters = [norm.num_batches_tracked for norm in norms if norm.num_batches_tracked is not None]
        self.accumulation, self.processes = accumulation, processes
        self.micro_batches = accumulation * processes.world
        self.active = bool(self.buffers) and not frozen
        self.divided = self.active and self.micro_batches > 1
        self.recomputes = self.active and any(
            getattr(module, "grad_checkpointing", False) for module in model.modules()
        )
        self.before = [torch.empty_like(b) for b in self.buffers] if self.active else []
        self.total = [torch.empty_like(b) for b in self.buffers] if self.divided else []
        # After the forward pass. With several micro-batches the buffers themselves are in `total`.
        self.kept_buffers = [torch.empty_like(b) for b in self.buffers] if self.recomputes and not self.divided else []
        self.kept_counters = [torch.empty_like(c) for c in self.counters] if self.recomputes else []

    @torch.no_grad()
    def begin(self) -> None:
        """Copy the statistics at the start of an update."""
        if self.active:
            torch._foreach_copy_(self.before, self.buffers)
        if self.divided:
            torch._foreach_zero_(self.total)

    @torch.no_grad()
    def after_forward(self) -> None:
        """Collect the statistics and counters that a micro-batch's forward pass has written."""
        if self.divided:
            torch._foreach_add_(self.total, self.buffers)
        if self.kept_buffers:
            torch._foreach_copy_(self.kept_buffers, self.buffers)
        if self.kept_counters:
            torch._foreach_copy_(self.kept_counters, self.counters)

    @torch.no_grad()
    def after_backward(self) -> None:
        """Set the statistics back for the next micro-batch, and undo what a recomputation in the backward pass wrote."""
        if self.divided:
            torch._foreach_copy_(self.buffers, self.before)
        if self.kept_buffers:
            torch._foreach_copy_(self.buffers, self.kept_buffers)
        if self.kept_counters:
            torch._foreach_copy_(self.counters, self.kept_counters)

    @torch.no_grad()
    def end(self, is_finite: Tensor) -> None:
        """Set the statistics to the mean over the update's micro-batches on all processes; unless `is_finite`, to those before."""
        if not self.active:
            return
        if self.counters:
            # alpha=1 selects the overload for tensors; the one for numbers would read the tensor on the host.
            torch._foreach_add_(self.counters, is_finite.long() - self.accumulation, alpha=1)
        flat = torch.cat(self.total if self.divided else self.buffers)
        if self.divided:
            self.processes.sum(flat).div_(self.micro_batches)
        flat = torch.where(is_finite, flat, torch.cat(self.before))
        torch._foreach_copy_(self.buffers, list(flat.split([b.numel() for b in self.buffers])))
