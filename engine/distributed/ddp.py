"""DistributedDataParallel: gradient exchange between processes in buckets, optionally compressed by a communication hook."""

import inspect
from typing import Any

from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook, fp16_compress_hook
from torch.nn.parallel import DistributedDataParallel

from engine.distributed.processes import Processes

COMPRESSION_HOOKS = {"bf16": bf16_compress_hook, "fp16": fp16_compress_hook}  # by DIST.COMPRESS


def wrap_in_ddp(
    model: nn.Module,
    processes: Processes,
    bucket_mb: float | None = None,
    static_graph: bool = False,
    compression: str = "none",
) -> nn.Module:
    """Return the model wrapped in DistributedDataParallel, or the model itself for one process.

    bucket_mb: size of the gradient buckets in MiB, None for torch's default. compression: number format in which gradients
    travel, a key of COMPRESSION_HOOKS, or none. Raises ValueError if the process group does not support the format.
    """
    if processes.world == 1:
        return model
    ids = [processes.device.index] if processes.device.type == "cuda" else None
    # Buffers are not broadcast in the forward pass: engine/batch_norm.py keeps them equal.
    parameters = inspect.signature(DistributedDataParallel).parameters
    buffers = "forward_sync_buffers" if "forward_sync_buffers" in parameters else "broadcast_buffers"  # torch < 2.15
    settings: dict[str, Any] = {buffers: False, "static_graph": static_graph}
    if bucket_mb is not None:
        settings["bucket_cap_mb"] = bucket_mb
    wrapped = DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True, **settings)
    if compression != "none":
        try:
            wrapped.register_comm_hook(None, COMPRESSION_HOOKS[compression])
        except TypeError as error:
            raise ValueError(f"DIST.COMPRESS={compression}: {error}; set it to fp16 or none") from error
    return wrapped
