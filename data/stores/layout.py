"""Locations of the splits of DATA.PATH, and layouts of images in archives: no other module decides either.

A split is searched in this order; ROOT is DATA.PATH, and val may be called validation:

    ROOT/<split>/                          class folders, or archives of any kind below
    ROOT/<split>.tar  ROOT/<split>.zip  ROOT/ILSVRC2012_img_<split>.tar
    ROOT/<name>-<split>-000000.tar ...     shards
    ROOT itself: a tar or zip with <split>/ in it

Archives hold one of four layouts:

    shards     KEY.jpg beside KEY.cls or KEY.json: the class's number or name (WebDataset)
    folders    <class>/<file>
    tars       <class>.tar with its files: in a folder, or inside a tar as in ILSVRC2012_img_train.tar
    flat       files only, with their classes in another file (label_files.py), as for ILSVRC2012_img_val.tar
"""

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

from common.text import shorten
from data.stores.archive_members import COMPRESSED, TAR, ZIP, Member
from data.stores.folder import split_folder
from data.stores.folder_tree import check_link, list_folder, listing, system_errors
from data.stores.image_files import HEAD, IMAGE, OTHER, PassedOver, ignored, kind_of_file
from data.stores.label_files import ID_FILES, KNOWN
from data.stores.names import class_number, decode_text, parse_json, shown

SPLIT_NAMES = {"train": ("train",), "val": ("val", "validation")}
JSON_KEYS = ("label", "cls", "class", "target", "wnid")
LABEL_SUFFIXES = (".cls", ".json")
LABEL_BYTES = 1 << 20  # at most so much of a label file is read
SHARD_STEM = re.compile(r"(.*[-_.])\d+|\d{4,}")
EXPECTED = (
    "train/<class>/<image> and val/<class>/<image>; train.tar or train.zip, also as folders of tars; "
    "ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar; or shards such as imagenet-train-000000.tar"
)


class NoSplitError(ValueError):
    """Error of a DATA.PATH without a folder or archive for the split."""


@dataclass(frozen=True)
class SplitLocation:
    """Location of a split: a folder of class folders, or archives."""

    split: str
    root: Path  # DATA.PATH
    folder: Path | None  # of class folders
    archives: tuple[Path, ...] = ()
    notes: tuple[str, ...] = ()  # archives beside the folder that are not read

    @property
    def inside(self) -> bool:
        """Return True if DATA.PATH itself is the archive, and its members below <split>/ are the split."""
        return self.archives == (self.root,)

    @property
    def index_folder(self) -> Path:
        """Folder of the archives, in which their index and label files lie."""
        return self.root.parent if self.inside else self.root

    @property
    def name(self) -> str:
        """Name of the location in messages."""
        if self.folder:
            return str(self.folder)
        return str(self.archives[0]) + (f" and {len(self.archives) - 1} more" if len(self.archives) > 1 else "")


class Sample(NamedTuple):
    """An image in an archive."""

    label: str | int | None  # name or number of its class, None if unknown
    path: str  # relative to the split folder; sorts the images of a class
    member: Member


def find_split(root: str | Path, split: str) -> SplitLocation:
    """Find a split below DATA.PATH. NoSplitError if there is none, ValueError if there are several candidates."""
    with system_errors(root):
        return _find(root, split)


def _find(root: str | Path, split: str) -> SplitLocation:
    if not str(root):
        split_folder(root, split)  # raises: not set
    root = Path(root).expanduser()
    check_link(root)
    if root.is_file():
        if not _is_archive(root.name):
            raise ValueError(f"DATA.PATH={shorten(str(root))} is a file but no {TAR} or {ZIP}; {_remedy(root.name)}")
        return SplitLocation(split, root, None, (root,))
    if not root.is_dir():
        split_folder(root, split)  # raises: no folder
    names = sorted(entry.name for entry in os.scandir(root) if not ignored(entry.name.lower()))
    beside = [group for group in _groups(names, split) if group]
    for folder in (root / name for name in SPLIT_NAMES[split]):
        check_link(folder)
        if not folder.is_dir():
            continue
        inner, folders = _archives_in(folder)
        if inner and folders:
            raise ValueError(
                f"{folder} holds archives ({inner[0].name}, ...) and folders ({folders[0]}/, ...); which are the images? "
                "Move one kind away"
            )
        notes = [f"{folder} is read; {' '.join(group[:2])} beside it is not" for group in beside]
        return SplitLocation(split, root, None if inner else folder, inner, tuple(notes))
    if len(beside) > 1:
        kinds = ", ".join(group[0] for group in beside)
        raise ValueError(f"DATA.PATH={shorten(str(root))} holds {split} more than once: {kinds}; move all but one away")
    if beside:
        return SplitLocation(split, root, None, tuple(root / name for name in beside[0]))
    raise NoSplitError(_nothing_found(root, split, names))


def _archives_in(folder: Path) -> tuple[tuple[Path, ...], list[str]]:
    """Return the archives in a folder, and the names of the folders in it if there are any archives."""
    names = sorted(entry.name for entry in os.scandir(folder) if not ignored(entry.name.lower()))
    archives = tuple(folder / name for name in names if _is_archive(name) and not (folder / name).is_dir())
    return archives, list_folder(folder).folders if archives else []


def has_split(root: str | Path, split: str) -> bool:
    """Return True if DATA.PATH is a folder that holds the split, or an archive, which may hold it.

    ValueError if there are several candidates.
    """
    try:
        find_split(root, split)
    except NoSplitError:
        return False
    return True


def _groups(names: Sequence[str], split: str) -> list[list[str]]:
    """Return the names of archives of a split among `names`, a list for each naming pattern."""
    words = "|".join(SPLIT_NAMES[split])
    patterns = [
        rf"({words})\.tar",
        rf"({words})\.zip",
        rf"ILSVRC2012_img_{split}\.tar",
        rf"(.+[-_.])?({words})[-_.]\d+.*\.tar",
    ]
    return [[name for name in names if re.fullmatch(pattern, name)] for pattern in patterns]


def _nothing_found(root: Path, split: str, names: Sequence[str]) -> str:
    """Return the message of NoSplitError."""
    packed = [name for name in names if name.lower().endswith(COMPRESSED) and split in name]
    if packed:
        return f"DATA.PATH={shorten(str(root))} holds {packed[0]}; {_remedy(packed[0])}"
    try:
        split_folder(root, split)
    except ValueError as error:
        if "did you mean" in str(error):
            return str(error)
        if "give the folder" not in str(error):
            raise  # a folder that cannot be read
        return f"{error}, or archives: expected one of {EXPECTED} (docs/data.md)"
    return f"DATA.PATH={shorten(str(root))} holds {listing(root)}; expected one of {EXPECTED} (docs/data.md)"


def _remedy(name: str) -> str:
    if name.lower().endswith(COMPRESSED):
        return (
            "unpack the compression (gunzip, unxz, ...), images are read from a tar in place; the tar itself may stay"
        )
    return f"expected a folder or an archive with one of {EXPECTED}"


def _is_archive(name: str) -> bool:
    return name.lower().endswith((TAR, ZIP))


def of_split(members: Sequence[Member], split: str, inside: bool, passed: PassedOver) -> list[tuple[str, Member]]:
    """Return (path relative to the split folder, member) of a split's members without system files and hidden ones.

    A leading <split>/ is removed; with `inside`, members without it belong to no split and are left out. System files and
    hidden ones are counted in `passed`.
    """
    found: list[tuple[str, Member]] = []
    for member in members:
        parts = [part for part in member.path.split("/") if part not in ("", ".")]
        if hidden := next(((part, reason) for part in parts if (reason := ignored(part.lower()))), None):
            passed.add(hidden[1], hidden[0])
            continue
        at = next((i for i, part in enumerate(parts[:-1]) if part in SPLIT_NAMES[split]), None) if inside else None
        if inside and at is None:
            continue
        if not inside and len(parts) > 1 and parts[0] in SPLIT_NAMES[split]:
            at = 0
        found.append(("/".join(parts[0 if at is None else at + 1 :]), member))
    return found


def images_of(
    entries: Sequence[tuple[str, Member]], read: Callable[[Member, int], bytes], passed: PassedOver
) -> list[tuple[str, Member]]:
    """Return those of an archive's members that are images; the others, but for labels and tars, are counted in `passed`.

    `read` returns the first bytes of a member; it is called for rare suffixes only.
    """
    images: list[tuple[str, Member]] = []
    others: list[str] = []
    for path, member in entries:
        lowered = path.lower()
        kind = kind_of_file(lowered, partial(read, member, HEAD))
        if kind == IMAGE:
            images.append((path, member))
        elif kind != OTHER:
            passed.add(kind, path)
        elif not lowered.endswith(TAR):
            others.append(path)
    keys = {_key(path) for path, _ in images}
    for path in others:
        known = path.rpartition("/")[2] in (*KNOWN, *ID_FILES)  # label files, as in a folder
        if not known and not (path.lower().endswith(LABEL_SUFFIXES) and _key(path) in keys):
            passed.add(OTHER, path)
    return images


def shard_labels(
    entries: Sequence[tuple[str, Member]], images: Sequence[tuple[str, Member]], name: str
) -> dict[str, Member]:
    """Return the label members of a shard by the key of their image; .cls comes before .json.

    ValueError if two samples share a key.
    """
    keys = {_key(path) for path, _ in images}
    found: dict[str, Member] = {}
    for suffix in reversed(LABEL_SUFFIXES):
        own: dict[str, Member] = {}
        for path, member in entries:
            if (
                path.lower().endswith(suffix)
                and (key := _key(path)) in keys
                and own.setdefault(key, member) is not member
            ):
                raise ValueError(
                    f"{name} holds {path} twice; the samples of a shard must have keys of their own: write it again"
                )
        found |= own
    return found


def parse_label(data: bytes, member: str, name: str) -> str | int:
    """Return the number or name of the class in a shard's .cls or .json. ValueError if it holds neither."""
    text = decode_text(data, f"{name}: {member}").strip()
    value: object = text
    if member.lower().endswith(".json"):
        try:
            tree = parse_json(text)
        except ValueError as error:
            raise ValueError(f"{name}: {member} is no JSON ({shown(str(error))}); write the shard again") from error
        value = next((tree[key] for key in JSON_KEYS if key in tree), None) if isinstance(tree, dict) else tree
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        raise ValueError(
            f"{name}: {member} tells no class; it must be a number or a name, in JSON under one of {', '.join(JSON_KEYS)}"
        )
    try:
        return class_number(value) if isinstance(value, int) or re.fullmatch(r"\d+", value) else value
    except ValueError as error:
        raise ValueError(f"{name}: {member} tells no class: {error}; write the shard again") from error


def samples_of(images: Sequence[tuple[str, Member]], labels: dict[str, str | int], name: str) -> list[Sample]:
    """Return an archive's images with the classes of shard labels or folders. ValueError if only some images have one."""
    if labels:
        bare = [path for path, _ in images if _key(path) not in labels]
        if bare:
            raise ValueError(
                f"{name} has labels for {len(labels)} of {len(images)} images; {bare[0]} has none: write it again"
            )
        return [Sample(labels[_key(path)], path, member) for path, member in images]
    deep = [path for path, _ in images if "/" in path]
    if deep and len(deep) < len(images):
        flat = next(path for path, _ in images if "/" not in path)
        raise ValueError(f"{name} holds images in folders ({deep[0]}) and beside them ({flat}); which tells the class?")
    return [Sample(path.split("/")[0] if deep else None, path, member) for path, member in images]


def without_shared_folder(samples: list[Sample]) -> list[Sample]:
    """Remove leading folders that all images of a split share, as long as there are class folders below them."""
    while samples and len({sample.path.split("/")[0] for sample in samples}) == 1:
        if any(sample.path.count("/") < 2 for sample in samples):
            break
        rest = [sample.path.split("/", 1)[1] for sample in samples]
        samples = [Sample(path.split("/")[0], path, one.member) for path, one in zip(rest, samples, strict=True)]
    return samples


def refuse_shard_names(stems: Sequence[str], name: str) -> None:
    """Raise ValueError if tars without labels are all named like shards, not after classes."""
    matches = [SHARD_STEM.fullmatch(stem) for stem in stems]
    if all(matches) and len({match.group(1) for match in matches if match}) == 1:
        raise ValueError(
            f"{name} holds images without labels (no KEY.cls, KEY.json or <class>/ folders) and is named like a shard; "
            "write shards with labels, or name each tar after its class"
        )


def _key(path: str) -> str:
    """Return the key of a shard's member: its path up to the first dot of the file name."""
    folder, slash, file = path.rpartition("/")
    return folder + slash + file.partition(".")[0]
