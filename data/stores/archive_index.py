"""Index of a split's archives: class, archive, offset and length of every image, built once and kept in a file.

The file lies beside the archives (`retoken-index-train.npz`), or, if that folder is not writable, below
$XDG_CACHE_HOME/retoken. It records size and modification time of its inputs and is rebuilt when they change. The first
process builds it under a lock file; the others wait for it.
"""

import hashlib
import os
import sys
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from common.atomic_files import remove_temporary, write_atomically
from common.text import readable
from data.stores.archive_listing import ArchiveListing, Progress, assign_classes, list_images
from data.stores.build_once import build_once
from data.stores.image_files import SUFFIXES, PassedOver
from data.stores.index_file import FORMAT, ArchiveIndex, load_index, save_index
from data.stores.label_files import inputs_of
from data.stores.layout import Sample, SplitLocation
from data.stores.names import encode


class NoImagesError(ValueError):
    """Archives without an image of the split."""


def open_index(location: SplitLocation, val_labels: str, progress: Progress | None) -> tuple[ArchiveIndex, Path]:
    """Return the index of a split's archives and its file; build it if there is none, or an outdated one.

    `progress` is called with lines about building and waiting. Without it, lines about building go to stderr and those
    about waiting, which every process but one has, nowhere.
    """
    log = progress or _to_stderr
    files = index_files(location)
    states: dict[str, str] = {}  # of outdated files

    def read(file: Path) -> ArchiveIndex | None:
        index = load_index(file, location)
        if os.path.lexists(file):
            states[str(file)] = "the old one cannot be used" if index is None else "its files have changed"
        if index is None:
            return None
        current = inputs(location, index.metadata["label_inputs"], val_labels)
        return index if index.metadata["inputs"] == current else None

    def build(file: Path) -> None:
        again = f" again: {states[str(file)]}" if str(file) in states else ""
        log(f"indexing {location.split} of {location.root} ({len(location.archives)} archives){again}")
        index = build_index(location, val_labels, log)
        remove_temporary(file.parent, file.name)  # of builds that were killed
        write_atomically(file, lambda temporary: save_index(index, temporary))
        away = "" if file == files[0] else f" because {files[0].parent} cannot be written"
        log(f"indexed {len(index)} images; the index is kept in {file}{away}")

    return build_once(files, read, build, progress or _to_nowhere)


def index_files(location: SplitLocation) -> list[Path]:
    """Return the possible paths of an index file: beside the archives, and in this user's cache."""
    root = location.root.absolute()
    own = f"{root.name}." if location.inside else ""
    name = f"{own}retoken-index-{location.split}.npz"
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "retoken"
    key = hashlib.sha256(os.fsencode(str(root))).hexdigest()[:16]
    return [location.index_folder.absolute() / name, cache / f"{key}-{name}"]


def _relative(file: Path, folder: Path) -> str:
    """Return a path relative to `folder` if it lies in it, so that an index may be copied with its archives."""
    return str(file.relative_to(folder) if file.is_relative_to(folder) else file.absolute())


def inputs(location: SplitLocation, label_files: Iterable[str], val_labels: str) -> list[Any]:
    """Return the inputs of an index: its format, DATA.VAL_LABELS, and name, size and time of archives and label files."""
    paths = [*location.archives, *(location.index_folder / file for file in label_files)]
    return [FORMAT, val_labels if label_files else "", *(_state(path) for path in paths)]


def _state(path: Path) -> list[Any]:
    """Return name, size and modification time of a file; zeros for a missing one."""
    try:
        status = path.stat()
    except OSError:
        return [path.name, 0, 0]
    return [path.name, status.st_size, status.st_mtime_ns]


def build_index(location: SplitLocation, val_labels: str, progress: Progress) -> ArchiveIndex:
    """List the archives of a split and sort their images. ValueError if they cannot be used."""
    listings = list_images(location, progress)
    kind, samples, label_file = assign_classes(location, listings, val_labels)
    label_files = [_relative(file, location.index_folder) for file in inputs_of(label_file)] if label_file else []
    rows = [(sample, listing) for listing, own in zip(listings, samples, strict=True) for sample in own]
    passed = PassedOver()
    for listing in listings:
        passed.merge(listing.passed)
    if not rows:
        raise NoImagesError(
            f"{location.name} holds no images of {location.split}: their names end in {' '.join(SUFFIXES)}"
            + (f" and begin with {location.split}/" if location.inside else "")
            + (f"; it holds {passed.text()}" if passed.found else "")
        )
    problems = [problem for listing in listings for problem in listing.problems]
    problems += [f"{location.archives[listing.archive]} holds no images" for listing in listings if not listing.samples]
    metadata = {
        "kind": kind,
        "problems": problems,
        "passed_over": passed.found,
        "label_inputs": label_files,
        "inputs": inputs(location, label_files, val_labels),
    }
    return _sorted(rows, metadata, location)


def _sorted(
    rows: list[tuple[Sample, ArchiveListing]], metadata: dict[str, Any], location: SplitLocation
) -> ArchiveIndex:
    """Sort the images as torchvision sorts a folder: by class, folder and file name."""
    numbered = {isinstance(sample.label, int) for sample, _ in rows}
    if len(numbered) > 1:
        raise ValueError(
            f"{location.name} tells classes by number for some images and by name for others; use one of them"
        )
    rows.sort(key=lambda row: (row[0].label, *row[0].path.rpartition("/")[::2]))
    classes = _wordnet_ids(rows) if numbered == {True} else sorted({str(sample.label) for sample, _ in rows})
    number = {name: i for i, name in enumerate(classes)} if classes and numbered == {False} else None
    labels = [number[str(s.label)] if number else s.label for s, _ in rows]
    again = [a.path for (a, _), (b, _) in pairwise(rows) if (a.label, a.path) == (b.label, b.path)]
    paths = [encode((listing.inner + "/" if listing.inner else "") + sample.member.path) for sample, listing in rows]
    return ArchiveIndex(
        metadata={
            **metadata,
            "classes": classes,
            "numbered": numbered == {True},
            "duplicates": len(again),
            "duplicate_names": again[:20],
        },
        archive=np.array([listing.archive for _, listing in rows], dtype=np.int32),
        offset=np.array([sample.member.offset for sample, _ in rows], dtype=np.int64),
        size=np.array([sample.member.size for sample, _ in rows], dtype=np.int64),
        label=np.array(labels, dtype=np.int32),
        names=np.frombuffer(b"".join(paths), dtype=np.uint8),
        ends=np.cumsum([len(path) for path in paths], dtype=np.int64),
    )


def _wordnet_ids(rows: list[tuple[Sample, ArchiveListing]]) -> list[str] | None:
    """Return the WordNet ids of numbered classes if all files are named <wnid>_<number>, as in ImageNet; else None."""
    names: dict[int, str] = {}
    for sample, _ in rows:
        wnid = sample.path.rpartition("/")[2].partition("_")[0]
        if len(wnid) != 9 or wnid[0] != "n" or not wnid[1:].isdecimal():
            return None
        if names.setdefault(int(str(sample.label)), wnid) != wnid:
            return None
    ordered = [names[label] for label in sorted(names)]
    return ordered if sorted(names) == list(range(len(names))) and ordered == sorted(set(ordered)) else None


def _to_stderr(text: str) -> None:
    print(readable(text), file=sys.stderr, flush=True)


def _to_nowhere(text: str) -> None:
    pass
