"""A split of DATA.PATH as loaders read it, whether it is a folder of files or lies in archives.

    store = open_store(DATA.PATH, "train")        # finds it, and builds the archives' index if there is none
    source = store.source(store.classes(), must_hold_all=True)
    source.read(7)                                # the bytes of an image

Images have the same order on every store that holds the same files: by class, then folder, then file name.
"""

import os
import resource
import threading
from collections import OrderedDict
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from data.loaders.sampler import WINDOW_BLOCKS
from data.stores.archive_index import Say, StoreIndex, open_index
from data.stores.folder import FolderSource, check_classes, class_folders, scan
from data.stores.layout import SplitLocation, find_split

MOST_OPEN = 1 << 16  # files a process asks leave to open


class Store(Protocol):
    """A split and how its images lie."""

    where: str  # what an error calls it
    kind: str  # folder, or the layout of its archives
    notes: list[str]  # what a person should know

    def classes(self) -> list[str]:
        """Return the classes there are, sorted."""

    def source(self, classes: Sequence[str], must_hold_all: bool) -> "FolderSource | ArchiveSource":
        """Return the images, labelled by their class's place in `classes`."""


class FolderStore:
    """A folder of class folders."""

    kind = "folder"

    def __init__(self, place: SplitLocation) -> None:
        assert place.folder is not None
        self.folder, self.where, self.notes = place.folder, str(place.folder), list(place.notes)

    def classes(self) -> list[str]:
        """Return the names of the class folders, sorted."""
        return class_folders(self.folder)

    def source(self, classes: Sequence[str], must_hold_all: bool) -> FolderSource:
        """Return the images; ValueError as for `scan`."""
        return scan(self.folder, classes, must_hold_all)


class ArchiveStore:
    """Archives and their index."""

    def __init__(self, place: SplitLocation, index: StoreIndex, file: Path) -> None:
        self.place, self.index, self.file = place, index, file
        self.where, self.kind = place.name, str(index.metadata["kind"])
        self.notes = [*place.notes, *index.metadata["problems"]]
        if index.metadata["duplicates"]:
            first = index.metadata["duplicate_names"][0]
            self.notes.append(f"{self.where} holds {index.metadata['duplicates']} images twice, {first} the first")

    def classes(self) -> list[str]:
        """Return the names of the classes, sorted; their numbers where the archives tell no names."""
        known = self.index.metadata["classes"]
        return known if known else [str(i) for i in range(int(self.index.label.max()) + 1)]

    def source(self, classes: Sequence[str], must_hold_all: bool) -> "ArchiveSource":
        """Return the images. ValueError for classes that are not in `classes`, and, with `must_hold_all`, for missing ones."""
        found, names = np.unique(self.index.label).tolist(), self.index.metadata["classes"]
        if self.index.metadata["numbered"]:
            self._check_numbers(found, classes, names)
            number = np.arange(max(found) + 1)
            present = [classes[label] for label in found]
        else:
            present = [names[label] for label in found]
            place_of = {name: i for i, name in enumerate(classes)}
            number = np.array([place_of.get(name, 0) for name in names])
        check_classes(self.where, "classes", present, classes, must_hold_all)
        return ArchiveSource(self.place, self.index, number[self.index.label])

    def _check_numbers(self, found: Sequence[int], classes: Sequence[str], names: Sequence[str] | None) -> None:
        if found[-1] >= len(classes):
            raise ValueError(
                f"{self.where} has images of class number {found[-1]}, but there are {len(classes)} classes (from 0); "
                "see whether DATA.CLASS_INDEX, or the numbers in the archives, are those of another data set"
            )
        odd = [label for label in found if names and classes[label] != names[label]]
        if names and odd:
            raise ValueError(
                f"{self.where} numbers its classes in another order: number {odd[0]} is {names[odd[0]]} there and "
                f"{classes[odd[0]]} in DATA.CLASS_INDEX; leave DATA.CLASS_INDEX empty, or write the archives again"
            )


class ArchiveSource:
    """The images of archives: their labels, and their bytes by index, read in place."""

    def __init__(self, place: SplitLocation, index: StoreIndex, labels: np.ndarray) -> None:
        order = np.argsort(labels, kind="stable")  # of one class, they stay sorted by name
        self.root, self.archives, self.labels = place.root, place.archives, labels[order].astype(np.int64)
        self._index, self._order = index, order
        self._archive, self._offset, self._size = index.archive[order], index.offset[order], index.size[order]
        self._open = _OpenFiles(place.archives)
        self._ahead: _ReadAhead | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        """Return the archive and the path of an image in it."""
        return f"{self.archives[self._archive[index]]}:{self._index.path(int(self._order[index]))}"

    def read(self, index: int) -> np.ndarray:
        """Return the bytes of an image's file, uint8 (n,)."""
        data = np.empty(int(self._size[index]), dtype=np.uint8)
        fd, offset, view, done = (
            self._open.file(int(self._archive[index])),
            int(self._offset[index]),
            data.data,
            0,
        )
        if self._ahead:
            self._ahead.touch(index, fd)
        while done < len(data):
            count = os.preadv(fd, [view[done:]], offset + done)
            if count == 0:
                raise OSError(f"the archive ends within it, at byte {offset + done}")
            done += count
        return data

    @property
    def sizes(self) -> np.ndarray:
        """The length of each image's file, int64 (n,)."""
        return self._size

    def storage_order(self) -> np.ndarray:
        """Return the indices in the order in which the images lie in the archives, int64 (n,)."""
        return np.lexsort((self._offset, self._archive)).astype(np.int64)

    def read_ahead(self, block: int) -> None:
        """From now on, let the first read in a block of images that lie together fetch all of the block."""
        self._ahead = _ReadAhead(self.storage_order(), self._archive, self._offset, self._offset + self._size, block)


class _ReadAhead:
    """Tells the system which block of an archive is about to be read, so that it comes in one piece."""

    def __init__(self, stored: np.ndarray, archive: np.ndarray, start: np.ndarray, end: np.ndarray, block: int) -> None:
        self._block = np.empty(len(stored), dtype=np.int32)  # of each image
        self._block[stored] = np.arange(len(stored)) // block
        first, last = stored[::block], stored[np.minimum(np.arange(block, len(stored) + block, block), len(stored)) - 1]
        whole = archive[first] == archive[last]  # others lie in two archives, and are left to chance
        self._start, self._length = start[first], np.where(whole, end[last] - start[first], 0)
        self._touched: OrderedDict[int, None] = OrderedDict()

    def touch(self, index: int, fd: int) -> None:
        """Note that an image is read; the first of its block, in a while, fetches the block."""
        block = int(self._block[index])
        if block in self._touched or not self._length[block]:
            return
        self._touched[block] = None
        if len(self._touched) > 2 * WINDOW_BLOCKS:
            self._touched.popitem(last=False)
        os.posix_fadvise(fd, int(self._start[block]), int(self._length[block]), os.POSIX_FADV_WILLNEED)


@cache
def open_limit() -> int:
    """Return how many files this process may open, after raising that towards what the system allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST_OPEN if hard == resource.RLIM_INFINITY else min(hard, MOST_OPEN)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return MOST_OPEN if soft == resource.RLIM_INFINITY else soft
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    except (OSError, ValueError):  # some systems allow less than they say
        return soft
    return wanted


class _OpenFiles:
    """Files open for reading, opened when they are first asked for, by each process and thread for itself."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = paths
        self.most = min(len(paths), open_limit() // 2)  # of each thread
        self._own = threading.local()

    def file(self, number: int) -> int:
        """Return a file descriptor, the reader's own."""
        own: _Descriptors | None = getattr(self._own, "files", None)
        if own is None or own.pid != os.getpid():  # those of a parent are left to it
            own = self._own.files = _Descriptors()
        if number in own.open:
            own.open.move_to_end(number)
        else:
            if len(own.open) >= self.most:
                os.close(own.open.popitem(last=False)[1])
            own.open[number] = os.open(self.paths[number], os.O_RDONLY | os.O_CLOEXEC)
        return own.open[number]

    def __reduce__(self) -> tuple[Any, ...]:
        return _OpenFiles, (self.paths,)


class _Descriptors:
    """The descriptors of a thread, closed with it; the last used come last."""

    def __init__(self) -> None:
        self.pid, self.open = os.getpid(), OrderedDict[int, int]()

    def __del__(self) -> None:
        if self.pid == os.getpid():
            for fd in self.open.values():
                os.close(fd)


def file_sizes(source: FolderSource | ArchiveSource, indices: np.ndarray | None = None) -> np.ndarray:
    """Return the length of each image's file, or of those of some, int64 (n,); 0 for a file that is not there."""
    chosen = np.arange(len(source)) if indices is None else indices
    if isinstance(source, ArchiveSource):
        return source.sizes[chosen]
    return np.array([_length(source.name(int(i))) for i in chosen], dtype=np.int64)


def _length(name: str) -> int:
    try:
        return Path(name).stat().st_size
    except OSError:
        return 0


def open_store(
    root: str | Path, split: str, val_labels: str = "", say: Say | None = None
) -> FolderStore | ArchiveStore:
    """Open a split of DATA.PATH; `say` hears that an index is built. ValueError if the split is missing or unfit."""
    place = find_split(root, split)
    labelled = split == "val" and val_labels
    if place.folder:
        if labelled:
            raise ValueError(f"DATA.VAL_LABELS={val_labels!r} has no effect: {place.name} is a folder; set it to ''")
        return FolderStore(place)
    index, file = open_index(place, val_labels if split == "val" else "", say)
    if labelled and not index.metadata["label_inputs"]:
        raise ValueError(
            f"DATA.VAL_LABELS={val_labels!r} has no effect: {place.name} tells the classes itself; set it to ''"
        )
    return ArchiveStore(place, index, file)
