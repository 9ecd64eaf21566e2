"""ImageFolder trees: ROOT/train/<class>/... and ROOT/val/<class>/..., in the order of torchvision.

A `FolderSource` gives loaders the labels and, by index, the bytes and the name of each image. Its paths are kept in one
bytes object: of 1.28 million Python strings, reference counting would copy every page into every forked worker.
"""

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from common.text import for_system, shorten
from data.loaders.file_limits import MAX_BYTES
from data.stores.bounded_files import read_array
from data.stores.folder_tree import BrokenLinks, check_link, list_folder, list_images, listing, system_errors
from data.stores.image_files import SUFFIXES, PassedOver
from data.stores.names import MAX_CLASSES, check_classes, class_number, from_system, parse_json, read_text, shown, some

SCAN_THREADS = 16  # class folders listed in parallel; bound by the latency of network file systems
MAX_LINES = 10 * MAX_CLASSES  # of a list of classes; JSON may take several for a class
OTHER_NAMES = {  # of the folder of a split, in lower case
    "train": ("train", "training", "train_images", "trn"),
    "val": ("val", "valid", "validation", "eval", "dev", "test", "testing"),
}
INNER_LEVELS, INNER_FOLDERS = 3, 50  # of a search for the folder that was meant


class ClassIndexError(ValueError):
    """A class index file that cannot be used: `file` and `problem`, for callers that know the option by another name."""

    def __init__(self, file: str, problem: str) -> None:
        super().__init__(file, problem)
        self.file, self.problem = file, problem

    def __str__(self) -> str:
        return f"DATA.CLASS_INDEX={self.file} {self.problem}"


class FolderSource:
    """Labels of the images of a folder, and their bytes by index."""

    def __init__(
        self, root: Path, paths: Sequence[str], labels: Sequence[int], passed: PassedOver | None = None
    ) -> None:
        encoded = [os.fsencode(path) for path in paths]
        self.root, self.labels = root, np.array(labels, dtype=np.int64)
        self.passed = passed or PassedOver()  # files and folders below root that are no images of it
        self._paths = b"".join(encoded)  # relative to root
        self._ends = np.cumsum([len(path) for path in encoded], dtype=np.int64)

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        """Return the path of an image."""
        return os.path.join(self.root, self.relative(index))  # noqa: PTH118  fast

    def relative(self, index: int) -> str:
        """Return the path of an image relative to the root."""
        start = int(self._ends[index - 1]) if index else 0
        return os.fsdecode(self._paths[start : int(self._ends[index])])

    def read(self, index: int) -> np.ndarray:
        """Return the bytes of an image's file, uint8 (n,)."""
        return read_array(self.name(index), MAX_BYTES)


def read_class_index(path: str | Path) -> list[str]:
    """Read the class folder names in label order from a file of one of four formats.

    JSON: {"0": ["n01440764", "tench"], ...}, a list of names, or {"name": index, ...}. Text: a name a line.
    ClassIndexError for a missing file, another format, or a class that is not unique.
    """
    path = Path(path)
    if not os.path.isfile(path):  # noqa: PTH113  False also without permission to look
        raise ClassIndexError(repr(str(path)), "is not a file; give its path, or '' to sort the folder names")
    try:
        text = read_text(path)
    except ValueError as error:
        raise ClassIndexError(repr(str(path)), str(error).removeprefix(f"{path} ")) from error
    try:
        if text.count("\n") > MAX_LINES:
            raise ValueError(f"it has more than {MAX_LINES} lines")
        names = _names_of_json(parse_json(text)) if text.lstrip()[:1] in ("{", "[") else text.splitlines()
        if len(names) > MAX_CLASSES:
            raise ValueError(f"{len(names)} classes are more than {MAX_CLASSES}")
    except ValueError as error:
        raise ClassIndexError(
            repr(str(path)),
            f"is not understood ({shown(str(error))}); it must be JSON such as "
            '{"0": ["n01440764", "tench"], ...}, ["cat", "dog"] or {"cat": 0, "dog": 1}, or text with a name a line',
        ) from error
    names = [name.strip() for name in names if name.strip()]
    doubles = sorted(name for name, count in Counter(names).items() if count > 1)
    if doubles or not names:
        what = f"names {some(doubles)} more than once" if doubles else "holds no class"
        raise ClassIndexError(repr(str(path)), f"{what}; each class must stand in it exactly once")
    return names


def _names_of_json(tree: object) -> list[str]:
    """Return the names in label order. ValueError if their indices are not 0 .. n - 1."""
    if isinstance(tree, dict) and tree and all(isinstance(value, int) for value in tree.values()):
        by_index = {value: key for key, value in tree.items()}
    elif isinstance(tree, dict):
        first = {key: value[0] if isinstance(value, list) and value else value for key, value in tree.items()}
        by_index = {class_number(key): value for key, value in first.items()}
    elif isinstance(tree, list) and all(isinstance(value, str) for value in tree):
        by_index = dict(enumerate(tree))
    else:
        raise ValueError("neither an object nor a list of names")
    if not all(isinstance(name, str) for name in by_index.values()):
        raise ValueError("not all of its names are texts")
    if len(by_index) < len(tree) or set(by_index) != set(range(len(tree))):
        raise ValueError(f"its indices are not 0 .. {len(tree) - 1}, each once")
    return [by_index[i] for i in range(len(by_index))]


def split_folder(root: str | Path, split: str) -> Path:
    """Return ROOT/split; ValueError if it is no folder, with the contents of the nearest one."""
    if not str(root):
        raise ValueError("DATA.PATH is not set; give the folder that holds train/ and val/ (--data-path FOLDER)")
    root = Path(root).expanduser()
    with system_errors(root):
        check_link(root)
        if not root.is_dir():
            raise ValueError(f"DATA.PATH={shorten(str(root))} is not a folder; {_nearest(root)}")
        check_link(root / split)
        if (root / split).is_dir():
            return root / split
        meant, other = _meant(root, split), _other_name(root, split)
    if other and not meant:
        raise ValueError(
            f"DATA.PATH={shorten(str(root))} has no folder {split}/, it holds {listing(root)}; did you mean {other}/? Rename it to "
            f"{split}/ (ln -s works, too)"
        )
    hint = f"did you mean DATA.PATH={shorten(str(meant))}?" if meant else "give the folder that holds train/ and val/"
    raise ValueError(f"DATA.PATH={shorten(str(root))} has no folder {split}/, it holds {listing(root)}; {hint}")


def _nearest(path: Path) -> str:
    """Return the contents of the nearest folder above a path that does not exist, for a message."""
    parent = next((p for p in path.parents if p.is_dir()), Path("/"))
    return f"{parent} holds {listing(parent)}"


def _meant(root: Path, split: str) -> Path | None:
    """Return the folder with the split that DATA.PATH may mean: the one above it, or one a few levels below."""
    if root.name in ("train", "val") and (root.parent / split).is_dir():
        return root.parent
    level = [root]
    for _ in range(INNER_LEVELS):
        level = [folder / name for folder in level for name in list_folder(folder).folders][:INNER_FOLDERS]
        for folder in level:
            if (folder / split).is_dir():
                return folder
    return None


def _other_name(root: Path, split: str) -> str:
    """Return the folder in DATA.PATH with another common name of the split, or one that differs in case; "" for none."""
    names = {name.lower(): name for name in list_folder(root).folders}
    return next((names[name] for name in OTHER_NAMES[split] if name in names), "")


def val_folder(path: str) -> Path:
    """Return the folder of --val-path; ValueError if it is none, with the contents of the nearest one."""
    folder = Path(path).expanduser()
    with system_errors(folder):
        check_link(folder)
        if not folder.is_dir():
            raise ValueError(
                f"--val-path {shorten(path)} is not a folder; {_nearest(folder)}; give one that holds a folder per class"
            )
    return folder


def class_folders(folder: Path) -> list[str]:
    """Return the sorted names of the class folders of a split; ValueError if there are none."""
    entries = list_folder(folder)
    if entries.folders:
        return sorted(map(from_system, entries.folders))
    if entries.images:
        raise ValueError(
            f"{folder} holds {len(entries.images)} images but no class folders, so their classes are unknown; "
            f"move each into a folder of its class, {folder}/<class>/<image>"
        )
    raise ValueError(
        f"{folder} holds no class folders, it holds {listing(folder)}; expected {folder}/<class>/<image>.jpg"
    )


def scan(folder: Path, classes: Sequence[str], must_hold_all: bool) -> FolderSource:
    """List the images of a split, classes in the given order, files as torchvision.datasets.ImageFolder sorts them.

    System files and names that start with a dot are skipped. ValueError for class folders that are not in `classes`, for
    empty ones, for links that lead nowhere, and, with `must_hold_all`, for classes without a folder.
    """
    present = class_folders(folder)
    check_classes(folder, "class folders", present, classes, must_hold_all)
    held = set(present)
    return scan_labelled(folder, {name: label for label, name in enumerate(classes) if name in held})


def scan_labelled(folder: Path, labels: Mapping[str, int]) -> FolderSource:
    """List the images of the named class folders, by label; ValueError for folders without images."""
    held = sorted((label, name) for name, label in labels.items())
    with ThreadPoolExecutor(SCAN_THREADS) as pool:
        listings = list(pool.map(lambda item: list_images(folder, for_system(item[1])), held))
    passed, broken = PassedOver(), BrokenLinks()
    for _, own, links in listings:
        passed.merge(own)
        broken.merge(links)
    broken.refuse(folder)
    empty = [(name, own) for (_, name), (paths, own, _) in zip(held, listings, strict=True) if not paths]
    if empty:
        raise ValueError(_without_images(folder, empty, len(held)))
    repeated = np.repeat([label for label, _ in held], [len(paths) for paths, _, _ in listings])
    return FolderSource(folder, [path for paths, _, _ in listings for path in paths], repeated.tolist(), passed)


def _without_images(folder: Path, empty: Sequence[tuple[str, PassedOver]], held: int) -> str:
    """Return the message for class folders without images."""
    other = PassedOver()
    for _, passed in empty:
        other.merge(passed)
    holds = f" (they hold {other.text()})" if other.found else ""
    return (
        f"{folder} has no images in {len(empty)} of its {held} class folders: {some([name for name, _ in empty])}{holds}; "
        f"fill them or move them elsewhere (images end in {' '.join(SUFFIXES)}, or begin as such files do)"
    )
