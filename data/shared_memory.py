"""Loader processes and the shared memory through which they hand over batches: what a machine allows."""

import os
from pathlib import Path

MAX_WORKERS = 16  # of each training process, when DATA.WORKERS=-1
SPARE_FROM = 4  # cores a process has from which on one is left to the training process itself
SHM = Path("/dev/shm")
HELD = 2  # batches beside those being prefetched: the one in use and the one on its way


def neighbours() -> int:
    """Return the training processes of this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def default_workers() -> int:
    """Return the loader processes of a training process: the cores it may use, shared with its neighbours."""
    own = len(os.sched_getaffinity(0)) // neighbours()
    return max(1, min(MAX_WORKERS, own - 1 if own >= SPARE_FROM else own))


def check_shared_memory(workers: int, prefetch: int, batch_bytes: int) -> None:
    """Raise ValueError if the batches under way do not fit into /dev/shm, where workers would die of a bus error."""
    if not workers or not SHM.is_dir():
        return
    needed = (workers * prefetch + HELD) * batch_bytes * neighbours()
    status = os.statvfs(SHM)
    free = status.f_bavail * status.f_frsize
    if needed <= free:
        return
    fits = (free // (batch_bytes * neighbours()) - HELD) // workers
    lower = f"DATA.PREFETCH {fits}" if 1 <= fits < prefetch else "fewer DATA.WORKERS or DATA.PREFETCH"
    processes = f" x {neighbours()} processes" if neighbours() > 1 else ""
    raise ValueError(
        f"{SHM} has {_size(free)} free, but DATA.WORKERS={workers} x DATA.PREFETCH={prefetch} batches of {_size(batch_bytes)}"
        f"{processes} need {_size(needed)}: loader processes would die of a bus error. Enlarge it (docker run "
        f"--shm-size={-(-needed // 2**30)}g, or --ipc=host; SLURM: mount -o remount,size=...), or set {lower}, or DATA.WORKERS 0"
    )


def _size(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"
