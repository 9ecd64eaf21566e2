"""Images of a split in its archives, and the classes that folders, labels in shards or a label file give them."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import TypeVar

from common.text import for_system
from data.stores.archive_members import TAR, Contents, Member, list_archive
from data.stores.bounded_files import open_file
from data.stores.image_files import LINKS, PassedOver
from data.stores.label_files import ID_FILES, KNOWN, Labels, find_label_file, read_labels, search_label_file
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
from data.stores.names import shown

NO_CLASSES = ("images", "image", "imgs", "img", "val", "validation", "data")  # names of folders of flat images
LABEL_FILES = 20  # in an archive, at most
MANY = 100  # from so many archives on, progress is logged
THREADS = 16  # archives listed in parallel; bound by the latency of network file systems
Progress = Callable[[str], None]  # called with lines about the building of an index
LABEL_FILE_BYTES = 64 << 20  # of a label file in an archive at most; the largest known one has 2 MB
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
    label_files: dict[str, bytes] = field(default_factory=dict)  # contents of those of validation images, by path


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
                files.append(open_file(path))
                stack.callback(os.close, files[0])
            return os.pread(files[0], min(member.size, count), member.offset)

        images = images_of(entries, read, passed)
        for key, member in shard_labels(entries, images, name).items():
            labels[key] = parse_label(read(member, LABEL_BYTES), member.path, name)
        label_members = [member for member in contents.members if _is_label_file(member, location.split)]
        if len(label_members) > LABEL_FILES:
            raise ValueError(
                f"{name} holds {len(label_members)} files of labels, {shown(label_members[0].path)} the first"
            )
        label_files = {member.path: read(member, member.size) for member in label_members}
    samples = samples_of(images, labels, name)
    kind = "shards" if labels else "empty" if not samples else "flat" if samples[0].label is None else "folders"
    return ArchiveListing(number, inner, kind, samples, contents.problems, passed, label_files), entries


def _is_label_file(member: Member, split: str) -> bool:
    """Return True for a file that may tell the classes of validation images, by its name."""
    parts = PurePosixPath(member.path).parts
    named = bool(parts) and parts[-1] in (*KNOWN, *ID_FILES) and "train" not in parts[:-1] and ".." not in parts
    return named and split == "val" and member.size <= LABEL_FILE_BYTES


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
        if not _in_one_folder(location, below):
            return kind, samples, None
        return ("flat", *_labelled(location, listings, samples, val_labels))
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
    return kind, *_labelled(location, listings, samples, val_labels)


def _in_one_folder(location: SplitLocation, samples: Sequence[Sample]) -> bool:
    """Return True for validation images that all lie in one folder that is no class, as in val/images/."""
    names = {sample.label for sample in samples}
    return location.split == "val" and len(names) == 1 and str(names.pop()).lower() in NO_CLASSES


def _labelled(
    location: SplitLocation, listings: Sequence[ArchiveListing], samples: Sequence[Sequence[Sample]], val_labels: str
) -> tuple[list[list[Sample]], Path]:
    """Return samples with their classes from a label file, and that file, or the archive that holds it.

    It is DATA.VAL_LABELS, else the one in the archive, else the one beside it.
    """
    images = [sample.path for own in samples for sample in own]
    holder = next((listing for listing in listings if listing.label_files), None)
    labels, file = None, location.archives[holder.archive] if holder else Path()
    if holder and not val_labels:
        labels = _labels_inside(file, holder.label_files, images)
    if labels is None:
        file = find_label_file(location.index_folder, val_labels)
        labels = read_labels(file, images)
    return [[Sample(labels[sample.path], sample.path, sample.member) for sample in own] for own in samples], file


def _labels_inside(archive: Path, files: Mapping[str, bytes], images: Sequence[str]) -> Labels | None:
    """Return the class of each image from the label files of an archive, read as from a folder: the one deepest inside."""
    with TemporaryDirectory() as name:
        top = Path(name)
        for path, data in files.items():
            try:
                copy = top / for_system(path.lstrip("/"))
                copy.parent.mkdir(parents=True, exist_ok=True)
                copy.write_bytes(data)
            except (OSError, ValueError) as error:  # no name of a file, or also one of a folder
                raise ValueError(f"{archive}:{shown(path)} cannot be read ({shown(str(error))}); rename it") from error
        folders = sorted((path for path in (top, *top.rglob("*")) if path.is_dir()), key=lambda path: -len(path.parts))
        try:
            file = search_label_file(folders, "")
            return read_labels(file, images) if file else None
        except ValueError as error:
            raise ValueError(str(error).replace(f"{top}/", f"{archive}:").replace(str(top), str(archive))) from error
