"""Images that cannot be read: training takes a neighbour instead, the run lists them, and too many end it.

The neighbour is a function of the index alone (the next image that can be read), so that any number of workers and
processes trains on the same. What a worker replaced travels in its batch's `bad` to the main process.
"""

import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from data.loaders.decode import UnreadableImageError

if TYPE_CHECKING:
    from data.loaders.batch import Batch

T = TypeVar("T")
NEIGHBOURS = 100  # images tried after an unreadable one; if none of them can be read, something else is wrong
LIST = "bad_images.jsonl"


@dataclass(frozen=True)
class BadImage:
    """A file that could not be read, and the image that was taken instead."""

    path: str
    reason: str
    replaced_by: str
    index: int
    replaced_by_index: int


class TooManyBadImagesError(UnreadableImageError):
    """More files cannot be read than DATA.MAX_BAD_SHARE allows."""


def read_or_replace(
    index: int, count: int, load: Callable[[int], T], name: Callable[[int], str]
) -> tuple[T, int, list[BadImage]]:
    """Return (what `load` gives, the index that was loaded, the image that was replaced if one was).

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
    """The bad images of a run so far: which are new to this process, how many all processes found, and their list.

    More than `max_share` of `images`, rounded up, are too many: with 0 the first one is, with 0.001 the second of up to
    1000 images and the 1283rd of ImageNet's. Each file counts once, from the start of the process on.
    """

    def __init__(self, images: int, max_share: float) -> None:
        self.images, self.max_share = images, max_share
        self.allowed = math.ceil(max_share * images)
        self.known: dict[str, BadImage] = {}
        self._new: dict[str, BadImage] = {}

    def watch(self, batches: "Iterable[Batch]") -> "Iterator[Batch]":
        """Yield the batches, noting what was replaced in them."""
        for batch in batches:
            for bad in batch.bad:
                if bad.path not in self.known:
                    self._new[bad.path] = bad
            yield batch

    def take_new(self) -> list[BadImage]:
        """Return what this process found since the last call."""
        found, self._new = list(self._new.values()), {}
        return found

    def add(
        self,
        found: Iterable[Iterable[BadImage]],
        folder: Path | None = None,
        warn: Callable[[str], None] = lambda text: None,
    ) -> list[BadImage]:
        """Count what the processes found, each its own, and list it in the run directory; return what is new.

        Raises TooManyBadImagesError, after the list is written; gets a `warn`ing if it cannot be.
        """
        added = {bad.path: bad for own in found for bad in own if bad.path not in self.known}
        self.known |= added
        if folder is not None and added:
            try:
                _append(folder / LIST, added.values())
            except OSError as error:
                warn(f"{folder / LIST} cannot be written ({error.strerror})")
        if len(self.known) > self.allowed:
            where = f"; {folder / LIST} lists them" if folder else ""
            bad = next(iter(added.values()), None) or next(iter(self.known.values()))
            raise TooManyBadImagesError(
                bad.path,
                f"{bad.reason}; with it {len(self.known)} of {self.images} training images cannot be read, "
                f"DATA.MAX_BAD_SHARE={self.max_share:g} allows {self.allowed}{where}",
                "restore the files (python -m tools.index PATH --full checks them all), or raise DATA.MAX_BAD_SHARE",
            )
        return list(added.values())


def _append(path: Path, found: Iterable[BadImage]) -> None:
    """Add rows for files that have none yet; a row cut off by a crash is ended."""
    text = path.read_text() if path.exists() else ""
    listed = set()
    for line in text.splitlines():
        try:
            listed.add(json.loads(line)["path"])
        except (ValueError, KeyError, TypeError):
            continue
    rows = "".join(json.dumps(asdict(bad)) + "\n" for bad in found if bad.path not in listed)
    with path.open("a") as file:
        file.write("\n" + rows if text and not text.endswith("\n") else rows)
