"""File of an archive index, in NumPy's .npz: written without pickles, and checked as a whole when it is read.

Whatever is wrong with a file (its format, a length, an offset outside the archives, a class without a name) makes it unusable,
and it is built again; nothing else may depend on a file that lies beside data of others.
"""

import io
import json
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data.stores.bounded_files import read_file
from data.stores.image_files import SINGULAR
from data.stores.layout import SplitLocation
from data.stores.names import MAX_CLASSES, decode, parse_json

FORMAT = 3  # increased when the contents of an index, or the way it is built, change
ARRAYS = {"archive": "<i4", "offset": "<i8", "size": "<i8", "label": "<i4", "names": "|u1", "ends": "<i8"}
METADATA = "facts"  # name of the metadata's array
MAX_METADATA = 1 << 26  # bytes
KEYS = {
    "kind": str,
    "problems": list,
    "passed_over": dict,
    "label_inputs": list,
    "inputs": list,
    "classes": list | None,
    "numbered": bool,
    "duplicates": int,
    "duplicate_names": list,
}


@dataclass(frozen=True)
class ArchiveIndex:
    """Locations of a split's images in its archives, sorted by class, folder and file name as torchvision sorts a folder."""

    metadata: dict[str, Any]  # kind, classes (None if they are numbers), problems, passed over, duplicates, inputs
    archive: np.ndarray  # int32 (n,)
    offset: np.ndarray  # int64 (n,)
    size: np.ndarray  # int64 (n,)
    label: np.ndarray  # int32 (n,), into the classes
    names: np.ndarray  # uint8, the concatenated paths in the archives
    ends: np.ndarray  # int64 (n,), the end of each path in names

    def __len__(self) -> int:
        return len(self.offset)

    def path(self, index: int) -> str:
        """Return the path of an image in its archive."""
        start = int(self.ends[index - 1]) if index else 0
        return decode(self.names[start : int(self.ends[index])].tobytes())


def save_index(index: ArchiveIndex, file: Path) -> None:
    """Write an index."""
    arrays: dict[str, Any] = {name: getattr(index, name) for name in ARRAYS}
    arrays[METADATA] = np.frombuffer(json.dumps(index.metadata).encode(), dtype=np.uint8)
    with file.open("wb") as stream:
        np.savez(stream, **arrays)


def load_index(file: Path, location: SplitLocation) -> ArchiveIndex | None:
    """Read an index of the archives of a split; None if it is missing, damaged, of another format or of other archives."""
    try:
        lengths = [path.stat().st_size for path in location.archives]
        data = read_file(file, MAX_METADATA + sum(lengths))  # an image takes more in an archive than in the index
        index = _parse(data)
        _check_metadata(index)
        _check_arrays(index, np.array(lengths, dtype=np.int64))
    except Exception:  # NumPy, zipfile and JSON raise many kinds of errors
        return None
    return index


def _parse(data: bytes) -> ArchiveIndex:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        infos = archive.infolist()
        names = sorted(info.filename for info in infos)
        stored = all(
            info.compress_type == zipfile.ZIP_STORED and info.compress_size == info.file_size for info in infos
        )
        if names != sorted(f"{name}.npy" for name in (METADATA, *ARRAYS)) or not stored:
            raise ValueError("other arrays than those of an index, or compressed ones")
        if sum(info.file_size for info in infos) > len(data):
            raise ValueError("arrays that overlap")
        found = {name: _array(archive.read(f"{name}.npy")) for name in (METADATA, *ARRAYS)}
    metadata = parse_json(found.pop(METADATA).tobytes().decode())
    if not isinstance(metadata, dict) or any(array.dtype.str != ARRAYS[name] for name, array in found.items()):
        raise ValueError("other types than those of an index")
    return ArchiveIndex(metadata=metadata, **found)


def _array(data: bytes) -> np.ndarray:
    """Return the array of a .npy file of one dimension, without allocating more than the file has."""
    stream = io.BytesIO(data)
    if np.lib.format.read_magic(stream) != (1, 0):
        raise ValueError("another version of .npy")
    shape, fortran, kind = np.lib.format.read_array_header_1_0(stream)
    if len(shape) != 1 or fortran or kind.hasobject or shape[0] * kind.itemsize != len(data) - stream.tell():
        raise ValueError(f"an array of shape {shape} in {len(data)} bytes")
    return np.frombuffer(bytearray(data[stream.tell() :]), dtype=kind)


def _check_metadata(index: ArchiveIndex) -> None:
    """Raise ValueError, or any other error, for metadata that `_sorted` would not have written."""
    own = index.metadata
    if set(own) != set(KEYS) or not all(isinstance(own[key], kind) for key, kind in KEYS.items()):
        raise ValueError("other metadata than those of an index")
    texts = [own["kind"], *own["problems"], *own["label_inputs"], *own["duplicate_names"], *(own["classes"] or ())]
    passed = own["passed_over"]
    texts += [name for _, names in passed.values() for name in names]
    if not all(isinstance(text, str) and "\0" not in text for text in texts):
        raise ValueError("a text that is none")
    if not all(kind in SINGULAR and type(count) is int and count >= 0 for kind, (count, _) in passed.items()):
        raise ValueError("a count that is none")
    if own["inputs"][0] != FORMAT or own["duplicates"] < len(own["duplicate_names"]) or own["duplicates"] < 0:
        raise ValueError("another format")
    if own["duplicates"] and not own["duplicate_names"]:
        raise ValueError("duplicates without a name")
    if own["classes"] is not None and len(set(own["classes"])) < len(own["classes"]):
        raise ValueError("two classes of one name")
    if not (own["classes"] or own["numbered"]):
        raise ValueError("neither names nor numbers of classes")


def _check_arrays(index: ArchiveIndex, lengths: np.ndarray) -> None:
    """Raise ValueError for images outside the archives, whose lengths in bytes are int64 (archives,), and for odd labels."""
    count = len(index.offset)
    if not count or any(len(getattr(index, name)) != count for name in ("archive", "size", "label", "ends")):
        raise ValueError("arrays of different lengths")
    classes = len(index.metadata["classes"] or ()) or MAX_CLASSES
    if index.archive.min() < 0 or index.archive.max() >= len(lengths) or min(index.offset.min(), index.size.min()) < 0:
        raise ValueError("an image in no archive")
    if (index.size > lengths[index.archive]).any() or (index.offset > lengths[index.archive] - index.size).any():
        raise ValueError("an image that goes on behind its archive")
    if index.label.min() < 0 or index.label.max() >= classes or (np.diff(index.label) < 0).any():
        raise ValueError("an image of no class")
    if index.ends[0] < 0 or (np.diff(index.ends) < 0).any() or index.ends[-1] != len(index.names):
        raise ValueError("an image without a name")
