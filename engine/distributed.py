"""Processes of a run: how many, which one this is, and the few collectives that the engine needs."""

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """Where this process stands among those of the run."""

    rank: int
    world: int
    local_rank: int
    device: torch.device
    launcher: str
    hosts: dist.ProcessGroup | None = None  # gloo between all processes, which needs no device; None: the default group

    @property
    def main(self) -> bool:
        """Whether this process writes files and speaks."""
        return self.rank == 0

    @property
    def name(self) -> str:
        """What precedes this process's errors: nothing if it is alone."""
        return f"process {self.rank}: " if self.world > 1 else ""

    def sum(self, tensor: Tensor) -> Tensor:
        """Add the tensor over all processes, in place."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def largest(self, number: int) -> int:
        """Return the largest of all processes' numbers; waits for them, not for the device."""
        if self.world == 1:
            return number
        box = torch.tensor([number])
        dist.all_reduce(box, dist.ReduceOp.MAX, group=self.hosts)
        return int(box)

    def from_main(self, value: object) -> object:
        """Return the main process's value of a small picklable object on every process."""
        if self.world == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def from_all(self, value: T) -> list[T]:
        """Return every process's value of a small picklable object, by rank, on every process."""
        if self.world == 1:
            return [value]
        box = [value] * self.world
        dist.all_gather_object(box, value)
        return box


def start(device: str, timeout_s: float = 1800.0) -> Processes:
    """Join the processes that torchrun started, or stand alone; `device` is auto, cpu or cuda.

    NCCL carries CUDA tensors, gloo CPU tensors. Raises ValueError if CUDA is asked for and missing, or if a node runs more
    processes than it has GPUs.
    """
    cuda = torch.cuda.is_available() if device == "auto" else device == "cuda"
    if cuda and not torch.cuda.is_available():
        raise ValueError(
            "DEVICE=cuda but torch sees no CUDA device; set DEVICE to cpu or auto, or check the driver with nvidia-smi"
        )
    launched = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    rank, world = (int(os.environ[key]) for key in ("RANK", "WORLD_SIZE")) if launched else (0, 1)
    if launched and "LOCAL_RANK" not in os.environ:
        raise ValueError("RANK is set but LOCAL_RANK is not: launch with torchrun, which sets both, or unset RANK")
    local_rank = int(os.environ["LOCAL_RANK"]) if launched else 0
    if cuda:
        if local_rank >= torch.cuda.device_count():
            raise ValueError(
                f"process {local_rank} of this node has no GPU: {torch.cuda.device_count()} visible; "
                f"launch with --nproc_per_node {torch.cuda.device_count()}"
            )
        torch.cuda.set_device(local_rank)
    own = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if launched and not dist.is_initialized():
        dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(seconds=timeout_s))
    hosts: Any = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s)) if launched else None
    return Processes(rank, world, local_rank, own, "torchrun" if launched else "plain python", hosts)


def stop() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()
