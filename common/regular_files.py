"""Regular files in folders that others may have written: links, pipes, devices and folders are refused, sizes are bounded."""

import os
import stat
from pathlib import Path

_KINDS = {
    stat.S_IFLNK: "link",
    stat.S_IFDIR: "folder",
    stat.S_IFIFO: "pipe",
    stat.S_IFSOCK: "socket",
    stat.S_IFREG: "file",
}


def check_kind(path: Path, kind: int = stat.S_IFREG) -> bool:
    """Return True for a regular file (or `kind`, a constant such as stat.S_IFDIR), False for a missing one; else ValueError."""
    try:
        found = stat.S_IFMT(path.lstat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False
    if found != kind:
        raise ValueError(
            f"{path} is a {_KINDS.get(found, 'device')} and not a {_KINDS[kind]}: nothing in the folder may lead out of it; "
            "remove it, or put the real one in its place"
        )
    return True


def regular(path: str | Path, flags: int = os.O_RDONLY) -> int:
    """Open a regular file, also as the `opener` of `open`. Raises ValueError for another kind, OSError as os.open."""
    check_kind(Path(path))
    file = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    if not stat.S_ISREG(os.fstat(file).st_mode):  # replaced in the meantime
        os.close(file)
        raise ValueError(f"{path} is no regular file; remove it")
    return file


def read_regular(path: Path, limit: int) -> bytes:
    """Return the bytes of a regular file. Raises ValueError for more than `limit`, FileNotFoundError if it is missing."""
    with open(path, "rb", opener=regular) as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise ValueError(f"{path} has {size:,} bytes, more than the {limit:,} that are read; is it another file?")
        return file.read(limit)
