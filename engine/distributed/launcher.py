"""Who started this process among which others, and how they meet before anything is exchanged.

    torchrun       RANK, WORLD_SIZE, LOCAL_RANK; so does whatever else sets these
    srun           SLURM_PROCID, SLURM_LOCALID and the tasks of the step; MASTER_ADDR and MASTER_PORT, or the step's first
                   host and 20000 + job id % 10000
    plain python   one process; also in the shell of an allocation (sbatch, salloc), which has SLURM_NTASKS but is no step

A process that does not arrive is named by process 0, and through it by all that did.
"""

import os
import re
import socket
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist

FIRST_PORT, PORTS = 20_000, 10_000  # of a job: the first and the job id modulo their number
GRACE = 15.0  # seconds that process 0's word may take to the others


@dataclass(frozen=True)
class LaunchInfo:
    """Where a process stands among those that were started together."""

    rank: int
    world: int
    local_rank: int
    launcher: str
    address: str = ""  # of process 0, if there is something to join
    port: int = 0


def find_launch(env: Mapping[str, str]) -> LaunchInfo:
    """Return the place that the environment tells. Raises ValueError if it contradicts itself or lacks something."""
    if "RANK" in env and "WORLD_SIZE" in env:
        if "LOCAL_RANK" not in env:
            raise ValueError("RANK is set but LOCAL_RANK is not: launch with torchrun, which sets both, or unset RANK")
        launcher = "torchrun" if "TORCHELASTIC_RUN_ID" in env else "RANK and WORLD_SIZE"
        return _place(env, "RANK", "WORLD_SIZE", "LOCAL_RANK", launcher)
    if "SLURM_STEP_ID" in env and "SLURM_PROCID" in env:
        tasks = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in env else "SLURM_NTASKS"
        return _place(env, "SLURM_PROCID", tasks, "SLURM_LOCALID", f"srun, job {env.get('SLURM_JOB_ID', '?')}")
    inside = f" inside job {env['SLURM_JOB_ID']}" if "SLURM_JOB_ID" in env else ""
    return LaunchInfo(0, 1, 0, f"plain python{inside}")


def _place(env: Mapping[str, str], rank_key: str, world_key: str, local_key: str, launcher: str) -> LaunchInfo:
    rank, world, local_rank = (_number(env, key) for key in (rank_key, world_key, local_key))
    if not 0 <= rank < world:
        raise ValueError(
            f"{rank_key}={rank} must lie in 0 .. {world - 1}, as {world_key}={world}; unset both or mend one"
        )
    slurm = rank_key == "SLURM_PROCID"
    if world == 1 and (slurm or "MASTER_ADDR" not in env):
        return LaunchInfo(rank, world, local_rank, launcher)
    address = env.get("MASTER_ADDR") or (_first_host(env) if slurm else "")
    port = _number(env, "MASTER_PORT") if env.get("MASTER_PORT") or not slurm else _port_of_job(env)
    if not address:
        raise ValueError(f"MASTER_ADDR is not set, but {world_key}={world}; set it to the host of process 0")
    return LaunchInfo(rank, world, local_rank, launcher, address, port)


def _number(env: Mapping[str, str], key: str) -> int:
    try:
        return int(env[key])
    except (KeyError, ValueError):
        raise ValueError(
            f"{key}={env.get(key)!r} must be a number; the launcher sets it, or unset the others"
        ) from None


def _port_of_job(env: Mapping[str, str]) -> int:
    return FIRST_PORT + _number(env, "SLURM_JOB_ID") % PORTS


def _first_host(env: Mapping[str, str]) -> str:
    nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST") or ""
    if re.fullmatch(r"[\w.-]+", nodes):
        return nodes
    try:
        found = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True)
        return found.stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError) as error:
        raise ValueError(
            f"SLURM_JOB_NODELIST={nodes!r}: scontrol did not tell its first host ({error}); set MASTER_ADDR to it"
        ) from error


def meet(place: LaunchInfo, timeout_s: float) -> dist.Store:
    """Wait until all processes are there; return the store they share. Raises ValueError, naming those that are missing."""
    where = f"{place.address}:{place.port}"
    store = _open_store(place, where, timeout_s)
    store.set(f"arrived/{place.rank}", "")
    if place.rank == 0:
        absent = _absent(store, place.world, time.monotonic() + timeout_s)
        store.set("absent", " ".join(map(str, absent)))
    else:
        try:
            store.wait(["absent"], timedelta(seconds=timeout_s + GRACE))
            absent = [int(rank) for rank in store.get("absent").split()]
        except RuntimeError as error:
            raise ValueError(
                f"process 0 at {where} was there and left before all had arrived; see what it says"
            ) from error
    if absent:
        if place.rank == 0:
            time.sleep(1.0)  # the store ends with this process: let the others read it
        raise ValueError(
            f"{_named(absent)} of {place.world} did not arrive at {where} within DIST.START_TIMEOUT={timeout_s:g} s; "
            "look into their logs, or raise the timeout if they only start slowly"
        )
    return store


def _open_store(place: LaunchInfo, where: str, timeout_s: float) -> dist.Store:
    try:
        socket.getaddrinfo(place.address, place.port)
    except OSError as error:
        raise ValueError(
            f"MASTER_ADDR={place.address} cannot be resolved on {socket.gethostname()} ({error.strerror}); set it to a name or an "
            "address of process 0's host that all nodes know"
        ) from error
    serves = place.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    limit = timedelta(seconds=timeout_s)
    try:
        return dist.TCPStore(place.address, place.port, is_master=serves, timeout=limit, wait_for_workers=False)
    except RuntimeError as error:
        first = str(error).splitlines()[0][:200]
        if serves:
            raise ValueError(
                f"process 0 cannot serve at MASTER_ADDR:MASTER_PORT={where} ({first}); another program may have the port: set "
                "MASTER_PORT to a free one"
            ) from error
        raise ValueError(
            f"process 0 did not arrive at {where} within DIST.START_TIMEOUT={timeout_s:g} s ({first}); look into its log, and "
            "whether that address can be reached from here"
        ) from error


def _absent(store: dist.Store, world: int, deadline: float) -> list[int]:
    """Return the ranks that have not arrived at the deadline; none as soon as all have."""
    keys = [f"arrived/{rank}" for rank in range(world)]
    while not store.check(keys):
        if time.monotonic() >= deadline:
            return [rank for rank in range(world) if not store.check([keys[rank]])]
        time.sleep(0.05)
    return []


def _named(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:16])) + (f", ... ({len(ranks)} in all)" if len(ranks) > 16 else "")
    return f"process {shown}" if len(ranks) == 1 else f"processes {shown}"
