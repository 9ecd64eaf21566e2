"""Images of a split in its archives, and the classes that folders, labels in shards or a label file give them."""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from data.stores.archive import TAR, list_archive
from data.stores.folder import SUFFIXES
from data.stores.label_files import find_label_file, read_labels
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

MANY = 100  # from so many archives on, progress is logged
THREADS = 16  # archives listed in parallel; bound by the latency of network file systems
Progress = Callable[[str], None]  # called with lines about the building of an index
T = TypeVar("T")


@dataclass
class ArchiveListing:
    """Images of a split in one archive, or in a tar inside it."""

    archive: int
    inner: str  # path of the tar in the archive, "" for the archive itself
    kind: str  # shards, folders, flat or empty
    samples: list[Sample]
    problems: list[str]


def list_images(location: SplitLocation, progress: Progress) -> list[ArchiveListing]:
    """List the images of a split in all its archives, and in tars inside them. ValueError if one cannot be used."""
    with ThreadPoolExecutor(THREADS) as pool:
        own = pool.map(lambda number: _list(location, number), range(len(location.archives)))
        listed = _with_progress(own, len(location.archives), location, progress)
        tars = [tar for _, tars in listed for tar in tars]
        inner = _with_progress(pool.map(lambda tar: _list_inner(location, *tar), tars), len(tars), location, progress)
    return [listing for listing, tars in listed if listing.samples or not tars] + inner


def _with_progress(results: Iterator[T], total: int, location: SplitLocation, progress: Progress) -> list[T]:
    """Collect the results; log each tenth of them if they are many."""
    found: list[T] = []
    for result in results:
        found.append(result)
        if total >= MANY and len(found) * 10 // total > (len(found) - 1) * 10 // total:
            progress(f"indexed {len(found)} of {total} archives of {location.split}")
    return found


def _list(location: SplitLocation, number: int) -> tuple[ArchiveListing, list[tuple[int, str, int, int]]]:
    """List an archive; return its own images, and the tars in it as (archive number, path, offset, size)."""
    path = location.archives[number]
    contents = list_archive(path)
    entries = of_split(contents.members, location.split, location.inside)
    tars = [(number, inner, member.offset, member.size) for inner, member in entries if inner.lower().endswith(TAR)]
    if tars and any(name.lower().endswith(SUFFIXES) for name, _ in entries):
        raise ValueError(f"{path} holds tars and images side by side; which are meant? Write it again with one kind")
    return _listing(path, number, "", entries, contents.problems), tars


def _list_inner(location: SplitLocation, number: int, inner: str, offset: int, size: int) -> ArchiveListing:
    path = location.archives[number]
    contents = list_archive(path, offset, size, inner)
    return _listing(path, number, inner, of_split(contents.members, location.split, False), contents.problems)


def _listing(path: Path, number: int, inner: str, entries: Sequence[Any], problems: list[str]) -> ArchiveListing:
    name = f"{path}:{inner}" if inner else str(path)
    labels: dict[str, str | int] = {}
    members = shard_labels(entries, name)
    if members:
        fd = os.open(path, os.O_RDONLY)
        try:
            for key, member in members.items():
                data = os.pread(fd, min(member.size, LABEL_BYTES), member.offset)
                labels[key] = parse_label(data, member.path, name)
        finally:
            os.close(fd)
    samples = samples_of(entries, labels, name)
    kind = "shards" if labels else "empty" if not samples else "flat" if samples[0].label is None else "folders"
    return ArchiveListing(number, inner, kind, samples, problems)


def assign_classes(
    location: SplitLocation, listings: Sequence[ArchiveListing], val_labels: str
) -> tuple[str, list[list[Sample]], Path | None]:
    """Return the layout of a split's archives, the samples of each listing with their classes, and the label file or None.

    The layout is shards, folders, tars, flat or empty. ValueError if the archives differ in it, or hold no classes.
    """
    kinds = {listing.kind for listing in listings} - {"empty"}
    if len(kinds) > 1:
        parts = [
            next(f"{location.archives[one.archive].name}: {kind}" for one in listings if one.kind == kind)
            for kind in sorted(kinds)
        ]
        raise ValueError(
            f"{location.name} holds archives of different layouts ({', '.join(parts)}); use one layout for a split"
        )
    kind = kinds.pop() if kinds else "empty"
    samples = [listing.samples for listing in listings]
    if kind == "folders":
        flat = iter(without_shared_folder([sample for own in samples for sample in own]))
        return kind, [[next(flat) for _ in own] for own in samples], None
    if kind != "flat":
        return kind, samples, None
    stems = [
        PurePosixPath(listing.inner or location.archives[listing.archive].name).name[: -len(TAR)]
        for listing in listings
    ]
    if any(listing.inner for listing in listings) or (
        len(listings) > 1 and not (val_labels and location.split == "val")
    ):
        refuse_shard_names(stems, location.name)
        named = [
            [Sample(stem, f"{stem}/{s.path}", s.member) for s in own] for stem, own in zip(stems, samples, strict=True)
        ]
        return "tars", named, None
    if location.split != "val":
        raise ValueError(
            f"{location.name} holds images without classes; expected <class>/<image> or KEY.jpg with KEY.cls in it"
        )
    file = find_label_file(location.index_folder, val_labels)
    labels = read_labels(file, [s.path for own in samples for s in own])
    return kind, [[Sample(labels[s.path], s.path, s.member) for s in own] for own in samples], file
