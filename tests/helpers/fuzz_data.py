"""Mutate small data files and hand them to the parsers of data/, which may raise the error of their kind only, and soon.

python -m tests.helpers.fuzz_data NAME --seconds 300 --seed 0
"""

import argparse
import gzip
import io
import os
import resource
import sys
import tempfile
import time
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
from tests.helpers.hostile_images import HOSTILE, WHOLE, rotated
from tests.helpers.hostile_stores import LABELS, MAT_HEADER, MATS, TARS, TWO, ZIP, ZIPS, element, kit

SLOW, MEMORY = 10.0, 4 << 30  # seconds of processor time for a file, bytes of memory for all
NUMBERS = [0, 1, 2, 0x7F, 0x80, 0xFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 2**63 - 1, 2**63, 2**64 - 1]
Parser = Callable[[bytes], object]


def as_array(data: bytes) -> np.ndarray:
    return np.frombuffer(bytearray(data), dtype=np.uint8)


def mutated(rng: np.random.RandomState, seeds: Sequence[bytes]) -> bytes:
    """Return a seed with a few changes: bytes, numbers, pieces removed, repeated or taken from another seed."""
    data = bytearray(seeds[rng.randint(len(seeds))])
    for _ in range(1 + rng.geometric(0.4)):
        at, end = sorted(rng.randint(len(data) + 1, size=2).tolist()) if data else (0, 0)
        end = min(end, at + 600)
        match rng.randint(7):
            case 0:
                data[at : at + 1] = bytes([rng.randint(256)])
            case 1:
                width = int(rng.choice([1, 2, 4, 8]))
                number = NUMBERS[rng.randint(len(NUMBERS))] % 2 ** (8 * width)
                data[at : at + width] = number.to_bytes(width, "little" if rng.randint(2) else "big")
            case 2:
                del data[at:end]
            case 3:
                data[at:at] = data[at:end] * int(rng.choice([1, 2, 30]))
            case 4:
                other = seeds[rng.randint(len(seeds))]
                data[at:end] = other[at:end]
            case 5:
                data[at:at] = rng.bytes(int(rng.randint(1, 40)))
            case 6:
                del data[at:]
    return bytes(data[:100_000])


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


def fuzz(name: str, seconds: float, seed: int) -> int:
    """Parse changed files for some time; return their number. Raises an error, and writes the file, for a finding."""
    seeds, parse = registry()[name]
    rng, count, end = np.random.RandomState(seed), 0, time.monotonic() + seconds
    while time.monotonic() < end:
        data, before = mutated(rng, seeds), time.process_time()
        try:
            parse(data)
        except (ValueError, UnreadableImageError) as error:
            raised = error.__traceback__
            while raised and raised.tb_next:
                raised = raised.tb_next
            own = raised is not None and "/data/" in raised.tb_frame.f_code.co_filename
            finding = "" if own and len(str(error)) < 3000 else repr(error)
        except Exception as error:
            finding = repr(error)
        else:
            finding = ""
        took = time.process_time() - before
        if finding or took > SLOW:
            file = Path(f"fuzz_{name}.bin")
            file.write_bytes(data)
            raise AssertionError(f"{name}, file {count} of seed {seed}, in {file}: {finding or f'{took:.1f} s'}")
        count += 1
    return count


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="parsers (all)")
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * os.sysconf("SC_PAGE_SIZE") + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    sys.stdout = io.TextIOWrapper(sys.stdout.buffer, line_buffering=True)
    for name in args.names or registry():
        print(f"{name}: {fuzz(name, args.seconds, args.seed)} files")
    return 0


if __name__ == "__main__":
    sys.exit(main())
