"""Index the archives of a data set, and verify its images, in archives or folders.

    python -m tools.index PATH                 index, counts, sizes, class balance; decodes 1000 images of each split
    python -m tools.index PATH --full          decodes every image
    python -m tools.index PATH --split val --val-labels FILE

Exit status 0: no problems. 1: problems, listed at the end of each split. 2: the data set cannot be opened.
"""

import multiprocessing
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import NamedTuple

import numpy as np

from config.command_line import Parser
from data.loaders.brightness import darkness, is_dark, mean_level
from data.loaders.decode import UnreadableImageError
from data.loaders.image_source import ImageSource, load
from data.stores.archive_index import NoImagesError
from data.stores.archive_reader import ArchiveSource
from data.stores.folder import read_class_index
from data.stores.image_files import DEFECTS
from data.stores.layout import NoSplitError
from data.stores.names import lookalike_notes, number_gaps
from data.stores.split import ArchiveSplit, Split, file_sizes, open_split, same_place, single_class
from tools.progress import with_progress
from tools.terminal import Screen

SAMPLE = 1000  # images decoded of each split without --full
CHUNK = 32  # images per task of a process
NAMED = 20  # problems of one kind that are listed
_source: ImageSource | None = None  # image source of a decoding process


class Decoded(NamedTuple):
    """Result of decoding an image: the reason why it cannot be, or its mean level."""

    reason: str = ""
    level: float = 0.0
    dark: bool = False  # nearly black


@dataclass
class SplitSummary:
    """Counts and problems of a split."""

    split: str
    lines: list[tuple[str, str]] = field(default_factory=list)  # name and text
    problems: list[str] = field(default_factory=list)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = index_parser()
    args = parser.parse_args(argv)
    screen = Screen(soft_wrap=True)
    try:
        if args.sample < 0 or args.workers < 1:
            raise ValueError(f"--sample {args.sample} and --workers {args.workers} must be at least 0 and 1")
        stores = open_splits(args, screen)
        classes = read_class_index(args.class_index) if args.class_index else next(iter(stores.values())).classes()
        summaries = []
        if "train" in stores and (problem := single_class(stores["train"], classes)):
            raise ValueError(problem)
        same = same_place(stores["train"], stores["val"]) if len(stores) == 2 else []
        for split, store in stores.items():
            source = store.source(classes, must_hold_all=False)
            summary = describe(split, store, source, classes)
            summary.problems += same if split == "val" else []
            indices = np.arange(len(source)) if args.full else spread(len(source), args.sample)
            check(summary, source, indices, args.workers)
            print_summary(summary, screen)
            summaries.append(summary)
    except ValueError as error:
        parser.fail(error)
    except BrokenProcessPool:
        parser.fail(
            ValueError("a decoding process was ended, as for lack of memory: use fewer (--workers 1), or more memory")
        )
    count = sum(len(summary.problems) for summary in summaries)
    screen.print(f"{count} problems" if count else "no problems")
    return 1 if count else 0


def index_parser() -> Parser:
    """Return the parser of this command."""
    parser = Parser("Index a data set's archives, and verify its images.")
    parser.prog = "python -m tools.index"
    parser.add_argument("path", metavar="PATH", help="data set, as in DATA.PATH")
    parser.add_argument("--split", choices=("train", "val"), help="check only this split")
    parser.add_argument("--full", action="store_true", help="decode every image")
    parser.add_argument(
        "--sample", type=int, default=SAMPLE, metavar="N", help=f"otherwise decode N of each split ({SAMPLE})"
    )
    parser.add_argument("--val-labels", default="", metavar="FILE", help="as DATA.VAL_LABELS")
    parser.add_argument("--class-index", default="", metavar="FILE", help="as DATA.CLASS_INDEX")
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--workers", type=int, default=cores, metavar="N", help=f"processes that decode ({cores})")
    return parser


def open_splits(args: object, screen: Screen) -> dict[str, Split]:
    """Open the split asked for, or all that exist."""
    path, split, labels = (getattr(args, name) for name in ("path", "split", "val_labels"))
    found: dict[str, Split] = {}
    for name in [split] if split else ["train", "val"]:
        try:
            found[name] = open_split(path, name, labels if name == "val" else "", partial(screen.print, style="dim"))
        except (NoSplitError, NoImagesError) as error:  # NoImagesError: an archive with one split only
            if split or (name == "val" and not found):
                raise
            screen.print(f"{name}: {error}", style="dim")
    return found


def describe(split: str, store: Split, source: ImageSource, classes: Sequence[str]) -> SplitSummary:
    """Count images, classes and bytes of a split; note problems that show without reading an image."""
    summary = SplitSummary(split)
    lines, problems = summary.lines, summary.problems
    lines.append(("store", f"{store.name} ({store.kind})"))
    lines.extend(("note", remark) for remark in store.remarks)
    if isinstance(store, ArchiveSplit):
        lines.append(("index", str(store.index_file)))
        problems += store.index.metadata["problems"]
        duplicates = store.index.metadata["duplicates"]
        if duplicates:
            problems.append(
                f"{duplicates} images have the class and name of another: {', '.join(store.index.metadata['duplicate_names'][:5])}"
            )
    if store.passed.found:
        lines.append(("passed over", store.passed.text()))
        lost = store.passed.text(DEFECTS)
        problems += [f"images may be missing: {lost}"] if lost else []
    counts = np.bincount(source.labels, minlength=len(classes))
    held = counts[counts > 0]
    problems += lookalike_notes(store.name, [name for name, count in zip(classes, counts, strict=True) if count])
    lines.append(("images", f"{len(source)} of {len(held)} classes"))
    few, many = (int(i) for i in (counts.argmin(), counts.argmax()))
    lines.append(
        (
            "balance",
            f"{held.mean():.1f} a class; fewest {counts[few]} ({classes[few]}), most {counts[many]} ({classes[many]})",
        )
    )
    missing = [name for name, count in zip(classes, counts, strict=True) if not count]
    if missing and isinstance(store, ArchiveSplit) and store.numbers_are(classes):
        problems.append(number_gaps(store.name, np.flatnonzero(counts).tolist()))
    elif missing:
        problems.append(f"{len(missing)} of {len(classes)} classes have no image: {', '.join(missing[:5])}")
    sizes = file_sizes(source)
    lines.append(
        (
            "bytes",
            f"{sizes.sum() / 2**30:.2f} GiB; an image {sizes.mean() / 1000:.1f} kB, from {sizes.min()} to {sizes.max()}",
        )
    )
    empty = np.flatnonzero(sizes == 0)
    problems += [f"{source.name(int(i))} is empty" for i in empty[:NAMED]]
    problems += [f"{len(empty) - NAMED} more are empty"] if len(empty) > NAMED else []
    return summary


def spread(total: int, count: int) -> np.ndarray:
    """Return `count` indices spread evenly over 0 .. total - 1, each once; all of them if there are no more."""
    return np.unique(np.linspace(0, total - 1, min(total, count)).round().astype(np.int64))


def check(summary: SplitSummary, source: ImageSource, indices: np.ndarray, workers: int) -> None:
    """Decode images in several processes, and note those that cannot be decoded, and most of them being nearly black."""
    stored = indices
    if isinstance(source, ArchiveSource):  # in storage order
        rank = np.empty(len(source), dtype=np.int64)
        rank[source.storage_order()] = np.arange(len(source))
        stored = indices[np.argsort(rank[indices])]
    results = with_progress(
        decode_all(source, stored.tolist(), workers),
        len(stored),
        Screen(stderr=True, soft_wrap=True),
        title=f"decoding {summary.split}",
        done=f"decoded {{count}} of {{total}} images of {summary.split}",
        transient=True,
        fewest=10 * SAMPLE + 1,
    )
    decoded = list(results)
    found = [image.reason for image in decoded if image.reason]
    levels = [image.level for image in decoded if not image.reason]
    dark = [image.dark for image in decoded if not image.reason]
    share = "all" if len(indices) == len(source) else f"{len(indices)} of {len(source)}"
    summary.lines.append(("decoded", f"{share} images, {len(found)} unreadable"))
    if levels:
        summary.lines.append(("level", f"{np.mean(levels):.1f} of 255 on average; {sum(dark)} images are nearly black"))
    if warning := darkness(dark, summary.split):
        summary.problems.append(warning)
    summary.problems += found[:NAMED]
    if len(found) > NAMED:
        kinds = Counter(reason.split("(")[-1].split(";")[-1].split(")")[0].strip() for reason in found[NAMED:])
        summary.problems.append(
            f"{len(found) - NAMED} more are unreadable ({', '.join(f'{n} x {k}' for k, n in kinds.most_common(3))})"
        )


def decode_all(source: ImageSource, indices: list[int], workers: int) -> Iterator[Decoded]:
    """Decode images; yield the result of each."""
    chunks = (indices[start : start + CHUNK] for start in range(0, len(indices), CHUNK))
    if workers == 1 or len(indices) <= CHUNK:
        yield from (image for chunk in chunks for image in _check(chunk, source))
        return
    context = multiprocessing.get_context("fork")  # as the workers of the loaders
    with ProcessPoolExecutor(workers, context, initializer=_set_source, initargs=(source,)) as pool:
        pending = [pool.submit(_check, chunk) for chunk in islice(chunks, 4 * workers)]
        while pending:
            decoded = pending.pop(0).result()
            pending += [pool.submit(_check, chunk) for chunk in islice(chunks, 1)]
            yield from decoded


def _set_source(source: ImageSource) -> None:
    global _source
    _source = source


def _check(indices: list[int], source: ImageSource | None = None) -> list[Decoded]:
    """Decode images of a source (default: this process's); return the result of each."""
    source = source or _source
    assert source is not None
    decoded = []
    for index in indices:
        try:
            image = load(source, index)
            decoded.append(Decoded(level=mean_level(image), dark=is_dark(image)))
        except UnreadableImageError as error:
            decoded.append(Decoded(f"{error.name} {error.reason}"))
    return decoded


def print_summary(summary: SplitSummary, screen: Screen) -> None:
    """Print the counts of a split, then its problems."""
    screen.print(summary.split, style="bold")
    for name, text in summary.lines:
        screen.print(f"  {name:<11} {text}")
    for problem in summary.problems:
        screen.print(f"  problem     {problem}", style="red")


if __name__ == "__main__":
    sys.exit(main())
