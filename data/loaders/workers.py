"""Worker processes of loaders: their default number, and the signals that they ignore.

Workers ignore the signals that make a run save and stop, and end with their parent.
Schedulers and terminals send those signals to every process of a run. A worker ended by one would end the loader, and with
it the run, before the checkpoint is written.
"""

import math
import os
import signal
from multiprocessing import popen_fork
from multiprocessing.context import ForkContext, ForkProcess
from multiprocessing.process import BaseProcess
from pathlib import Path

MAX_WORKERS = 16  # of each training process, when DATA.WORKERS=-1
SPARE_FROM = 4  # cores of a training process from which on it keeps one for itself
CGROUPS, OWN_CGROUP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


class _Popen(popen_fork.Popen):
    def terminate(self) -> None:
        """End the worker by SIGKILL, since it ignores SIGTERM."""
        self.kill()


class Worker(ForkProcess):
    """A forked process whose `terminate` is `kill`."""

    @staticmethod
    def _Popen(process_obj: BaseProcess) -> popen_fork.Popen:  # name used by multiprocessing
        return _Popen(process_obj)


class Workers(ForkContext):
    """Multiprocessing context of worker processes, for DataLoader."""

    Process = Worker


def ignore_signals(_: int) -> None:
    """Ignore SIGTERM, SIGUSR1 and SIGINT in a worker, for DataLoader's worker_init_fn."""
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def processes_per_machine() -> int:
    """Return the number of training processes on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def default_workers() -> int:
    """Return the number of loader processes of a training process: the usable cores divided by the training processes."""
    own = int(min(len(os.sched_getaffinity(0)), cpu_quota())) // processes_per_machine()
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
