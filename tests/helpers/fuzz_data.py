"""Seeds and readers of data files for tests/helpers/fuzz.py."""

import gzip
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from data.loaders.decode import UnreadableImageError, decode
from data.loaders.jpeg_header import frame_header, lengthen_scans
from data.stores.archive_members import list_archive
from data.stores.class_labels import class_names
from data.stores.folder import read_class_index
from data.stores.index_file import load_index
from data.stores.label_files import GROUND_TRUTH, read_labels
from data.stores.layout import SplitLocation, parse_label
from data.stores.matlab import synset_ids
from data.stores.real_labels import read_real_labels
from data.stores.split import open_split
from tests.helpers.archives import write_tar
from tests.helpers.damaged_images import JPEG, READABLE, RGB, encoded
from tests.helpers.fuzz import Seed, Target
from tests.helpers.hostile_images import HOSTILE, WHOLE, rotated
from tests.helpers.hostile_stores import LABELS, MAT_HEADER, MATS, TARS, TWO, ZIP, ZIPS, element, kit

Parser = Callable[[bytes], object]


def as_array(data: bytes) -> np.ndarray:
    return np.frombuffer(bytearray(data), dtype=np.uint8)


def in_file(name: str, parse: Callable[[Path], object]) -> Parser:
    """Return a parser of bytes by way of a file of that name."""
    folder = Path(tempfile.mkdtemp())

    def run(data: bytes) -> object:
        (folder / name).write_bytes(data)
        return parse(folder / name)

    return run


def index_seed() -> tuple[list[bytes], Parser]:
    """Return the file of an index, and its parser, which must return an index within its archives, or None."""
    root = Path(tempfile.mkdtemp())
    write_tar(root / "train.tar", [(f"{c}/{i}.jpg", JPEG) for c in ("cat", "dog") for i in range(5)])
    file = open_split(root, "train", progress=lambda text: None).index_file
    location, length = SplitLocation("train", root, None, (root / "train.tar",)), (root / "train.tar").stat().st_size
    seed, changed = file.read_bytes(), root / "changed.npz"

    def run(data: bytes) -> None:
        changed.write_bytes(data)
        index = load_index(changed, location)
        if index is not None:
            assert index.offset.min() >= 0
            assert (index.offset + index.size).max() <= length
            assert all(index.path(i) is not None for i in range(len(index)))

    return [seed], run


def check_archive(path: Path) -> None:
    """List an archive; its members must lie in it."""
    length = path.stat().st_size
    assert all(m.offset >= 0 and m.size >= 0 and m.offset + m.size <= length for m in list_archive(path).members)


def labels(images: Sequence[str], name: str) -> Parser:
    return in_file(name, lambda path: read_labels(path, images))


def unpacked(data: bytes) -> bytes:
    return gzip.decompress(data)


def registry() -> dict[str, tuple[list[bytes], Parser]]:
    """Return seeds and parser by name."""
    pictures = [JPEG, *WHOLE.values(), *(data for data in HOSTILE.values() if len(data) < 30000)]
    jpegs = [JPEG, READABLE["progressive"], READABLE["cmyk"], encoded(RGB, "JPEG", exif=rotated())]
    kits = [
        gzip.decompress(data) for name, (_, data) in LABELS.items() if name.startswith("meta.mat") and len(data) < 9000
    ]
    truth = kit(truth=b"1\n2\n", meta_mat=MAT_HEADER + element(14, b"\0" * 16))
    lists = [
        b'{"0": ["n01440764", "tench"], "1": ["n01443537", "fish"]}',
        b'["a", "b"]',
        b'{"cat": 0, "dog": 1}',
        b"cat\ndog\n",
        b"[[0], [1, 2], []]",
    ]
    lines = [
        b"0.jpg cat\n1.jpg dog\n",
        b"0.jpg 0\n1.jpg 1\n",
        b"cat\ndog\n",
        b"ImageId,x\n0,cat 1 2 3 4\n1,dog 1 2 3 4\n",
    ]
    return {
        "jpeg": (jpegs, lambda data: (frame_header(as_array(data)), lengthen_scans(as_array(data)))),
        "picture": (pictures, lambda data: decode(as_array(data), "x")),
        "tar": ([TWO, *(data for data in TARS.values() if 512 < len(data) < 30000)], in_file("a.tar", check_archive)),
        "zip": ([ZIP, *(data for data in ZIPS.values() if 99 < len(data) < 30000)], in_file("a.zip", check_archive)),
        "index": index_seed(),
        "mat": ([data for data in MATS.values() if len(data) < 30000], synset_ids),
        "classes": (lists, in_file("a.json", lambda path: class_names([], str(read_class_index(path) and path), 0))),
        "real": (
            lists,
            in_file(
                "a.json", lambda path: read_real_labels(str(path), ["ILSVRC2012_val_00000001.JPEG"], ["n01440764"])
            ),
        ),
        "labels": (lines, labels(["0.jpg", "1.jpg"], "val.txt")),
        "truth": ([b"1\n2\n"], labels(["0.jpg", "1.jpg"], GROUND_TRUTH)),
        "kit": ([unpacked(truth), *kits], labels(["0.jpg", "1.jpg"], "kit.tar")),
        "shard": (
            [b"7", b"cat", b'{"label": 7}', b'{"cls": "cat"}'],
            lambda data: parse_label(data, "a.json", "shard"),
        ),
    }


def data_targets() -> dict[str, Target]:
    """Return the readers by name; those of bytes cannot name a file."""
    return {
        name: Target(
            lambda seeds=seeds: [Seed(data) for data in seeds],
            lambda path, parse=parse: parse(path.read_bytes()),
            names_file=False,
            errors=(ValueError, UnreadableImageError),
        )
        for name, (seeds, parse) in registry().items()
    }
