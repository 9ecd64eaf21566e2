"""Splits of DATA.PATH, opened from a folder of files or from archives.

    split = open_split(DATA.PATH, "train")        # finds it, and builds the index of archives if there is none
    source = split.source(split.classes(), must_hold_all=True)
    source.read(7)                                # bytes of an image

The order of the images is the same in every store of the same files: by class, then folder, then file name.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from common.text import shorten
from data.stores.archive_index import ArchiveIndex, open_index
from data.stores.archive_listing import Progress
from data.stores.archive_reader import ArchiveSource
from data.stores.folder_split import FolderSplit
from data.stores.folder_tree import list_folder, system_errors
from data.stores.image_files import PassedOver
from data.stores.layout import SplitLocation, find_split
from data.stores.names import check_classes, check_numbers, lookalike_notes, number_gaps, shown, some

if TYPE_CHECKING:
    from data.loaders.torch_loader import ImageSource


class ArchiveSplit:
    """A split that lies in archives, and the index of its images."""

    def __init__(self, location: SplitLocation, index: ArchiveIndex, index_file: Path) -> None:
        self.location, self.index, self.index_file = location, index, index_file
        self.name, self.kind = location.name, str(index.metadata["kind"])
        self.passed = PassedOver(index.metadata["passed_over"])
        self.remarks = list(location.notes)  # those of the notes that tell how the archives are read
        self.notes = [*self.remarks, *index.metadata["problems"]]
        if index.metadata["duplicates"]:
            first = index.metadata["duplicate_names"][0]
            self.notes.append(f"{self.name} holds {index.metadata['duplicates']} images twice, {first} the first")
        if self.passed.found:
            self.notes.append(f"{self.name}: passed over {self.passed.text()}")
        self.notes += lookalike_notes(self.name, index.metadata["classes"] or ())

    def classes(self) -> list[str]:
        """Return the names of the classes, sorted; their numbers if the archives hold numbers only."""
        known = self.index.metadata["classes"]
        return known if known else [str(i) for i in range(int(self.index.label.max()) + 1)]

    def source(self, classes: Sequence[str], must_hold_all: bool) -> ArchiveSource:
        """Return the images, labelled by their class's index in `classes`.

        ValueError for classes that are not in `classes`, and, with `must_hold_all`, for classes without images.
        """
        found, names = np.unique(self.index.label).tolist(), self.index.metadata["classes"]
        if self.index.metadata["numbered"]:
            self._check_numbers(found, classes, names)
            if must_hold_all and self.numbers_are(classes) and (problem := number_gaps(self.name, found)):
                raise ValueError(problem)
            labels = np.arange(max(found) + 1)
            present = [classes[label] for label in found]
        else:
            present = [names[label] for label in found]
            label_of = {name: label for label, name in enumerate(classes)}
            labels = np.array([label_of.get(name, 0) for name in names])
        check_classes(self.name, "classes", present, classes, must_hold_all)
        return ArchiveSource(self.location, self.index, labels[self.index.label])

    def numbers_are(self, classes: Sequence[str]) -> bool:
        """Return True if `classes` are the numbers of this split, which holds no class names."""
        return bool(self.index.metadata["numbered"]) and list(classes) == list(map(str, range(len(classes))))

    def _check_numbers(self, found: Sequence[int], classes: Sequence[str], names: Sequence[str] | None) -> None:
        check_numbers(self.name, found, classes)
        odd = [label for label in found if names and classes[label] != names[label]]
        if names and odd:
            raise ValueError(
                f"{self.name} numbers its classes in another order: number {odd[0]} is {names[odd[0]]} there and "
                f"{classes[odd[0]]} in DATA.CLASS_INDEX; leave DATA.CLASS_INDEX empty, or write the archives again"
            )


Split = FolderSplit | ArchiveSplit


def open_split(root: str | Path, split: str, val_labels: str = "", progress: Progress | None = None) -> Split:
    """Open a split of DATA.PATH. ValueError if it is missing or cannot be used.

    `progress` is called with lines about the building of an archive index; without it they go to stderr.
    """
    with system_errors(root):
        location = find_split(root, split)
        labelled = val_labels if split == "val" else ""
        if location.folder:
            return FolderSplit(location, labelled)
        index, file = open_index(location, labelled, progress)
    if labelled and not index.metadata["label_inputs"]:
        raise ValueError(
            f"DATA.VAL_LABELS={shorten(val_labels)} has no effect: {location.name} tells the classes itself; set it to ''"
        )
    return ArchiveSplit(location, index, file)


def single_class(split: Split, classes: Sequence[str]) -> str:
    """Return the message for a training split of one class, with the folder that may be meant; "" for several classes."""
    if len(classes) > 1:
        return ""
    inner = split.folders_in(classes[0]) if isinstance(split, FolderSplit) else []
    hint = f"; did you mean {split.name}/{classes[0]}? It holds the folders {some(inner)}" if len(inner) > 1 else ""
    return (
        f"{split.name} holds one class only, {shown(classes[0])}, and from one class nothing can be learned; expected "
        f"<class>/<image> for each of two or more classes (MODEL.NUM_CLASSES){hint}"
    )


def same_place(train: Split, val: Split) -> list[str]:
    """Return a warning if validation images lie in a folder or archive of training images, as with a link from val/ to train/."""
    own = _places(train)
    shared = [place for place in _places(val) if any(f"{place}/".startswith(f"{other}/") for other in own)]
    if val.location.inside or not shared:
        return []
    where = "is the same place as" if len(shared) == 1 else f"has {len(shared)} links into"
    return [f"{val.name} {where} {train.name}: the same images are trained on and evaluated"]


def _places(split: Split) -> list[str]:
    """Return the real paths of a split: its archives, or its folder and the class folders that are links."""
    folder = split.location.folder
    paths = (
        split.location.archives if folder is None else (folder, *(folder / own for own in list_folder(folder).links))
    )
    return sorted({os.path.realpath(path) for path in paths})


def file_sizes(source: "ImageSource", indices: np.ndarray | None = None) -> np.ndarray:
    """Return the length in bytes of the images' files, int64 (n,), or of those at `indices`; 0 for a missing file."""
    chosen = np.arange(len(source)) if indices is None else indices
    if isinstance(source, ArchiveSource):
        return source.sizes[chosen]
    return np.array([_length(source.name(int(i))) for i in chosen], dtype=np.int64)


def _length(name: str) -> int:
    try:
        return Path(name).stat().st_size
    except OSError:
        return 0
