"""Processes of a run: how many, which one this is, and the few collectives that the engine needs."""

import faulthandler
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from engine.distributed.launcher import LaunchInfo, find_launch, meet
from engine.malloc import keep_freed_memory

# A process that waits in vain ends with the collective's name and number instead of hanging; who waits where is compared.
NCCL = {"TORCH_NCCL_ASYNC_ERROR_HANDLING": "1", "TORCH_NCCL_DESYNC_DEBUG": "1"}
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
        dist.broadcast_object_list(box, src=0, group=self.hosts)
        return box[0]

    def on_main(self, act: Callable[[], T]) -> T:
        """Let the main process do something, the others wait; return its small picklable result, or raise its ValueError, on all."""
        if self.world == 1:
            return act()
        result: Any = None
        if self.main:
            try:
                result = act()
            except ValueError as error:
                result = error
        result = self.from_main(result)
        if isinstance(result, ValueError):
            raise result
        return result

    def from_all(self, value: T) -> list[T]:
        """Return every process's value of a small picklable object, by rank, on every process."""
        if self.world == 1:
            return [value]
        box = [value] * self.world
        dist.all_gather_object(box, value, group=self.hosts)
        return box


def start(device: str, start_timeout_s: float = 300.0, timeout_s: float = 1800.0) -> Processes:
    """Join the processes that were started together (launcher.py), or stand alone; `device` is auto, cpu or cuda.

    NCCL carries CUDA tensors, gloo CPU tensors. Processes that do not arrive or connect within `start_timeout_s` fail the start,
    an exchange that takes longer than `timeout_s` fails on all that wait for it. Raises ValueError if CUDA is asked for and
    missing, if a node runs more processes than it has GPUs, or naming the processes that did not arrive.
    """
    cuda = torch.cuda.is_available() if device == "auto" else device == "cuda"
    if cuda and not torch.cuda.is_available():
        raise ValueError(
            "DEVICE=cuda but torch sees no CUDA device; set DEVICE to cpu or auto, or check the driver with nvidia-smi"
        )
    place = find_launch(os.environ)
    own = torch.device("cuda", _gpu_of(place)) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(own)
    else:
        keep_freed_memory()
    if not place.address:
        return Processes(place.rank, place.world, place.local_rank, own, place.launcher)
    faulthandler.enable()  # what NCCL aborts says where it stood
    for key, value in NCCL.items():
        os.environ.setdefault(key, value)
    hosts = _connect(
        place, "nccl" if cuda else "gloo", timedelta(seconds=start_timeout_s), timedelta(seconds=timeout_s)
    )
    return Processes(place.rank, place.world, place.local_rank, own, place.launcher, hosts)


def _connect(place: LaunchInfo, backend: str, start_limit: timedelta, limit: timedelta) -> Any:
    """Let all processes meet and connect; return the group of their hosts. Raises ValueError if they do not come together."""
    store = dist.PrefixStore("run", meet(place, start_limit.total_seconds()))
    try:
        dist.init_process_group(backend, store=store, rank=place.rank, world_size=place.world, timeout=start_limit)
        hosts: Any = dist.new_group(backend="gloo", timeout=start_limit)
    except RuntimeError as error:
        raise ValueError(
            f"process {place.rank} of {place.world} met the others at {place.address}:{place.port} but could not connect to them "
            f"within DIST.START_TIMEOUT={start_limit.total_seconds():g} s ({str(error).splitlines()[0][:200]}); does a host's "
            "name resolve to an address that only it can reach, as 127.0.1.1 (getent ahosts $(hostname))? Set GLOO_SOCKET_IFNAME, "
            "and NCCL_SOCKET_IFNAME for GPUs, to the interface between the nodes"
        ) from error
    set_timeout = (
        getattr(dist, "set_timeout", None) or dist.distributed_c10d._set_pg_timeout
    )  # public from torch 2.15 on
    for group in (dist.group.WORLD, hosts):
        set_timeout(limit, group)
    return hosts


def _gpu_of(place: LaunchInfo) -> int:
    """Return the number of the GPU that is a process's own."""
    count = torch.cuda.device_count()
    if place.launcher.startswith("srun") and count == 1:
        return 0  # SLURM shows each task its own
    if place.local_rank >= count:
        raise ValueError(
            f"process {place.local_rank} of this node has no GPU: {count} visible; launch with --nproc_per_node {count}, or "
            f"with srun --ntasks-per-node {count}"
        )
    return place.local_rank


def is_lost_contact(error: RuntimeError) -> bool:
    """Return whether an error says that an exchange between processes failed or took too long."""
    return isinstance(error, dist.DistError) or any(word in str(error) for word in ("gloo", "NCCL", "ProcessGroup"))


def stop() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def ending_at_once() -> Iterator[None]:
    """End this process at once where the block fails, if it is one of several.

    The others may wait for it in an exchange, or it for them: leaving in order, through NCCL's destructors, could hang.
    """
    try:
        yield
    except SystemExit as end:
        abandon(end.code if isinstance(end.code, int) else 1)
        raise
    except BaseException:
        if dist.is_initialized():
            traceback.print_exc()
        abandon(1)
        raise


def abandon(status: int) -> None:
    """End this process at once if it is one of several."""
    if dist.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
