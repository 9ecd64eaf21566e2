"""Unreadable training images: their replacement, their list in the run directory, and the limit on their number.

An unreadable image is replaced by the next readable one in index order, whatever the number of workers and processes.
Workers report replacements to the main process in `Batch.bad`.
"""

import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar

from common.regular_files import check_kind, read_regular, regular
from data.loaders.batch import BadImage, Batch
from data.loaders.decode import UnreadableImageError

T = TypeVar("T")
NEIGHBOURS = 100  # images tried after an unreadable one before the run is ended
LIST_FILE = "bad_images.jsonl"
MOST_BYTES = 64 * 2**20  # of the list


class TooManyBadImagesError(UnreadableImageError):
    """More files cannot be read than DATA.MAX_BAD_SHARE allows."""


def read_or_replace(
    index: int, count: int, load: Callable[[int], T], name: Callable[[int], str]
) -> tuple[T, int, list[BadImage]]:
    """Load an image or its replacement; return (result of `load`, index loaded, BadImage if it was replaced).

    `load` raises UnreadableImageError; then index + 1, index + 2, ... (modulo `count`) are tried, NEIGHBOURS of them.
    """
    try:
        return load(index), index, []
    except UnreadableImageError as error:
        first = error
    for step in range(1, min(count, NEIGHBOURS + 1)):
        other = (index + step) % count
        try:
            loaded = load(other)
        except UnreadableImageError:
            continue
        return loaded, other, [BadImage(name(index), first.reason, name(other), index, other)]
    raise UnreadableImageError(
        name(index),
        f"{first.reason}, and neither can the {min(count - 1, NEIGHBOURS)} images after it be read",
        "see whether the storage is still there",
    )


class BadImages:
    """Unreadable images of a run: those found by all processes, and those that this process has not reported yet.

    More than `max_share` of `images`, rounded up, are too many: with 0 the first one is, with 0.001 the second of up to
    1000 images and the 1283rd of ImageNet. Each file counts once in the lifetime of a process.
    """

    def __init__(self, images: int, max_share: float) -> None:
        self.images, self.max_share = images, max_share
        self.allowed = math.ceil(max_share * images)
        self.known: dict[str, BadImage] = {}
        self._new: dict[str, BadImage] = {}

    def watch(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Yield the batches and record the images that were replaced in them."""
        for batch in batches:
            for bad in batch.bad:
                if bad.path not in self.known:
                    self._new[bad.path] = bad
            yield batch

    def take_new(self) -> list[BadImage]:
        """Return the bad images that this process found since the last call."""
        found, self._new = list(self._new.values()), {}
        return found

    def add(
        self,
        found: Iterable[Iterable[BadImage]],
        folder: Path | None = None,
        warn: Callable[[str], None] = lambda text: None,
    ) -> list[BadImage]:
        """Count bad images, one iterable for each process, and list them in the run directory; return the new ones.

        Raises TooManyBadImagesError after the list is written. `warn` is called if it cannot be written.
        """
        added = {bad.path: bad for own in found for bad in own if bad.path not in self.known}
        self.known |= added
        if folder is not None and added:
            try:
                _append(folder / LIST_FILE, added.values())
            except OSError as error:
                warn(f"{folder / LIST_FILE} cannot be written ({error.strerror})")
            except ValueError as error:  # a link, a pipe or a huge file
                warn(f"the list of unreadable images cannot be written: {error}")
        if len(self.known) > self.allowed:
            listed = f"; {folder / LIST_FILE} lists them" if folder else ""
            bad = next(iter(added.values()), None) or next(iter(self.known.values()))
            raise TooManyBadImagesError(
                bad.path,
                f"{bad.reason}; with it {len(self.known)} of {self.images} training images cannot be read, "
                f"DATA.MAX_BAD_SHARE={self.max_share:g} allows {self.allowed}{listed}",
                "restore the files (python -m tools.index PATH --full checks them all), or raise DATA.MAX_BAD_SHARE",
            )
        return list(added.values())


def _append(path: Path, bad_images: Iterable[BadImage]) -> None:
    """Append a row for each file without one; start a new line after a row that a crash cut off."""
    text = read_regular(path, MOST_BYTES).decode("utf-8", "surrogateescape") if check_kind(path) else ""
    listed = set()
    for line in text.split("\n"):
        try:
            listed.add(json.loads(line)["path"])
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
    rows = "".join(json.dumps(asdict(bad)) + "\n" for bad in bad_images if bad.path not in listed)
    with open(path, "a", encoding="utf-8", errors="surrogateescape", opener=regular) as file:
        file.write("\n" + rows if text and not text.endswith("\n") else rows)
