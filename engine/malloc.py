"""Reuse of freed memory by the C library's malloc."""

import ctypes
import platform

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h
LARGEST_BLOCK = 2**30, 2**25  # glibc before 2.35 refuses the first


def release_freed_memory() -> None:
    """Return the memory that malloc keeps to the operating system, e.g. between two models of a benchmark."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def keep_freed_memory() -> bool:
    """Make malloc keep freed memory for the next tensors, for computation on the CPU; return True if it does.

    glibc returns large blocks to the operating system at once and gets them back page by page, zeroed: with feature maps of
    tens of megabytes that is 6 to 15 % of a training step. Does nothing with another C library.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    # Block size first: once a trim threshold is set, glibc no longer raises the block threshold of 128 KiB by itself.
    kept = any(mallopt(M_MMAP_THRESHOLD, size) == 1 for size in LARGEST_BLOCK)
    return kept and mallopt(M_TRIM_THRESHOLD, 2**31 - 1) == 1
