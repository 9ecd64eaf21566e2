"""Detect the launcher of this process, its rank and world size; rendezvous of all processes before the first collective.

    torchrun       RANK, WORLD_SIZE, LOCAL_RANK; so does whatever else sets these
    srun           SLURM_PROCID, SLURM_LOCALID and the tasks of the step; MASTER_ADDR and MASTER_PORT, or the step's first
                   host and 20000 + job id % 10000
    plain python   one process; also in the shell of an allocation (sbatch, salloc), which has SLURM_NTASKS but is no step

Process 0 lists the ranks that did not arrive in the store, so that every process that did arrive names them in its error.
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

from common.text import shorten

FIRST_PORT, PORTS = 20_000, 10_000  # port of a SLURM job: FIRST_PORT + job id % PORTS
GRACE_S = 15.0  # that the other processes wait for the list of missing ranks after the timeout


@dataclass(frozen=True)
class LaunchInfo:
    """Rank, world size, launcher and rendezvous address of a process."""

    rank: int
    world: int
    local_rank: int
    launcher: str
    address: str = ""  # of process 0; empty in a run of one process
    port: int = 0


def find_launch(env: Mapping[str, str]) -> LaunchInfo:
    """Read the launch from environment variables. Raises ValueError for missing or contradictory ones."""
    if "RANK" in env and "WORLD_SIZE" in env:
        if "LOCAL_RANK" not in env:
            raise ValueError("RANK is set but LOCAL_RANK is not: launch with torchrun, which sets both, or unset RANK")
        launcher = "torchrun" if "TORCHELASTIC_RUN_ID" in env else "RANK and WORLD_SIZE"
        return _read_launch(env, "RANK", "WORLD_SIZE", "LOCAL_RANK", launcher)
    if "SLURM_STEP_ID" in env and "SLURM_PROCID" in env:
        tasks = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in env else "SLURM_NTASKS"
        return _read_launch(env, "SLURM_PROCID", tasks, "SLURM_LOCALID", f"srun, job {env.get('SLURM_JOB_ID', '?')}")
    inside = f" inside job {env['SLURM_JOB_ID']}" if "SLURM_JOB_ID" in env else ""
    return LaunchInfo(rank=0, world=1, local_rank=0, launcher=f"plain python{inside}")


def _read_launch(env: Mapping[str, str], rank_key: str, world_key: str, local_key: str, launcher: str) -> LaunchInfo:
    rank, world, local_rank = (_number(env, key) for key in (rank_key, world_key, local_key))
    if not 0 <= rank < world:
        raise ValueError(
            f"{rank_key}={rank} must lie in 0 .. {world - 1}, as {world_key}={world}; unset both or correct one"
        )
    slurm = rank_key == "SLURM_PROCID"
    if world == 1 and (slurm or "MASTER_ADDR" not in env):
        return LaunchInfo(rank=rank, world=world, local_rank=local_rank, launcher=launcher)
    address = env.get("MASTER_ADDR") or (_first_host(env) if slurm else "")
    port = _number(env, "MASTER_PORT") if env.get("MASTER_PORT") or not slurm else _port_of_job(env)
    if not address:
        raise ValueError(f"MASTER_ADDR is not set, but {world_key}={world}; set it to the host of process 0")
    return LaunchInfo(rank=rank, world=world, local_rank=local_rank, launcher=launcher, address=address, port=port)


def _number(env: Mapping[str, str], key: str) -> int:
    try:
        return int(env[key])
    except (KeyError, ValueError):
        raise ValueError(
            f"{key}={shorten(env.get(key))} must be a number; the launcher sets it, or unset the others"
        ) from None


def _port_of_job(env: Mapping[str, str]) -> int:
    return FIRST_PORT + _number(env, "SLURM_JOB_ID") % PORTS


def _first_host(env: Mapping[str, str]) -> str:
    nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST") or ""
    if re.fullmatch(r"[\w.-]+", nodes):
        return nodes
    try:
        found = subprocess.run(
            ["scontrol", "show", "hostnames", nodes],
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            check=True,
        )
        return found.stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError) as error:
        raise ValueError(
            f"SLURM_JOB_NODELIST={shorten(nodes)}: scontrol did not tell its first host ({error}); set MASTER_ADDR to it"
        ) from error


def rendezvous(launch: LaunchInfo, timeout_s: float) -> dist.Store:
    """Wait until all processes have arrived; return their shared store. Raises ValueError, naming those that are missing."""
    endpoint = f"{launch.address}:{launch.port}"
    store = _open_store(launch, endpoint, timeout_s)
    store.set(f"arrived/{launch.rank}", "")
    if launch.rank == 0:
        missing = _missing_ranks(store, launch.world, time.monotonic() + timeout_s)
        store.set("absent", " ".join(map(str, missing)))
    else:
        try:
            store.wait(["absent"], timedelta(seconds=timeout_s + GRACE_S))
            missing = [int(rank) for rank in store.get("absent").split()]
        except RuntimeError as error:
            raise ValueError(
                f"process 0 at {endpoint} ended before all processes had arrived; its log gives the reason"
            ) from error
    if missing:
        if launch.rank == 0:
            time.sleep(1.0)  # the store ends with this process: let the others read it
        raise ValueError(
            f"{_format_ranks(missing)} of {launch.world} did not arrive at {endpoint} within DIST.START_TIMEOUT={timeout_s:g} s; "
            "look into their logs, or raise the timeout if they only start slowly"
        )
    return store


def _open_store(launch: LaunchInfo, endpoint: str, timeout_s: float) -> dist.Store:
    try:
        socket.getaddrinfo(launch.address, launch.port)
    except OSError as error:
        raise ValueError(
            f"MASTER_ADDR={launch.address} cannot be resolved on {socket.gethostname()} ({error.strerror}); set it to a name or an "
            "address of process 0's host that all nodes know"
        ) from error
    is_server = launch.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    limit = timedelta(seconds=timeout_s)
    try:
        return dist.TCPStore(launch.address, launch.port, is_master=is_server, timeout=limit, wait_for_workers=False)
    except RuntimeError as error:
        first = str(error).splitlines()[0][:200]
        if is_server:
            raise ValueError(
                f"process 0 cannot serve at MASTER_ADDR:MASTER_PORT={endpoint} ({first}); another program may have the port: set "
                "MASTER_PORT to a free one"
            ) from error
        raise ValueError(
            f"process 0 did not arrive at {endpoint} within DIST.START_TIMEOUT={timeout_s:g} s ({first}); look into its log, and "
            "whether that address can be reached from here"
        ) from error


def _missing_ranks(store: dist.Store, world: int, deadline: float) -> list[int]:
    """Wait for all ranks until the deadline; return those that have not arrived."""
    keys = [f"arrived/{rank}" for rank in range(world)]
    while not store.check(keys):
        if time.monotonic() >= deadline:
            return [rank for rank in range(world) if not store.check([keys[rank]])]
        time.sleep(0.05)
    return []


def _format_ranks(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:16])) + (f", ... ({len(ranks)} in all)" if len(ranks) > 16 else "")
    return f"process {shown}" if len(ranks) == 1 else f"processes {shown}"
