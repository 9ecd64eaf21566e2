"""Beginning of the classes in the folder of a split: its class folders, or flat images and the file that tells their classes.

<split>/<class>/<image>                 class folders
<split>/images/<class>/<image>          below folders that hold nothing else, as in a doubled folder
val/<image>  val/images/<image>         flat, with a label file beside the images, above them or in DATA.PATH
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from common.text import for_system
from data.stores.folder import FolderSource, class_folders
from data.stores.folder_tree import Entries, list_folder
from data.stores.image_files import BESIDE, PassedOver
from data.stores.label_files import ID_FILES, KNOWN, LABELS_REMEDY, Labels, read_labels, search_label_file
from data.stores.names import from_system, look

KAGGLE = ("ILSVRC", "Data", "CLS-LOC")  # folders in Kaggle's download; LOC_val_solution.csv lies beside the first
LabelSearch = Callable[[Path], Path | None]  # maps the folder of flat images to their label file


@dataclass
class ClassRoot:
    """Folder of class folders, or of flat images."""

    folder: Path
    flat: list[str] = field(default_factory=list)  # names of the images, if there are no class folders
    label_file: Path | None = None  # of flat images
    passed: PassedOver = field(default_factory=PassedOver)
    notes: list[str] = field(default_factory=list)

    @cached_property
    def labels(self) -> Labels:
        """Name or number of the class of each flat image; ValueError if no file tells them."""
        if self.label_file is None:
            raise ValueError(f"{unlabelled(self.folder, len(self.flat))}; {LABELS_REMEDY}")
        return read_labels(self.label_file, self.flat)

    @property
    def numbered(self) -> bool:
        """Return True for flat images whose label file holds numbers."""
        return any(isinstance(label, int) for label in self.labels.values())

    def classes(self) -> list[str]:
        """Return the sorted names of the classes, or their numbers if the label file holds numbers."""
        if not self.flat:
            return class_folders(self.folder)
        found = sorted({str(label) for label in self.labels.values()})
        return list(map(str, range(max(map(int, found)) + 1))) if self.numbered else found

    def flat_source(self, label_of: Mapping[str, int]) -> FolderSource:
        """Return the flat images in the order of class folders; `label_of` maps class names, for numbers it is not used."""
        labels = {name: label if isinstance(label, int) else label_of[label] for name, label in self.labels.items()}
        rows = sorted((label, name) for name, label in labels.items())
        return FolderSource(self.folder, [for_system(name) for _, name in rows], [label for label, _ in rows])


def find_class_root(folder: Path, known: Collection[str], label_file: LabelSearch | None) -> ClassRoot:
    """Find the class folders of a split, below folders that hold one folder and nothing else, or its flat images.

    A folder named after one of the `known` classes is a class folder. Flat images need a label file; with None for its
    search they are refused.
    """
    top = list_folder(folder)
    inner = _below(folder, top, known, label_file)
    root = ClassRoot(inner[0] if inner else folder)
    levels = [top, inner[1]] if inner else [top]
    if inner:
        root.notes.append(f"{root.folder} is read: {folder} holds nothing but this folder")
    if levels[-1].images and not levels[-1].folders:
        root.flat = [from_system(name) for name in levels[-1].images]
        if label_file is None:
            raise ValueError(
                f"{unlabelled(root.folder, len(root.flat))}; move each into a folder of its class, "
                f"{root.folder}/<class>/<image>"
            )
        root.label_file = label_file(root.folder)
    for level in levels:
        root.passed.merge(level.passed)
        for name, kind in level.others:
            if name not in (*KNOWN, *ID_FILES, root.label_file and root.label_file.name):
                root.passed.add(kind, from_system(name))
    for name in [] if root.flat else levels[-1].images:
        root.passed.add(BESIDE, from_system(name))
    return root


def _below(
    folder: Path, entries: Entries, known: Collection[str], label_file: LabelSearch | None
) -> tuple[Path, Entries] | None:
    """Return the first folder below that holds class folders or labelled flat images; None if `folder` itself does."""
    if entries.images or len(entries.folders) != 1:
        return None
    own = entries.folders[0]
    path, inner = folder / own, list_folder(folder / own)
    several = len(inner.folders) > 1 and not inner.images
    if from_system(own) in known:
        return (path, inner) if several and set(map(from_system, inner.folders)) <= set(known) else None
    if several:
        return path, inner
    if inner.images and not inner.folders:
        return (path, inner) if label_file and label_file(path) else None
    return _below(path, inner, known, label_file)


def unlabelled(folder: Path, count: int) -> str:
    """Return the first part of a message on images without classes."""
    return f"{folder} holds {count} images but no class folders, so their classes are unknown"


def refuse_unlabelled(root: ClassRoot, classes: Sequence[str]) -> None:
    """Raise ValueError if all images lie in one folder that is no class; no file tells their classes then."""
    present = class_folders(root.folder)
    if len(present) == 1 and len(classes) > 1 and look(present[0]) not in map(look, classes):
        folder = root.folder / for_system(present[0])
        if images := list_folder(folder).images:
            raise ValueError(f"{unlabelled(folder, len(images))}; {LABELS_REMEDY}")


def label_search(top: Path, root: Path, val_labels: str) -> LabelSearch:
    """Return a search for the label file of flat images: in their folder, in those above it up to `top`, and in `root`."""

    def search(folder: Path) -> Path | None:
        above = [folder, *(p for p in folder.parents if p.is_relative_to(top)), root]
        if root.absolute().parts[-len(KAGGLE) :] == KAGGLE:
            above.append(root.absolute().parents[len(KAGGLE) - 1])
        return search_label_file(above, val_labels)

    return search
