"""Images of archives, read in place with os.pread: labels, bytes by index, storage order and reading ahead."""

import os
import resource
import threading
from collections import OrderedDict
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from data.loaders.file_limits import MAX_BYTES
from data.loaders.sampler import WINDOW_BLOCKS
from data.stores.archive_index import ArchiveIndex
from data.stores.bounded_files import open_file, read_piece
from data.stores.layout import SplitLocation

MAX_OPEN_FILES = 1 << 16  # the soft limit of open files is raised to this at most


class ArchiveSource:
    """Labels of the images of a split's archives, and their bytes by index."""

    def __init__(self, location: SplitLocation, index: ArchiveIndex, labels: np.ndarray) -> None:
        order = np.argsort(labels, kind="stable")  # within a class, images stay sorted by name
        self.root, self.archives, self.labels = location.root, location.archives, labels[order].astype(np.int64)
        self._index, self._order = index, order
        self._archive, self._offset, self._size = index.archive[order], index.offset[order], index.size[order]
        self._open = _OpenFiles(location.archives)
        self._ahead: _ReadAhead | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        """Return ARCHIVE:PATH of an image."""
        return f"{self.archives[self._archive[index]]}:{self._index.path(int(self._order[index]))}"

    def read(self, index: int) -> np.ndarray:
        """Return the bytes of an image's file, uint8 (n,). OSError if the archive ends within it."""
        number = int(self._archive[index])
        fd = self._open.file(number)
        if self._ahead:
            self._ahead.touch(index, fd)
        offset, size = int(self._offset[index]), int(self._size[index])
        return read_piece(fd, offset, size, MAX_BYTES, str(self.archives[number]))

    @property
    def sizes(self) -> np.ndarray:
        """Length of each image's file in bytes, int64 (n,)."""
        return self._size

    def storage_order(self) -> np.ndarray:
        """Return the image indices sorted by archive and offset, int64 (n,)."""
        return np.lexsort((self._offset, self._archive)).astype(np.int64)

    def read_ahead(self, block: int) -> None:
        """Prefetch a whole block of `block` images in storage order on the first read of one of them."""
        self._ahead = _ReadAhead(self.storage_order(), self._archive, self._offset, self._offset + self._size, block)


class _ReadAhead:
    """Prefetching of blocks of images into the page cache, with posix_fadvise."""

    def __init__(self, stored: np.ndarray, archive: np.ndarray, start: np.ndarray, end: np.ndarray, block: int) -> None:
        self._block = np.empty(len(stored), dtype=np.int32)  # of each image
        self._block[stored] = np.arange(len(stored)) // block
        first, last = stored[::block], stored[np.minimum(np.arange(block, len(stored) + block, block), len(stored)) - 1]
        whole = archive[first] == archive[last]  # blocks that span two archives are not prefetched
        self._start, self._length = start[first], np.where(whole, end[last] - start[first], 0)
        self._touched: OrderedDict[int, None] = OrderedDict()

    def touch(self, index: int, fd: int) -> None:
        """Prefetch the block of an image that is about to be read, unless that was done recently."""
        block = int(self._block[index])
        if block in self._touched or not self._length[block]:
            return
        self._touched[block] = None
        if len(self._touched) > 2 * WINDOW_BLOCKS:
            self._touched.popitem(last=False)
        os.posix_fadvise(fd, int(self._start[block]), int(self._length[block]), os.POSIX_FADV_WILLNEED)


@cache
def open_limit() -> int:
    """Raise this process's limit of open files towards the system's; return the limit then in force."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, MAX_OPEN_FILES)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return MAX_OPEN_FILES if soft == resource.RLIM_INFINITY else soft
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    except (OSError, ValueError):  # some systems allow less than their hard limit
        return soft
    return wanted


class _OpenFiles:
    """File descriptors of the archives, opened on first use by each process and thread separately."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = paths
        self.most = min(len(paths), open_limit() // 2)  # of each thread
        self._own = threading.local()

    def file(self, number: int) -> int:
        """Return this thread's file descriptor of an archive; beyond `most`, close the least recently used."""
        own: _Descriptors | None = getattr(self._own, "files", None)
        if own is None or own.pid != os.getpid():  # after a fork, the parent's descriptors are not shared
            own = self._own.files = _Descriptors()
        if number in own.open:
            own.open.move_to_end(number)
        else:
            if len(own.open) >= self.most:
                os.close(own.open.popitem(last=False)[1])
            own.open[number] = open_file(self.paths[number])
        return own.open[number]

    def __reduce__(self) -> tuple[Any, ...]:
        return _OpenFiles, (self.paths,)


class _Descriptors:
    """File descriptors of one thread by archive number, the most recently used last; closed on deletion."""

    def __init__(self) -> None:
        self.pid, self.open = os.getpid(), OrderedDict[int, int]()

    def __del__(self) -> None:
        if self.pid == os.getpid():
            for fd in self.open.values():
                os.close(fd)
