"""What the C library does with memory that is freed."""

import ctypes
import platform

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h
LARGEST_BLOCK = 2**30, 2**25  # the second before glibc 2.35, which refuses more


def keep_freed_memory() -> bool:
    """Let the process keep freed memory for the next tensors; return whether it will. For computing on the CPU.

    glibc gives large blocks back to the system at once, which hands them out again page by page, zeroed: with maps of tens of
    megabytes that is 6 to 15 % of a training step. Does nothing with another C library.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    # Blocks first: once there is a limit to trimming, glibc no longer raises theirs, 128 KiB, by itself.
    kept = any(mallopt(M_MMAP_THRESHOLD, size) == 1 for size in LARGEST_BLOCK)
    return kept and mallopt(M_TRIM_THRESHOLD, 2**31 - 1) == 1
