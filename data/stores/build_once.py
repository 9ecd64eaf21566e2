"""Build a file once for several processes, on local disks and on network file systems.

The lock is a file created with O_EXCL, which NFS and Lustre support. Its owner updates its time while it works; a lock not
updated for STALE_S is removed and taken over. Building a file twice is harmless, since it is written atomically. A link,
pipe or device in place of the lock is refused.
"""

import errno
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from common.regular_files import read_regular

T = TypeVar("T")
OWNER_BYTES = 1000  # of a lock file: host and process
TOUCH_S, STALE_S, POLL_S = 5.0, 60.0, 0.2


def build_once(
    files: Sequence[Path],
    read: Callable[[Path], T | None],
    build: Callable[[Path], None],
    progress: Callable[[str], None],
) -> tuple[T, Path]:
    """Read the first usable one of `files`, else build the first in a writable folder; return its contents and its path.

    `read` returns None for a file that is missing or outdated. `progress` is called with lines about waiting for another
    process. ValueError if no folder is writable.
    """
    for file in files:
        if (found := read(file)) is not None:
            return found, file
    for file in files:
        lock = file.with_name(f"{file.name}.lock")
        if not _lockable(lock):
            continue
        wait, seen = _LockWait(lock, progress), _time(file)
        while True:
            try:
                with _Lock(lock):
                    if (found := read(file)) is None:  # None: no other process has built it in the meantime
                        build(file)
                        found = read(file)
            except FileExistsError:
                wait.once()
                now = _time(file)
                if now != seen or not os.path.lexists(lock):
                    seen = now  # read without the lock: the waiting processes read in parallel
                    if (found := read(file)) is not None:
                        return found, file
                continue
            if found is None:
                raise ValueError(f"{file} changed while it was built; start again once the data lie still")
            return found, file
    folders = " nor ".join(str(file.parent) for file in files)
    raise ValueError(
        f"neither {folders} can be written, and an index of the archives must lie in one; set XDG_CACHE_HOME"
    )


def _time(file: Path) -> int:
    try:
        return file.lstat().st_mtime_ns
    except OSError:
        return 0


def _lockable(lock: Path) -> bool:
    """Return True if files can be created in the folder of the lock, which is created if it is missing."""
    probe = lock.with_name(f".{lock.name}.{uuid.uuid4().hex}.probe")
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        probe.touch(exist_ok=False)
        probe.unlink()
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ValueError(f"{lock.parent} is full ({error}), and an index of the archives must lie there") from error
        return False
    return True


class _Lock:
    """Lock file, its time updated by a thread while it is held; FileExistsError if another process holds it."""

    def __init__(self, path: Path) -> None:
        self.path, self.done = path, threading.Event()
        self.thread = threading.Thread(target=self._touch, daemon=True)

    def __enter__(self) -> None:
        fd = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        os.write(fd, f"{socket.gethostname()} {os.getpid()}".encode())
        os.close(fd)
        self.thread.start()

    def __exit__(self, *_: object) -> None:
        self.done.set()
        self.thread.join()
        self.path.unlink(missing_ok=True)

    def _touch(self) -> None:
        while not self.done.wait(TOUCH_S):
            with suppress(OSError):
                os.utime(self.path, follow_symlinks=False)


class _LockWait:
    """Waiting for a lock: polling, and removal of a lock that its owner left behind."""

    def __init__(self, lock: Path, progress: Callable[[str], None]) -> None:
        self.lock, self.progress = lock, progress
        self.touched, self.since = 0, time.monotonic()
        self.logged = False

    def once(self) -> None:
        """Wait for POLL_S; remove the lock instead if its owner has ended or it is stale."""
        try:
            owner, touched = (
                read_regular(self.lock, OWNER_BYTES).decode("utf-8", "replace").split(),
                self.lock.lstat().st_mtime_ns,
            )
        except OSError:
            return  # released in the meantime
        if touched != self.touched:  # timed by this process's clock, since those of two machines differ
            self.touched, self.since = touched, time.monotonic()
        if _gone(owner) or time.monotonic() - self.since > STALE_S:
            self.progress(f"taking over from {' '.join(owner) or 'a process'}, which left {self.lock}")
            self.lock.unlink(missing_ok=True)
            return
        if not self.logged:
            self.progress(f"waiting for process {' '.join(owner)} to write {self.lock.with_suffix('')}")
            self.logged = True
        time.sleep(POLL_S)


def _gone(owner: Sequence[str]) -> bool:
    """Return True if the owner was a process of this machine that has ended."""
    if len(owner) != 2 or owner[0] != socket.gethostname():
        return False
    try:
        os.kill(int(owner[1]), 0)
    except ProcessLookupError:
        return True
    except (OSError, ValueError, OverflowError):
        return False
    return False
