"""Processes of a run: rank, world size, device, and the few collectives that the engine needs."""

import faulthandler
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from engine.distributed.launcher import LaunchInfo, find_launch, rendezvous
from engine.distributed.messages import broadcast, decode, encode, gather
from engine.malloc import keep_freed_memory

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """Rank, world size and device of this process, and collectives over all processes of the run."""

    rank: int
    world: int
    local_rank: int
    device: torch.device
    launcher: str
    host_group: dist.ProcessGroup | None = None  # gloo group of all processes for CPU data; None: the default group

    @property
    def main(self) -> bool:
        """Return True on rank 0, the only process that writes files and logs."""
        return self.rank == 0

    @property
    def name(self) -> str:
        """Return the prefix of this process's error messages; empty in a run of one process."""
        return f"process {self.rank}: " if self.world > 1 else ""

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum the tensor over all processes, in place."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def largest(self, number: int) -> int:
        """Return the maximum of a number over all processes; waits for the processes, not for the device."""
        if self.world == 1:
            return number
        largest = torch.tensor([number])
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=self.host_group)
        return int(largest)

    def from_main(self, value: Any) -> Any:
        """Broadcast a small value of JSON's types from the main process; return it on every process."""
        return broadcast(value, self.main, self.host_group) if self.world > 1 else decode(encode(value))

    def on_main(self, function: Callable[[], T], errors: Sequence[type[ValueError]] = ()) -> T:
        """Call a function on the main process only; return its small result, of JSON's types, or raise its ValueError, on all.

        errors: subclasses of ValueError, made of a message, that keep their type on the other processes.
        """
        if self.world == 1:
            return cast("T", decode(encode(function())))
        sent: dict[str, Any] = {}
        failure: ValueError | None = None
        if self.main:
            try:
                sent = {"result": function()}
            except ValueError as error:
                failure = error
                sent = {
                    "error": str(error),
                    "type": next((i for i, t in enumerate(errors) if isinstance(error, t)), None),
                }
        received = self.from_main(sent)
        if "error" in received:
            kept = ValueError if received["type"] is None else errors[received["type"]]
            raise failure or kept(received["error"])
        return cast("T", received["result"])

    def from_all(self, value: T) -> list[T]:
        """Gather a small value of JSON's types of every process; return the list, in order of rank, on every process."""
        return gather(value, self.world, self.host_group) if self.world > 1 else [decode(encode(value))]


def init_processes(device: str, start_timeout_s: float = 300.0, timeout_s: float = 1800.0) -> Processes:
    """Initialise the process group of the launcher (launcher.py), or a run of one process; `device` is auto, cpu or cuda.

    NCCL carries CUDA tensors, gloo CPU tensors. Processes that do not arrive or connect within `start_timeout_s` fail the start;
    a collective that takes longer than `timeout_s` fails on all processes that wait for it. Raises ValueError if CUDA is asked
    for and missing, if a node runs more processes than it has GPUs, or naming the processes that did not arrive.
    """
    cuda = torch.cuda.is_available() if device == "auto" else device == "cuda"
    if cuda and not torch.cuda.is_available():
        raise ValueError(
            "DEVICE=cuda but torch sees no CUDA device; set DEVICE to cpu or auto, or check the driver with nvidia-smi"
        )
    launch = find_launch(os.environ)
    own = torch.device("cuda", _gpu_index(launch)) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(own)
    else:
        keep_freed_memory()
    host_group = None
    if launch.address:
        faulthandler.enable()  # an abort by NCCL prints the Python stack
        backend = "nccl" if cuda else "gloo"
        host_group = _connect(launch, backend, timedelta(seconds=start_timeout_s), timedelta(seconds=timeout_s))
    return Processes(
        rank=launch.rank,
        world=launch.world,
        local_rank=launch.local_rank,
        device=own,
        launcher=launch.launcher,
        host_group=host_group,
    )


def _connect(launch: LaunchInfo, backend: str, start_timeout: timedelta, timeout: timedelta) -> Any:
    """Connect all processes; return a gloo group of them. Raises ValueError if one does not arrive or cannot connect."""
    store = dist.PrefixStore("run", rendezvous(launch, start_timeout.total_seconds()))
    try:
        dist.init_process_group(backend, store=store, rank=launch.rank, world_size=launch.world, timeout=start_timeout)
        host_group: Any = dist.new_group(backend="gloo", timeout=start_timeout)
    except RuntimeError as error:
        raise ValueError(
            f"process {launch.rank} of {launch.world} met the others at {launch.address}:{launch.port} but could not connect to "
            f"them within DIST.START_TIMEOUT={start_timeout.total_seconds():g} s ({str(error).splitlines()[0][:200]}); does a "
            "host's name resolve to an address that only it can reach, as 127.0.1.1 (getent ahosts $(hostname))? Set "
            "GLOO_SOCKET_IFNAME, and NCCL_SOCKET_IFNAME for GPUs, to the interface between the nodes"
        ) from error
    # The function is public from torch 2.15 on.
    set_timeout = getattr(dist, "set_timeout", None) or dist.distributed_c10d._set_pg_timeout
    for group in (dist.group.WORLD, host_group):
        set_timeout(timeout, group)
    return host_group


def _gpu_index(launch: LaunchInfo) -> int:
    """Return the index of the GPU that this process uses."""
    count = torch.cuda.device_count()
    if launch.launcher.startswith("srun") and count == 1:
        return 0  # SLURM shows each task only its own GPU
    if launch.local_rank >= count:
        raise ValueError(
            f"process {launch.local_rank} of this node has no GPU: {count} visible; launch with --nproc_per_node {count}, or "
            f"with srun --ntasks-per-node {count}"
        )
    return launch.local_rank


def is_lost_connection(error: RuntimeError) -> bool:
    """Return True for the error of a collective that failed or timed out, False for any other."""
    return isinstance(error, dist.DistError) or any(word in str(error) for word in ("gloo", "NCCL", "ProcessGroup"))


def shut_down() -> None:
    """Destroy the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def exit_on_failure() -> Iterator[None]:
    """Abort this process if the block raises in a run of several processes.

    The others may wait for this process in a collective, or it for them: an orderly exit, through NCCL's destructors, could
    hang.
    """
    try:
        yield
    except SystemExit as end:
        abort(end.code if isinstance(end.code, int) else 1)
        raise
    except BaseException:
        if dist.is_initialized():
            traceback.print_exc()
        abort(1)
        raise


def abort(status: int) -> None:
    """Exit at once, without clean-up, in a run of several processes; do nothing in a run of one."""
    if dist.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
