"""What the C library does with memory that is freed."""

import ctypes
import platform

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h
LIMITS = {M_TRIM_THRESHOLD: 2**31 - 1, M_MMAP_THRESHOLD: 2**30}


def keep_freed_memory() -> bool:
    """Let the process keep freed memory for the next tensors; return whether it will. For computing on the CPU.

    glibc gives large blocks back to the system at once, which hands them out again page by page, zeroed: with maps of tens of
    megabytes that is 6 to 15 % of a training step. Does nothing with another C library.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return all(mallopt(parameter, limit) == 1 for parameter, limit in LIMITS.items())
