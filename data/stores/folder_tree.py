"""Listing of folders: entries by kind, images below a folder, broken links, circles of links, errors of the system.

All functions raise ValueError, with the path and the remedy, where the system refuses or a link leads nowhere.
"""

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from data.stores.bounded_files import open_file
from data.stores.image_files import HEAD, IMAGE, SPECIAL, SUFFIXES, PassedOver, ignored, kind_of_file
from data.stores.names import from_system, remedy_of, shown, some

LINKS_NAMED = 3  # broken links listed in an error


@contextmanager
def system_errors(path: str | Path) -> Iterator[None]:
    """Raise ValueError instead of OSError; it names the error's file, or `path`, and the remedy."""
    try:
        yield
    except OSError as error:
        file = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else str(path)
        verb, remedy = "read", remedy_of(error)
        if error.errno == errno.ELOOP:
            remedy = "its links lead in a circle: remove one of them"
        elif error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            verb, remedy = "written", "make room there, or set XDG_CACHE_HOME to another disk"
        raise ValueError(f"{shown(file)} cannot be {verb} ({error.strerror or error}); {remedy}") from error


@dataclass
class BrokenLinks:
    """Links that lead nowhere: their number and examples."""

    count: int = 0
    examples: list[str] = field(default_factory=list)

    def add(self, path: str) -> None:
        """Count a link."""
        self.count += 1
        self.examples = sorted([*self.examples, f"{shown(path)} -> {shown(link_target(path))}"])[:LINKS_NAMED]

    def merge(self, other: "BrokenLinks") -> None:
        """Add the links of another."""
        self.count += other.count
        self.examples = sorted([*self.examples, *other.examples])[:LINKS_NAMED]

    def refuse(self, folder: Path) -> None:
        """Raise ValueError if there are any."""
        if self.count:
            more = f" and {self.count - len(self.examples)} more" if self.count > len(self.examples) else ""
            links = "1 link that leads" if self.count == 1 else f"{self.count} links that lead"
            raise ValueError(
                f"{folder} holds {links} nowhere: {', '.join(self.examples)}{more}; mount the disk they lead to, or delete "
                f"them (find {folder} -xtype l lists them)"
            )


@dataclass
class Entries:
    """Contents of a folder without system files and hidden ones, names sorted."""

    folders: list[str] = field(default_factory=list)
    images: list[str] = field(default_factory=list)
    others: list[tuple[str, str]] = field(default_factory=list)  # files that are no images, and their kind
    links: set[str] = field(default_factory=set)  # those of the folders that are links
    passed: PassedOver = field(default_factory=PassedOver)  # without the others
    broken: BrokenLinks = field(default_factory=BrokenLinks)


def link_target(path: str | Path) -> str:
    """Return the target of a link as it is written there."""
    try:
        return os.readlink(path)  # noqa: PTH115  of a str
    except OSError:
        return "?"


def check_link(path: Path) -> None:
    """Raise ValueError if a path is a link that leads nowhere."""
    if path.is_symlink() and not path.exists():
        raise ValueError(
            f"{path} is a link to {shown(link_target(path))}, which does not exist or leads back to it; mount the disk it "
            "leads to, or correct the link"
        )


def list_folder(folder: Path) -> Entries:
    """List a folder itself. ValueError for links in it that lead nowhere."""
    with system_errors(folder):
        found = _list(folder, "")
    found.broken.refuse(folder)
    return found


def list_images(folder: Path, name: str) -> tuple[list[str], PassedOver, BrokenLinks]:
    """List the images below folder/name, relative to `folder`: sorted by folder, then by file name as torchvision does.

    With "" as the name, those below the folder itself. ValueError for a link to a folder that holds the link.
    """
    found: dict[str, list[str]] = {}
    passed, broken = PassedOver(), BrokenLinks()
    with system_errors(folder / name):
        pending = [(name, _trail(folder / name, ()))]
        while pending:
            inner, trail = pending.pop()
            prefix = f"{inner}/" if inner else ""
            entries = _list(folder / inner, prefix)
            found[inner] = entries.images
            for file, kind in entries.others:
                passed.add(kind, from_system(prefix + file))
            passed.merge(entries.passed)
            broken.merge(entries.broken)
            for below in entries.folders:
                own = _trail(folder / inner / below, trail) if below in entries.links else trail
                pending.append((prefix + below, own))
    return [f"{inner}/{file}" if inner else file for inner in sorted(found) for file in found[inner]], passed, broken


def _list(folder: Path, prefix: str) -> Entries:
    """List a folder; special files are counted under their name after `prefix`."""
    found = Entries()
    with os.scandir(folder) as entries:
        for entry in entries:
            lowered = entry.name.lower()
            if lowered.endswith(SUFFIXES) and lowered[0] != "." and entry.is_file(follow_symlinks=False):
                found.images.append(entry.name)  # nearly all files, without a call more than necessary
            elif reason := ignored(lowered):
                found.passed.add(reason, from_system(entry.name))
            elif _leads_to(entry.is_dir):
                found.folders.append(entry.name)
                if entry.is_symlink():
                    found.links.add(entry.name)
            elif not _leads_to(entry.is_file):
                if entry.is_symlink() and not os.path.exists(entry.path):  # noqa: PTH110  of a str
                    found.broken.add(entry.path)
                else:
                    found.passed.add(SPECIAL, from_system(prefix + entry.name))
            elif (kind := kind_of_file(lowered, partial(_head, entry.path))) == IMAGE:
                found.images.append(entry.name)
            else:
                found.others.append((entry.name, kind))
    found.folders.sort()
    found.images.sort()
    return found


def _leads_to(kind: Callable[[], bool]) -> bool:
    """Return kind(); False for a link in a circle, which leads nowhere."""
    try:
        return kind()
    except OSError as error:
        if error.errno == errno.ELOOP:
            return False
        raise


def _trail(path: Path, trail: tuple[str, ...]) -> tuple[str, ...]:
    """Return the real folders of the links on the way to a folder, if it is a link its own included; ValueError for a circle."""
    if not path.is_symlink():
        return trail
    target, places = os.path.realpath(path), (*trail, os.path.realpath(path.parent))
    if any(place == target or place.startswith(target.rstrip("/") + "/") for place in places):
        raise ValueError(
            f"{path} is a link to {shown(link_target(path))}, a folder that holds it: a circle; remove the link"
        )
    return places


def _head(path: str) -> bytes:
    fd = open_file(path)
    try:
        return os.read(fd, HEAD)
    finally:
        os.close(fd)


def listing(folder: Path) -> str:
    """Return the names in a folder, the first few, for a message."""
    try:
        with os.scandir(folder) as entries:
            names = sorted(entry.name + "/" * _leads_to(entry.is_dir) for entry in entries)
    except OSError as error:
        return f"names that cannot be listed ({error.strerror})"
    return some(names) if names else "nothing"
