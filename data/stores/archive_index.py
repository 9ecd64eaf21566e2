"""The index of a split's archives: class, file, offset and length of every image, built once and kept in a file.

The file lies beside the archives (`retoken-index-train.npz`), or, where that folder cannot be written, below
$XDG_CACHE_HOME/retoken. It states size and modification time of all it was built from, and is built again when they
change. Whichever process comes first builds it, under a lock file; the others wait for it.
"""

import hashlib
import io
import json
import os
import sys
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import numpy as np

from common.atomic_files import write_atomically
from data.stores.archive import TAR, list_archive
from data.stores.build_once import build_once
from data.stores.folder import SUFFIXES
from data.stores.label_files import find_label_file, inputs_of, read_labels
from data.stores.layout import (
    LABEL_BYTES,
    Sample,
    SplitLocation,
    of_split,
    parse_label,
    refuse_shard_names,
    samples_of,
    shard_labels,
    without_shared_folder,
)

FORMAT = 1  # raised when what an index holds, or how it is built, changes
MANY = 100  # archives whose listing is worth reports of progress
THREADS = 16  # archives listed at a time; mostly waiting for a network file system
Say = Callable[[str], None]
T = TypeVar("T")


class NoImagesError(ValueError):
    """Archives hold no image of the split."""


@dataclass
class Found:
    """What an archive, or a tar in one, holds of a split."""

    archive: int
    inner: str  # the tar in the archive, "" for the archive itself
    kind: str  # shards, folders, flat or empty
    samples: list[Sample]
    problems: list[str]


@dataclass(frozen=True)
class StoreIndex:
    """Where the images of a split lie, sorted by class, folder and file name as torchvision sorts a folder."""

    metadata: dict[str, Any]  # kind, classes (None if they are numbers), problems, duplicates, inputs
    archive: np.ndarray  # int32 (n,)
    offset: np.ndarray  # int64 (n,)
    size: np.ndarray  # int64 (n,)
    label: np.ndarray  # int32 (n,), into the classes
    names: np.ndarray  # uint8, the paths in the archives, one after the other
    ends: np.ndarray  # int64 (n,), where each path ends

    def __len__(self) -> int:
        return len(self.offset)

    def path(self, index: int) -> str:
        """Return the path of an image in its archive."""
        start = int(self.ends[index - 1]) if index else 0
        return os.fsdecode(self.names[start : int(self.ends[index])].tobytes())


def open_index(place: SplitLocation, val_labels: str, say: Say | None) -> tuple[StoreIndex, Path]:
    """Return the index of a split's archives and the file it is kept in; build it if there is none that fits.

    `say` hears of building and of waiting; without it stderr does, of building only: one process of many has a voice.
    """
    tell = say or _to_stderr
    files = index_files(place)
    states: dict[str, Any] = {}

    def read(file: Path) -> StoreIndex | None:
        index = _load(file)
        if index is None:
            return None
        states[str(file)] = index.metadata["inputs"]
        return index if index.metadata["inputs"] == inputs(place, index.metadata["label_inputs"], val_labels) else None

    def build(file: Path) -> None:
        again = " again: its files have changed" if str(file) in states else ""
        tell(f"indexing {place.split} of {place.root} ({len(place.archives)} archives){again}")
        index = build_index(place, val_labels, tell)
        write_atomically(file, lambda temporary: _save(index, temporary), shared=True)
        away = "" if file == files[0] else f" because {files[0].parent} cannot be written"
        tell(f"indexed {len(index)} images; the index is kept in {file}{away}")

    return build_once(files, read, build, say or _to_nobody)


def index_files(place: SplitLocation) -> list[Path]:
    """Return where an index may lie: beside the archives, and in the cache of this user."""
    root = place.root.absolute()
    own = f"{root.name}." if place.inside else ""
    name = f"{own}retoken-index-{place.split}.npz"
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "retoken"
    key = hashlib.sha256(os.fsencode(str(root))).hexdigest()[:16]
    return [_folder(place).absolute() / name, cache / f"{key}-{name}"]


def _folder(place: SplitLocation) -> Path:
    return place.root.parent if place.inside else place.root


def _relative(file: Path, folder: Path) -> str:
    """Return the path from the folder on, if it lies in it: an index may be copied with its archives."""
    return str(file.relative_to(folder) if file.is_relative_to(folder) else file.absolute())


def inputs(place: SplitLocation, label_files: Iterable[str], val_labels: str) -> list[Any]:
    """Return what an index depends on: name, size and time of the archives and label files, and DATA.VAL_LABELS."""
    paths = [*place.archives, *(_folder(place) / file for file in label_files)]
    return [FORMAT, val_labels if label_files else "", *(_state(path) for path in paths)]


def _state(path: Path) -> list[Any]:
    try:
        status = path.stat()
    except OSError:
        return [path.name, 0, 0]
    return [path.name, status.st_size, status.st_mtime_ns]


def build_index(place: SplitLocation, val_labels: str, say: Say) -> StoreIndex:
    """List all archives of a split and sort their images. ValueError if they cannot be used."""
    with ThreadPoolExecutor(THREADS) as pool:
        numbers = range(len(place.archives))
        listed = _told(pool.map(lambda number: _list(place, number), numbers), len(numbers), place, say)
        inner = [piece for _, pieces in listed for piece in pieces]
        done = _told(pool.map(lambda piece: _list_inner(place, *piece), inner), len(inner), place, say)
    founds = [found for found, pieces in listed if found.samples or not pieces] + done
    kind, samples, label_file = _classes(place, founds, val_labels)
    label_files = [_relative(file, _folder(place)) for file in inputs_of(label_file)] if label_file else []
    rows = [(sample, found) for found, own in zip(founds, samples, strict=True) for sample in own]
    if not rows:
        raise NoImagesError(
            f"{place.name} holds no images of {place.split}: their names end in {' '.join(SUFFIXES)}"
            + (f" and begin with {place.split}/" if place.inside else "")
        )
    problems = [problem for found in founds for problem in found.problems]
    problems += [f"{place.archives[found.archive]} holds no images" for found in founds if not found.samples]
    metadata = {
        "kind": kind,
        "problems": problems,
        "label_inputs": label_files,
        "inputs": inputs(place, label_files, val_labels),
    }
    return _sorted(rows, metadata, place)


def _told(results: Iterator[T], total: int, place: SplitLocation, say: Say) -> list[T]:
    """Collect results, saying so at each tenth if they are many."""
    found: list[T] = []
    for result in results:
        found.append(result)
        if total >= MANY and len(found) * 10 // total > (len(found) - 1) * 10 // total:
            say(f"indexed {len(found)} of {total} archives of {place.split}")
    return found


def _list(place: SplitLocation, number: int) -> tuple[Found, list[tuple[int, str, int, int]]]:
    """List an archive; return what it holds itself, and the tars in it as (archive, name, offset, size)."""
    path = place.archives[number]
    contents = list_archive(path)
    entries = of_split(contents.members, place.split, place.inside)
    pieces = [(number, inner, member.offset, member.size) for inner, member in entries if inner.lower().endswith(TAR)]
    if pieces and any(name.lower().endswith(SUFFIXES) for name, _ in entries):
        raise ValueError(f"{path} holds tars and images side by side; which are meant? Write it again with one kind")
    return _found(path, number, "", entries, contents.problems), pieces


def _list_inner(place: SplitLocation, number: int, inner: str, offset: int, size: int) -> Found:
    path = place.archives[number]
    contents = list_archive(path, offset, size, inner)
    return _found(path, number, inner, of_split(contents.members, place.split, False), contents.problems)


def _found(path: Path, number: int, inner: str, entries: Sequence[Any], problems: list[str]) -> Found:
    name = f"{path}:{inner}" if inner else str(path)
    labels: dict[str, str | int] = {}
    holders = shard_labels(entries, name)
    if holders:
        fd = os.open(path, os.O_RDONLY)
        try:
            for key, member in holders.items():
                data = os.pread(fd, min(member.size, LABEL_BYTES), member.offset)
                labels[key] = parse_label(data, member.path, name)
        finally:
            os.close(fd)
    samples = samples_of(entries, labels, name)
    kind = "shards" if labels else "empty" if not samples else "flat" if samples[0].label is None else "folders"
    return Found(number, inner, kind, samples, problems)


def _classes(
    place: SplitLocation, founds: Sequence[Found], val_labels: str
) -> tuple[str, list[list[Sample]], Path | None]:
    """Decide what tells the classes; return the layout, the samples of each archive with their classes, and a label file."""
    kinds = {found.kind for found in founds} - {"empty"}
    if len(kinds) > 1:
        parts = [
            next(f"{place.archives[f.archive].name}: {kind}" for f in founds if f.kind == kind)
            for kind in sorted(kinds)
        ]
        raise ValueError(
            f"{place.name} holds archives of different layouts ({', '.join(parts)}); use one layout for a split"
        )
    kind = kinds.pop() if kinds else "empty"
    samples = [found.samples for found in founds]
    if kind == "folders":
        flat = iter(without_shared_folder([sample for own in samples for sample in own]))
        return kind, [[next(flat) for _ in own] for own in samples], None
    if kind != "flat":
        return kind, samples, None
    stems = [PurePosixPath(found.inner or place.archives[found.archive].name).name[: -len(TAR)] for found in founds]
    if any(found.inner for found in founds) or (len(founds) > 1 and not (val_labels and place.split == "val")):
        refuse_shard_names(stems, place.name)
        named = [
            [Sample(stem, f"{stem}/{s.place}", s.member) for s in own] for stem, own in zip(stems, samples, strict=True)
        ]
        return "tars", named, None
    if place.split != "val":
        raise ValueError(
            f"{place.name} holds images without classes; expected <class>/<image> or KEY.jpg with KEY.cls in it"
        )
    file = find_label_file(_folder(place), val_labels)
    labels = read_labels(file, [s.place for own in samples for s in own])
    return kind, [[Sample(labels[s.place], s.place, s.member) for s in own] for own in samples], file


def _sorted(rows: list[tuple[Sample, Found]], metadata: dict[str, Any], place: SplitLocation) -> StoreIndex:
    """Sort the images as torchvision sorts a folder: by class, folder and file name."""
    numbered = {isinstance(sample.label, int) for sample, _ in rows}
    if len(numbered) > 1:
        raise ValueError(
            f"{place.name} tells classes by number for some images and by name for others; use one of them"
        )
    rows.sort(key=lambda row: (row[0].label, *row[0].place.rpartition("/")[::2]))
    classes = _wordnet_ids(rows) if numbered == {True} else sorted({str(sample.label) for sample, _ in rows})
    number = {name: i for i, name in enumerate(classes)} if classes and numbered == {False} else None
    labels = [number[str(s.label)] if number else s.label for s, _ in rows]
    again = [a.place for (a, _), (b, _) in pairwise(rows) if (a.label, a.place) == (b.label, b.place)]
    paths = [os.fsencode((found.inner + "/" if found.inner else "") + sample.member.path) for sample, found in rows]
    return StoreIndex(
        metadata={
            **metadata,
            "classes": classes,
            "numbered": numbered == {True},
            "duplicates": len(again),
            "duplicate_names": again[:20],
        },
        archive=np.array([found.archive for _, found in rows], dtype=np.int32),
        offset=np.array([sample.member.offset for sample, _ in rows], dtype=np.int64),
        size=np.array([sample.member.size for sample, _ in rows], dtype=np.int64),
        label=np.array(labels, dtype=np.int32),
        names=np.frombuffer(b"".join(paths), dtype=np.uint8),
        ends=np.cumsum([len(path) for path in paths], dtype=np.int64),
    )


def _wordnet_ids(rows: list[tuple[Sample, Found]]) -> list[str] | None:
    """Return the names of numbered classes where the files are called <wnid>_<number>, as ImageNet's are; else None."""
    names: dict[int, str] = {}
    for sample, _ in rows:
        wnid = sample.place.rpartition("/")[2].partition("_")[0]
        if len(wnid) != 9 or wnid[0] != "n" or not wnid[1:].isdecimal():
            return None
        if names.setdefault(int(str(sample.label)), wnid) != wnid:
            return None
    ordered = [names[label] for label in sorted(names)]
    return ordered if sorted(names) == list(range(len(names))) and ordered == sorted(set(ordered)) else None


def _to_stderr(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _to_nobody(text: str) -> None:
    pass


def _save(index: StoreIndex, file: Path) -> None:
    metadata = np.frombuffer(json.dumps(index.metadata).encode(), dtype=np.uint8)
    arrays = {name: getattr(index, name) for name in ("archive", "offset", "size", "label", "names", "ends")}
    with file.open("wb") as stream:
        np.savez(stream, facts=metadata, **arrays)


def _load(file: Path) -> StoreIndex | None:
    """Read an index; None if there is none, or one that this code does not understand."""
    try:
        with np.load(io.BytesIO(file.read_bytes()), allow_pickle=False) as arrays:
            metadata = json.loads(arrays["facts"].tobytes())
            found = {name: arrays[name] for name in arrays.files if name != "facts"}
        return StoreIndex(metadata=metadata, **found) if metadata["inputs"][0] == FORMAT else None
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile):
        return None
