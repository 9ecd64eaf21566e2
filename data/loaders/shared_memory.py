"""Memory of a machine: checks that a batch fits into it, and those of the loader processes into shared memory."""

import os
from pathlib import Path

from common.byte_size import format_bytes
from data.loaders.workers import processes_per_machine

SHM = Path("/dev/shm")
HELD = 2  # batches in addition to the prefetched ones: one in use, one in transfer


def check_shared_memory(workers: int, prefetch: int, batch_bytes: int, batches: int, readers: int = -1) -> None:
    """Raise ValueError if the prefetched batches do not fit into /dev/shm, where workers would die of a bus error.

    `batches` is their number in an epoch. `readers` is the number of processes that send batches, by default `workers`.
    """
    readers = workers if readers < 0 else readers
    if not readers or not SHM.is_dir():
        return
    in_flight = min(readers * prefetch + HELD, batches)
    needed = in_flight * batch_bytes * processes_per_machine()
    status = os.statvfs(SHM)
    free = status.f_bavail * status.f_frsize
    if needed <= free:
        return
    fits = (free // (batch_bytes * processes_per_machine()) - HELD) // readers
    lower = f"DATA.PREFETCH {fits}" if 1 <= fits < prefetch else "fewer DATA.WORKERS or DATA.PREFETCH"
    reading = "" if readers == workers else f" ({readers} of them processes that read)"
    processes = f" x {processes_per_machine()} processes" if processes_per_machine() > 1 else ""
    raise ValueError(
        f"{SHM} has {format_bytes(free)} free, but DATA.WORKERS={workers}{reading} x DATA.PREFETCH={prefetch} batches of "
        f"{format_bytes(batch_bytes)}{processes} need {format_bytes(needed)}: loader processes would die of a bus error. Enlarge it "
        f"(docker run --shm-size={-(-needed // 2**30)}g, or --ipc=host; Kubernetes: an emptyDir with medium Memory at "
        f"/dev/shm), or set {lower}, or DATA.WORKERS 0"
    )


def check_memory(key: str, batch: int, size: int, count: int = 1) -> None:
    """Raise ValueError if `count` batches, stated by a key, of images with sides of `size` pixels exceed the machine's memory."""
    needed = 3 * size * size * batch * count
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > total:
        raise ValueError(
            f"{key}={batch} with DATA.IMG_SIZE={size}: {count} batches of such images take {format_bytes(needed)}, the machine has "
            f"{format_bytes(total)}; lower one of the two"
        )
