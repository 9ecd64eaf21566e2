"""A file that several processes need and one of them builds, on local disks and on network file systems alike.

The lock is a file made with O_EXCL, which NFS and Lustre honour. Its owner touches it while it works; a lock that nobody
has touched for STALE_S is taken over. That a file is built twice does no harm: it is written whole or not at all.
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

T = TypeVar("T")
TOUCH_S, STALE_S, POLL_S = 5.0, 60.0, 0.2


def build_once(
    files: Sequence[Path], read: Callable[[Path], T | None], build: Callable[[Path], None], say: Callable[[str], None]
) -> tuple[T, Path]:
    """Return what `read` gives for one of the files, and that file; else build the first whose folder can be written.

    `read` returns None for a file that is missing or does not fit any more. ValueError if none can be written.
    """
    for file in files:
        if (found := read(file)) is not None:
            return found, file
    for file in files:
        lock = file.with_name(f"{file.name}.lock")
        if not _lockable(lock):
            continue
        waited, seen = _Wait(lock, say), _time(file)
        while True:
            try:
                with _Lock(lock):
                    if (found := read(file)) is None:  # another process may have built it meanwhile
                        build(file)
                        found = read(file)
            except FileExistsError:
                waited.once()
                if (
                    now := _time(file)
                ) != seen or not lock.exists():  # all that waited read it at once, without the lock
                    seen = now
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
        return file.stat().st_mtime_ns
    except OSError:
        return 0


def _lockable(lock: Path) -> bool:
    """Return whether files can be made in the folder of the lock, which is made if it is missing."""
    probe = lock.with_name(f".{lock.name}.{uuid.uuid4().hex}.probe")
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ValueError(f"{lock.parent} is full ({error}), and an index of the archives must lie there") from error
        return False
    return True


class _Lock:
    """The lock file, touched by a thread as long as it is held; FileExistsError if another process holds it."""

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
                os.utime(self.path)


class _Wait:
    """The patience of a process that waits for a lock."""

    def __init__(self, lock: Path, say: Callable[[str], None]) -> None:
        self.lock, self.say = lock, say
        self.touched, self.since = 0, time.monotonic()
        self.said = False

    def once(self) -> None:
        """Wait a little; remove the lock if its owner is gone."""
        try:
            owner, touched = self.lock.read_text().split(), self.lock.stat().st_mtime_ns
        except OSError:
            return  # it has just been let go
        if touched != self.touched:  # by this process's clock, since those of two machines differ
            self.touched, self.since = touched, time.monotonic()
        if _gone(owner) or time.monotonic() - self.since > STALE_S:
            self.say(f"taking over from {' '.join(owner) or 'a process'}, which left {self.lock}")
            self.lock.unlink(missing_ok=True)
            return
        if not self.said:
            self.say(f"waiting for process {' '.join(owner)} to write {self.lock.with_suffix('')}")
            self.said = True
        time.sleep(POLL_S)


def _gone(owner: Sequence[str]) -> bool:
    """Return whether the owner was a process of this machine that has ended."""
    if len(owner) != 2 or owner[0] != socket.gethostname():
        return False
    try:
        os.kill(int(owner[1]), 0)
    except ProcessLookupError:
        return True
    except (OSError, ValueError):
        return False
    return False
