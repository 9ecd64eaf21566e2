"""Images of a split in its archives, and the classes that folders, labels in shards or a label file give them."""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TypeVar

from data.stores.archive_members import TAR, Contents, Member, list_archive
from data.stores.image_files import LINKS, PassedOver
from data.stores.label_files import find_label_file, read_labels
from data.stores.layout import (
    LABEL_BYTES,
    Sample,
    SplitLocation,
    images_of,
    of_split,
    parse_label,
    refuse_shard_names,
    samples_of,
    shard_labels,
    without_shared_folder,
)

NO_CLASSES = ("images", "image", "imgs", "img", "val", "validation", "data")  # names of folders of flat images
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
    passed: PassedOver


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
    listing, entries = _listing(location, number, "", contents, location.inside)
    tars = [(number, inner, member.offset, member.size) for inner, member in entries if inner.lower().endswith(TAR)]
    if tars and listing.samples:
        raise ValueError(f"{path} holds tars and images side by side; which are meant? Write it again with one kind")
    return listing, tars


def _list_inner(location: SplitLocation, number: int, inner: str, offset: int, size: int) -> ArchiveListing:
    contents = list_archive(location.archives[number], offset, size, inner)
    return _listing(location, number, inner, contents, False)[0]


def _listing(
    location: SplitLocation, number: int, inner: str, contents: Contents, inside: bool
) -> tuple[ArchiveListing, list[tuple[str, Member]]]:
    """Return the images among the contents of an archive, and all its members of the split."""
    path, passed = location.archives[number], PassedOver()
    name = f"{path}:{inner}" if inner else str(path)
    entries = of_split(contents.members, location.split, inside, passed)
    for link in contents.links:
        passed.add(LINKS, link)
    labels: dict[str, str | int] = {}
    with ExitStack() as stack:
        files: list[int] = []

        def read(member: Member, count: int) -> bytes:
            if not files:
                files.append(os.open(path, os.O_RDONLY))
                stack.callback(os.close, files[0])
            return os.pread(files[0], min(member.size, count), member.offset)

        images = images_of(entries, read, passed)
        for key, member in shard_labels(entries, images, name).items():
            labels[key] = parse_label(read(member, LABEL_BYTES), member.path, name)
    samples = samples_of(images, labels, name)
    kind = "shards" if labels else "empty" if not samples else "flat" if samples[0].label is None else "folders"
    return ArchiveListing(number, inner, kind, samples, contents.problems, passed), entries


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
        below = without_shared_folder([sample for own in samples for sample in own])
        rest = iter(below)
        samples = [[next(rest) for _ in own] for own in samples]
        file = _label_file_of_one_folder(location, below, val_labels)
        return ("flat", _labelled(samples, file), file) if file else (kind, samples, None)
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
    return kind, _labelled(samples, file), file


def _label_file_of_one_folder(location: SplitLocation, samples: Sequence[Sample], val_labels: str) -> Path | None:
    """Return the label file of validation images that all lie in one folder that is no class, as in val/images/."""
    names = {sample.label for sample in samples}
    if location.split != "val" or len(names) != 1 or str(names.pop()).lower() not in NO_CLASSES:
        return None
    return find_label_file(location.index_folder, val_labels)


def _labelled(samples: Sequence[Sequence[Sample]], file: Path) -> list[list[Sample]]:
    """Return samples with their classes from a label file."""
    labels = read_labels(file, [sample.path for own in samples for sample in own])
    return [[Sample(labels[sample.path], sample.path, sample.member) for sample in own] for own in samples]
