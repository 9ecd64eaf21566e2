"""Defaults and limits of a machine: number of loader processes, and shared memory for their batches."""

import math
import os
from pathlib import Path

from common.byte_size import format_bytes

MAX_WORKERS = 16  # of each training process, when DATA.WORKERS=-1
SPARE_FROM = 4  # cores of a training process from which on it keeps one for itself
SHM = Path("/dev/shm")
CGROUPS, OWN_CGROUP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
HELD = 2  # batches in addition to the prefetched ones: one in use, one in transfer


def neighbours() -> int:
    """Return the number of training processes on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def default_workers() -> int:
    """Return the number of loader processes of a training process: the usable cores divided by the training processes."""
    own = int(min(len(os.sched_getaffinity(0)), cpu_quota())) // neighbours()
    return max(1, min(MAX_WORKERS, own - 1 if own >= SPARE_FROM else own))


def cpu_quota() -> float:
    """Return the CPU quota of the container or job in cores, infinity without a limit."""
    return min((_quota_of(folder) for folder in _cgroups()), default=math.inf)


def _cgroups() -> list[Path]:
    """Return the cgroup folders that may hold a quota of this process: the roots, its own group and all groups above it."""
    roots = [CGROUPS, CGROUPS / "cpu", CGROUPS / "cpu,cpuacct"]
    try:
        groups = [
            line.split(":", 2) for line in OWN_CGROUP.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
        ]
    except OSError:
        return roots
    own = [CGROUPS / names / path.lstrip("/") for _, names, path in groups if not names or "cpu" in names.split(",")]
    return roots + [folder for group in own for folder in (group, *group.parents) if folder.is_relative_to(CGROUPS)]


def _quota_of(folder: Path) -> float:
    """Return the quota of a cgroup in cores, from cpu.max (version 2) or cpu.cfs_* (version 1)."""
    for names in (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):
        try:
            quota, period = (
                int(word) for name in names for word in (folder / name).read_text(encoding="utf-8").split()
            )
        except (OSError, ValueError):  # not there, or "max"
            continue
        if quota > 0 and period > 0:  # -1: no limit
            return quota / period
    return math.inf


def check_shared_memory(workers: int, prefetch: int, batch_bytes: int, batches: int, readers: int = -1) -> None:
    """Raise ValueError if the prefetched batches do not fit into /dev/shm, where workers would die of a bus error.

    `batches` is their number in an epoch. `readers` is the number of processes that send batches, by default `workers`.
    """
    readers = workers if readers < 0 else readers
    if not readers or not SHM.is_dir():
        return
    in_flight = min(readers * prefetch + HELD, batches)
    needed = in_flight * batch_bytes * neighbours()
    status = os.statvfs(SHM)
    free = status.f_bavail * status.f_frsize
    if needed <= free:
        return
    fits = (free // (batch_bytes * neighbours()) - HELD) // readers
    lower = f"DATA.PREFETCH {fits}" if 1 <= fits < prefetch else "fewer DATA.WORKERS or DATA.PREFETCH"
    reading = "" if readers == workers else f" ({readers} of them processes that read)"
    processes = f" x {neighbours()} processes" if neighbours() > 1 else ""
    raise ValueError(
        f"{SHM} has {format_bytes(free)} free, but DATA.WORKERS={workers}{reading} x DATA.PREFETCH={prefetch} batches of "
        f"{format_bytes(batch_bytes)}{processes} need {format_bytes(needed)}: loader processes would die of a bus error. Enlarge it "
        f"(docker run --shm-size={-(-needed // 2**30)}g, or --ipc=host; Kubernetes: an emptyDir with medium Memory at "
        f"/dev/shm), or set {lower}, or DATA.WORKERS 0"
    )
