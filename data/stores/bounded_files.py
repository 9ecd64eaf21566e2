"""Regular files of bounded size: pipes, devices, sockets and folders are refused before anything waits for them; links are followed.

All functions raise OSError, so that one place handles these and a failing storage alike.
"""

import errno
import os
import stat
from pathlib import Path

import numpy as np

_KINDS = {stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}


def open_file(path: str | Path) -> int:
    """Open a regular file for reading; return its descriptor."""
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # O_NONBLOCK: a pipe would wait for a writer
    mode = os.fstat(fd).st_mode
    if not stat.S_ISREG(mode):
        os.close(fd)
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        raise OSError(errno.EINVAL, f"{_KINDS.get(stat.S_IFMT(mode), 'a device')}, not a file", str(path))
    return fd


def read_file(path: str | Path, limit: int) -> bytes:
    """Return the bytes of a regular file of at most `limit` bytes."""
    return read_array(path, limit).tobytes()


def read_array(path: str | Path, limit: int) -> np.ndarray:
    """Return the bytes of a regular file of at most `limit` bytes, uint8 (n,), writable."""
    fd = open_file(path)
    try:
        return read_piece(fd, 0, os.fstat(fd).st_size, limit, str(path))
    finally:
        os.close(fd)


def read_piece(fd: int, offset: int, size: int, limit: int, name: str) -> np.ndarray:
    """Return `size` bytes of an open file from `offset` on, uint8 (size,), writable, of at most `limit` bytes.

    OSError also if the file ends within them.
    """
    if size > limit:
        raise OSError(errno.EFBIG, f"{size:,} bytes are more than the {limit:,} that are read", name)
    data = np.empty(size, dtype=np.uint8)
    view, done = data.data, 0
    while done < size:
        count = os.preadv(fd, [view[done:]], offset + done)
        if count == 0:
            raise OSError(errno.EIO, f"the file ends at byte {offset + done}, within it", name)
        done += count
    return data
