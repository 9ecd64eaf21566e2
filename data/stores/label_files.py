"""Label files: classes of validation images without class folders, as those of the official tar.

    per image   ILSVRC2012_val_00000001.JPEG n01751748    (also "mv FILE CLASS/", the lines of valprep.sh)
                ILSVRC2012_val_00000001.JPEG 65           0-based, classes sorted by name (Swin's val_map.txt, Caffe's val.txt)
                ILSVRC2012_val_00000001,n01751748 111 ... Kaggle's LOC_val_solution.csv
                val_0.JPEG n03444034 0 32 44 62           tiny-imagenet-200's val_annotations.txt
    by position n01751748                                 a line per image, in the order of their numbers
                490                                       ILSVRC2012_validation_ground_truth.txt of the development kit

The development kit's numbers are ILSVRC2012_IDs, whose order is not that of the sorted classes: they are translated with
the kit's meta.mat (or map_clsloc.txt), which is read from beside the file or from the kit's archive. Ambiguous files are
refused.
"""

import gzip
import io
import re
import tarfile
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from common.text import shorten
from data.stores.bounded_files import read_file
from data.stores.matlab import synset_ids
from data.stores.names import class_number, decode, read_text, remedy_of, shown, some

KEY = "DATA.VAL_LABELS"
GROUND_TRUTH = "ILSVRC2012_validation_ground_truth.txt"
KITS = ("ILSVRC2012_devkit_t12.tar.gz", "ILSVRC2012_devkit_t12")
KNOWN = (
    *KITS,
    GROUND_TRUTH,
    "LOC_val_solution.csv",
    "val_map.txt",
    "val.txt",
    "valprep.sh",
    "imagenet_2012_validation_synset_labels.txt",
    "val_annotations.txt",
)
ID_FILES = ("meta.mat", "map_clsloc.txt")
LABELS_REMEDY = (
    f"put the file that tells them there or into DATA.PATH ({', '.join((KITS[0], *KNOWN[2:]))}), name it with {KEY}, or "
    "move each image into a folder of its class"
)
MAX_LABELS, MAX_LINES, MAX_LINE = 1 << 28, 5_000_000, 1 << 16  # bytes, lines, and characters of one, in a label file
MAX_KIT = 1 << 26  # bytes of an unpacked development kit; ImageNet's has 3 million
Labels = dict[str, str] | dict[str, int]


def find_label_file(folder: Path, given: str) -> Path:
    """Return the file `given`, else the one with a known name in `folder`. ValueError for none, or more than one."""
    found = search_label_file([folder], given)
    if found is None:
        raise ValueError(
            f"the validation images of {folder} lie in no class folders and no file tells their classes; put "
            f"{KITS[0]} there, or another of {', '.join(KNOWN[2:])}, or name a file with {KEY}"
        )
    return found


def search_label_file(folders: Sequence[Path], given: str) -> Path | None:
    """Return the file `given`, else the one with a known name in the first folder that holds one; None for none.

    ValueError if a folder holds more than one.
    """
    if given:
        path = Path(given).expanduser()
        if not path.exists():
            raise ValueError(
                f"{KEY}={shorten(given)} does not exist; give a file that tells the class of each validation image"
            )
        return path
    for folder in folders:
        found = [folder / name for name in KNOWN if (folder / name).exists()]
        if len(found) == 2 and all(path.name in KITS for path in found):
            found = found[1:]  # the unpacked kit
        if len(found) > 1:
            names = ", ".join(path.name for path in found)
            raise ValueError(
                f"{folder} holds several files with the classes of validation images: {names}; name one with {KEY}"
            )
        if found:
            return found[0]
    return None


def inputs_of(path: Path) -> list[Path]:
    """Return the files that the labels of a label file depend on."""
    if path.is_dir():
        return sorted(p for p in path.rglob("*") if p.name in (GROUND_TRUTH, *ID_FILES))
    beside = [path.parent / name for name in ID_FILES] if path.name == GROUND_TRUTH else []
    return [path, *(p for p in beside if p.is_file())]


def read_labels(path: Path, images: Sequence[str]) -> Labels:
    """Read the name or the number of the class of each image, by its file name in `images`.

    ValueError if the file lacks one of them, or is ambiguous.
    """
    files = None
    if path.is_dir() or path.name == GROUND_TRUTH:
        files = {p.name: _read(p) for p in inputs_of(path)}
    if "".join(path.suffixes[-2:]) in (".tar.gz", ".tgz") or path.suffix in (".tgz", ".tar"):
        files = _unpacked(path)
    if files is not None:
        return _kit_labels(files, images, path)
    text = read_text(path, MAX_LABELS)
    if text.count("\n") > MAX_LINES:
        raise ValueError(f"{path} has more than {MAX_LINES} lines; is it the right file?")
    lines = text.splitlines()
    if (longest := max(map(len, lines), default=0)) > MAX_LINE:
        raise ValueError(f"{path} has a line of {longest} characters, more than {MAX_LINE}; is it the right file?")
    rows = [fields for line in lines if (fields := _fields(line))]
    if rows and all(len(row) == 1 for row in rows):
        values = [row[0] for row in rows]
        if all(value.isdecimal() for value in values):
            raise ValueError(
                f"{path} holds a number a line, which could be ILSVRC2012_IDs (1 .. 1000, not in the order of the sorted classes) or "
                f"0-based labels; name it {GROUND_TRUTH} and put meta.mat beside it, or give a file with an image name a line"
            )
        return _by_position(values, images, path)
    return _per_image(rows, images, path)


def _fields(line: str) -> list[str]:
    """Split a line into image and class, or class alone; into nothing for a heading or a command that makes folders."""
    fields = line.replace(",", " ").split()
    if not fields or fields[0].startswith("#") or fields[0] in ("ImageId", "mkdir", "wget", "rm"):
        return []
    if fields[0] == "mv":
        return [fields[1], fields[2].rstrip("/")] if len(fields) == 3 else []
    if len(fields) >= 6 and len(fields) % 5 == 1:  # Kaggle: for each box, a class and four numbers
        return [fields[0], *dict.fromkeys(fields[1::5])]
    return fields


def _per_image(rows: list[list[str]], images: Sequence[str], path: Path) -> Labels:
    """Return the class of each image from lines with image and class."""
    if path.suffix == ".csv" and rows and _stem(rows[0][0]) not in {_stem(image) for image in images}:
        rows = rows[1:]  # a heading
    odd = next((row for row in rows if len(row) != 2), None)
    if odd or not rows:
        raise ValueError(
            f"{path} is not understood{f' ({shown(str(odd[:4]))})' if odd else ', it is empty'}; expected lines: IMAGE CLASS"
        )
    table: dict[str, str] = {}
    for name, value in rows:
        stem = _stem(name)
        if table.setdefault(stem, value) != value:
            raise ValueError(
                f"{path} gives {shown(name)} two classes, {shown(table[stem])} and {shown(value)}; correct it"
            )
    missing = [image for image in images if _stem(image) not in table]
    if missing:
        raise ValueError(
            f"{path} has no class for {len(missing)} of {len(images)} images: {some(missing)}; is it the right file?"
        )
    found = {image: table[_stem(image)] for image in images}
    numbers = {value for value in table.values() if value.isdecimal()}
    if not numbers:
        return found
    if len(numbers) < len(set(table.values())):
        raise ValueError(f"{path} mixes numbers and names of classes; use one of them")
    found_numbers = [_number(value, path) for value in numbers]
    if min(found_numbers) == 1 and max(found_numbers) == len(numbers):
        raise ValueError(
            f"{path} numbers the classes 1 .. {len(numbers)}: these could be ILSVRC2012_IDs, which are not in the order of the sorted "
            "classes; give a file with class names, or 0-based numbers of the sorted classes"
        )
    return {image: int(value) for image, value in found.items()}


def _number(value: str, path: Path) -> int:
    try:
        return class_number(value)
    except ValueError as error:
        raise ValueError(f"{path} is not understood: {error}; is it the right file?") from error


def _by_position(values: Sequence[str], images: Sequence[str], path: Path) -> dict[str, str]:
    """Return the class of each image from one class for each, in the order of the images' numbers."""
    if len(values) != len(images):
        raise ValueError(f"{path} has {len(values)} lines for {len(images)} images; is it the right file?")
    ordered = sorted(images)
    numbers = [re.search(r"(\d+)$", _stem(image)) for image in ordered]
    if [int(n.group()) if n else 0 for n in numbers] != list(range(1, len(images) + 1)):
        raise ValueError(
            f"{path} tells classes by position, but the images are not numbered 1 .. {len(images)} ({ordered[0]}, ...); "
            "give a file with an image name a line"
        )
    return dict(zip(ordered, values, strict=True))


def _kit_labels(files: dict[str, bytes], images: Sequence[str], path: Path) -> dict[str, str]:
    """Return the class of each image from the development kit's files, by name."""
    if GROUND_TRUTH not in files:
        raise ValueError(f"{path} holds no {GROUND_TRUTH}; give the development kit of ILSVRC2012, tasks 1 and 2")
    if "meta.mat" in files:
        try:
            names = synset_ids(files["meta.mat"])
        except ValueError as error:
            raise ValueError(f"meta.mat of {path} cannot be read: {error}; copy it again") from error
    elif "map_clsloc.txt" in files:
        names = _table(files["map_clsloc.txt"], path)
    else:
        raise ValueError(
            f"{path} numbers classes by ILSVRC2012_ID, which is not the order of the sorted classes; put meta.mat of the "
            f"development kit (data/meta.mat in {KITS[0]}) beside it"
        )
    ids = [_number(decode(value), path) for value in files[GROUND_TRUTH].split()]
    unknown = sorted(set(ids) - set(names))
    if unknown:
        raise ValueError(f"{path} has ILSVRC2012_IDs that its table lacks: {unknown[:5]}; use both files of one kit")
    return _by_position([names[i] for i in ids], images, path)


def _table(data: bytes, path: Path) -> dict[int, str]:
    """Return {ILSVRC2012_ID: WordNet id} from the bytes of a map_clsloc.txt."""
    names: dict[int, str] = {}
    for line in decode(data).splitlines():
        match line.split():
            case [wnid, number, *_]:
                names[_number(number, path)] = wnid
            case [_, *_]:
                raise ValueError(f"map_clsloc.txt of {path} is not understood ({shown(line)}); copy it again")
    return names


def _read(path: Path, limit: int = MAX_LABELS) -> bytes:
    try:
        return read_file(path, limit)
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror or error}); {remedy_of(error)}") from error


def _unpacked(kit: Path) -> dict[str, bytes]:
    """Read the label files of a development kit's archive, by name: a tar, or one compressed by gzip."""
    found: dict[str, bytes] = {}
    data = _read(kit, MAX_KIT)
    try:
        if data.startswith(b"\x1f\x8b"):
            with gzip.GzipFile(fileobj=io.BytesIO(data)) as unpacked:
                data = unpacked.read(MAX_KIT + 1)
            if len(data) > MAX_KIT:
                raise ValueError(f"it unpacks to more than {MAX_KIT:,} bytes")
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
            before = -1
            while (info := tar.next()) is not None and tar.offset > before:
                before = tar.offset
                name = PurePosixPath(info.name).name
                if name in (GROUND_TRUTH, *ID_FILES) and info.isreg() and not info.issparse():
                    found[name] = data[info.offset_data : info.offset_data + info.size]
    except Exception as error:  # tarfile and zlib raise many kinds of errors for damaged files
        raise ValueError(f"{kit} cannot be read ({shown(str(error))}); copy it again") from error
    return found


def _stem(name: str) -> str:
    return PurePosixPath(name).name.partition(".")[0]
