"""ImageFolder trees: ROOT/train/<class>/... and ROOT/val/<class>/..., in the order of torchvision.

A `FolderSource` gives loaders the labels and, by index, the bytes and the name of each image. Its paths are kept in one
bytes object: of 1.28 million Python strings, reference counting would copy every page into every forked worker.
"""

import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp", ".gif")
SCAN_THREADS = 16  # class folders listed in parallel; bound by the latency of network file systems
NAMED = 5  # names listed in an error


class ClassIndexError(ValueError):
    """A class index file that cannot be used: `file` and `problem`, for callers that know the option by another name."""

    def __init__(self, file: str, problem: str) -> None:
        super().__init__(file, problem)
        self.file, self.problem = file, problem

    def __str__(self) -> str:
        return f"DATA.CLASS_INDEX={self.file} {self.problem}"


class FolderSource:
    """Labels of the images of a folder, and their bytes by index."""

    def __init__(self, root: Path, paths: Sequence[str], labels: Sequence[int]) -> None:
        encoded = [os.fsencode(path) for path in paths]
        self.root, self.labels = root, np.array(labels, dtype=np.int64)
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
        return np.fromfile(self.name(index), dtype=np.uint8)


def read_class_index(path: str | Path) -> list[str]:
    """Read the class folder names in label order from a file of one of four formats.

    JSON: {"0": ["n01440764", "tench"], ...}, a list of names, or {"name": index, ...}. Text: a name a line.
    ClassIndexError for a missing file, another format, or a class that is not unique.
    """
    path = Path(path)
    if not path.is_file():
        raise ClassIndexError(repr(str(path)), "is not a file; give its path, or '' to sort the folder names")
    text = path.read_text(encoding="utf-8")
    try:
        names = _names_of_json(json.loads(text)) if text.lstrip()[:1] in ("{", "[") else text.splitlines()
    except (ValueError, TypeError, KeyError, IndexError) as error:
        raise ClassIndexError(
            repr(str(path)),
            f"is not understood ({error}); it must be JSON such as "
            '{"0": ["n01440764", "tench"], ...}, ["cat", "dog"] or {"cat": 0, "dog": 1}, or text with a name a line',
        ) from error
    names = [name.strip() for name in names if name.strip()]
    doubles = sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []
    if doubles or not names:
        what = f"names {some(doubles)} more than once" if doubles else "holds no class"
        raise ClassIndexError(repr(str(path)), f"{what}; each class must stand in it exactly once")
    return names


def _names_of_json(tree: object) -> list[str]:
    """Return the names in label order. ValueError if their indices are not 0 .. n - 1."""
    if isinstance(tree, dict) and tree and all(isinstance(value, int) for value in tree.values()):
        by_index = {value: key for key, value in tree.items()}
    elif isinstance(tree, dict):
        by_index = {int(key): value if isinstance(value, str) else value[0] for key, value in tree.items()}
    elif isinstance(tree, list) and all(isinstance(value, str) for value in tree):
        by_index = dict(enumerate(tree))
    else:
        raise ValueError("neither an object nor a list of names")
    if sorted(by_index) != list(range(len(tree))):
        raise ValueError(f"its indices are not 0 .. {len(tree) - 1}, each once")
    return [by_index[i] for i in range(len(by_index))]


def split_folder(root: str | Path, split: str) -> Path:
    """Return ROOT/split; ValueError if it is no folder, with the contents of the nearest one."""
    if not str(root):
        raise ValueError("DATA.PATH is not set; give the folder that holds train/ and val/ (--data-path FOLDER)")
    root = Path(root).expanduser()
    if not root.is_dir():
        parent = next((p for p in root.parents if p.is_dir()), Path("/"))
        raise ValueError(f"DATA.PATH={str(root)!r} is not a folder; {parent} holds {listing(parent)}")
    folder = root / split
    if folder.is_dir():
        return folder
    inner = [child for child in _folders(root) if (root / child / split).is_dir()]
    hint = (
        f"did you mean DATA.PATH={str(root / inner[0])!r}?" if inner else "give the folder that holds train/ and val/"
    )
    raise ValueError(f"DATA.PATH={str(root)!r} has no folder {split}/, it holds {listing(root)}; {hint}")


def val_folder(path: str) -> Path:
    """Return the folder of --val-path; ValueError if it is none, with the contents of the nearest one."""
    folder = Path(path).expanduser()
    if not folder.is_dir():
        parent = next((p for p in folder.parents if p.is_dir()), Path("/"))
        raise ValueError(
            f"--val-path {path!r} is not a folder; {parent} holds {listing(parent)}; give one that holds a folder per class"
        )
    return folder


def class_folders(folder: Path) -> list[str]:
    """Return the sorted names of the class folders of a split; ValueError if there are none."""
    classes = _folders(folder)
    if classes:
        return classes
    flat = sum(entry.name.lower().endswith(SUFFIXES) for entry in os.scandir(folder))
    if flat:
        raise ValueError(
            f"{folder} holds {flat} images but no class folders, so their classes are unknown; "
            f"move each into a folder of its class, {folder}/<class>/<image> (for ImageNet's val, by its ground truth file)"
        )
    raise ValueError(
        f"{folder} holds no class folders, it holds {listing(folder)}; expected {folder}/<class>/<image>.jpg"
    )


def scan(folder: Path, classes: Sequence[str], must_hold_all: bool) -> FolderSource:
    """List the images of a split, classes in the given order, files as torchvision.datasets.ImageFolder sorts them.

    Names that start with a dot are skipped. ValueError for class folders that are not in `classes`, for empty ones, and,
    with `must_hold_all`, for classes without a folder.
    """
    present = class_folders(folder)
    check_classes(folder, "class folders", present, classes, must_hold_all)
    held = set(present)
    return scan_labelled(folder, {name: label for label, name in enumerate(classes) if name in held})


def scan_labelled(folder: Path, labels: Mapping[str, int]) -> FolderSource:
    """List the images of the named class folders, by label; ValueError for folders without images."""
    held = sorted((label, name) for name, label in labels.items())
    with ThreadPoolExecutor(SCAN_THREADS) as pool:
        listings = list(pool.map(lambda item: _images(folder, item[1]), held))
    empty = [name for (_, name), paths in zip(held, listings, strict=True) if not paths]
    if empty:
        raise ValueError(
            f"{folder} has no images in {len(empty)} of its {len(held)} class folders: {some(empty)}; "
            f"fill or remove them (images end in {' '.join(SUFFIXES)})"
        )
    repeated = np.repeat([label for label, _ in held], [len(paths) for paths in listings])
    return FolderSource(folder, [path for paths in listings for path in paths], repeated.tolist())


def check_classes(
    name: str | Path, noun: str, present: Sequence[str], classes: Sequence[str], must_hold_all: bool
) -> None:
    """Raise ValueError for present classes that are not in `classes`, and, with `must_hold_all`, for missing ones."""
    unknown = sorted(set(present) - set(classes))
    if unknown:
        raise ValueError(
            f"{name} has {len(unknown)} {noun} that are not among the {len(classes)} classes: {some(unknown)}; "
            f"remove them, or add them to train/ and to DATA.CLASS_INDEX if one is set (the classes are {some(classes)})"
        )
    missing = sorted(set(classes) - set(present))
    if missing and must_hold_all:
        raise ValueError(
            f"{name} has no {'folder' if 'folder' in noun else 'image'} for {len(missing)} of the {len(classes)} classes: "
            f"{some(missing)}; add their images, or take them out of DATA.CLASS_INDEX"
        )


def _images(folder: Path, name: str) -> list[str]:
    """List the paths of the images below folder/name, relative to `folder`: sorted by folder, then by file name."""
    found: dict[str, list[str]] = {}
    pending = [name]
    while pending:
        inner = pending.pop()
        files = found.setdefault(inner, [])
        with os.scandir(folder / inner) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if entry.is_dir():
                    pending.append(f"{inner}/{entry.name}")
                elif entry.name.lower().endswith(SUFFIXES):
                    files.append(entry.name)
    return [f"{inner}/{file}" for inner in sorted(found) for file in sorted(found[inner])]


def _folders(folder: Path) -> list[str]:
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))


def listing(folder: Path) -> str:
    """Return the names in a folder, the first few, for a message."""
    names = sorted(p.name + "/" * p.is_dir() for p in folder.iterdir())
    return some(names) if names else "nothing"


def some(names: Sequence[str]) -> str:
    """Return the first few names and the number of the others, for a message."""
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more
