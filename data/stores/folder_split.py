"""Splits that are folders of files, and the folder of --val-path."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import numpy as np

from common.text import for_system, shorten
from data.stores.class_labels import label_folders
from data.stores.class_root import ClassRoot, find_class_root, label_search, refuse_unlabelled
from data.stores.folder import FolderSource, scan, scan_labelled, val_folder
from data.stores.folder_tree import list_folder, system_errors
from data.stores.image_files import PassedOver
from data.stores.layout import SplitLocation
from data.stores.names import check_classes, check_numbers, from_system, lookalike_notes, shown, some


class FolderSplit:
    """A split that is a folder of files."""

    def __init__(self, location: SplitLocation, val_labels: str = "") -> None:
        assert location.folder is not None
        self.location, self.folder, self.name, self.kind = location, location.folder, location.name, "folder"
        self.val_labels, self.passed, self.notes = val_labels, PassedOver(), list(location.notes)
        self.remarks = list(location.notes)  # those of the notes that tell how the folder is read
        if val_labels and not self._root(()).flat:
            raise ValueError(
                f"DATA.VAL_LABELS={shorten(val_labels)} has no effect: {location.name} is a folder of class folders; set it to ''"
            )

    def classes(self) -> list[str]:
        """Return the names of the classes, sorted; their numbers if a label file holds numbers."""
        return self._root(()).classes()

    def source(self, classes: Sequence[str], must_hold_all: bool) -> FolderSource:
        """Return the images, labelled by their class's index in `classes`; ValueError as for `scan`."""
        root = self._root(classes)
        with system_errors(root.folder):
            if root.flat:
                source = _flat_source(root, classes, must_hold_all)
            else:
                if self.location.split == "val":
                    refuse_unlabelled(root, classes)
                source = scan(root.folder, classes, must_hold_all)
        self.passed, over = _passed_over(root, source)
        held = _held(source, classes)
        shared = [] if root.flat else _shared_folders(root.folder, held)
        self.remarks = [*self.location.notes, *root.notes, *shared]
        self.notes = [*self.remarks, *over, *lookalike_notes(self.name, held)]
        return source

    def folders_in(self, name: str) -> list[str]:
        """Return the names of the folders in a class folder."""
        folder = self.folder / for_system(name)
        return list_folder(folder).folders if folder.is_dir() else []

    def _root(self, known: Collection[str]) -> ClassRoot:
        """Find the class folders; `known` are the names of the classes, if they are known already."""
        assert self.location.folder is not None
        top, val = self.location.folder, self.location.split == "val"
        with system_errors(top):
            root = find_class_root(top, known, label_search(top, self.location.root, self.val_labels) if val else None)
        self.folder, self.name = root.folder, str(root.folder)
        self.kind = f"folder, classes from {root.label_file}" if root.label_file else "folder"
        return root


def open_val_folder(path: str, lists: Mapping[str, list[str]], val_labels: str) -> tuple[FolderSource, str, list[str]]:
    """Return the images of --val-path, a description and notes; `lists` are those of `class_names`.

    `val_labels` is the label file of flat images, "" to search one in the folder and above it.
    """
    folder, known = val_folder(path), {name for names in lists.values() for name in names}
    with system_errors(folder):
        root = find_class_root(folder, known, label_search(folder, folder.absolute().parent, val_labels))
        if root.flat and root.numbered:
            source = _flat_source(root, next(iter(lists.values())), False)
            what = f"classes by number from {root.label_file}"
        else:
            labels, how = label_folders(root.classes(), lists, str(root.folder))
            source = root.flat_source(labels) if root.flat else scan_labelled(root.folder, labels)
            what = f"{len(labels)} {f'classes of {root.label_file}' if root.flat else 'folders'} {how}"
    return source, f"{root.folder}, {what}", [*root.notes, *_passed_over(root, source)[1]]


def _shared_folders(folder: Path, classes: Sequence[str]) -> list[str]:
    """Return a warning if all class folders hold the same folders and no images: these may be the classes."""
    shared: list[str] | None = None
    for name in classes:
        entries = list_folder(folder / for_system(name))
        if entries.images or len(entries.folders) < 2 or shared not in (None, entries.folders):
            return []
        shared = entries.folders
    if shared is None or len(classes) < 2:
        return []
    return [
        f"all {len(classes)} class folders of {folder} ({some(classes)}) hold the same folders and no images beside them: "
        f"{some(list(map(from_system, shared)))}; if these are the classes, did you mean {folder}/{shown(classes[0])}?"
    ]


def _held(source: FolderSource, classes: Sequence[str]) -> list[str]:
    """Return the classes that have images."""
    return [classes[label] for label in np.unique(source.labels)]


def _flat_source(root: ClassRoot, classes: Sequence[str], must_hold_all: bool) -> FolderSource:
    """Return flat images, labelled by their class's index in `classes`."""
    if root.numbered:
        found = sorted({int(label) for label in root.labels.values()})
        check_numbers(root.folder, found, classes)
        present = [classes[label] for label in found]
    else:
        present = root.classes()
    check_classes(root.folder, "classes", present, classes, must_hold_all)
    return root.flat_source({name: label for label, name in enumerate(classes)})


def _passed_over(root: ClassRoot, source: FolderSource) -> tuple[PassedOver, list[str]]:
    """Return the count of the files that are no images of a split, and a note on them if there are any."""
    passed = PassedOver()
    passed.merge(root.passed)
    passed.merge(source.passed)
    return passed, [f"{root.folder}: passed over {passed.text()}"] if passed.found else []
