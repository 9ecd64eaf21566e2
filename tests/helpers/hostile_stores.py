"""Archives, indexes, MAT-files and lists made to end, to stop or to fill the process that reads them, none over 100 kB."""

import gzip
import io
import json
import os
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from tests.helpers.archives import write_tar
from tests.helpers.damaged_images import JPEG

ZEROS = zlib.compress(bytes(64 << 20))
KIT, TRUTH = "ILSVRC2012_devkit_t12.tar.gz", "ILSVRC2012_validation_ground_truth.txt"


def tar_bytes(*infos: tarfile.TarInfo, form: int = tarfile.PAX_FORMAT, data: bytes = JPEG) -> bytes:
    """Return a tar of members that all hold `data`."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
        for info in infos:
            info.size = len(data) if info.isreg() else 0
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def info(name: str, kind: bytes = tarfile.REGTYPE, link: str = "", **pax: str) -> tarfile.TarInfo:
    found = tarfile.TarInfo(name)
    found.type, found.linkname, found.pax_headers = kind, link, pax
    return found


def patched(tar: bytes, at: int, size: bytes) -> bytes:
    """Return a tar with another size (12 bytes) in the header at a byte, and its checksum corrected."""
    header = bytearray(tar[at : at + 512])
    header[124:136] = size
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return tar[:at] + bytes(header) + tar[at + 512 :]


def base256(number: int) -> bytes:
    return (b"\xff" if number < 0 else b"\x80") + number.to_bytes(11, "big", signed=True)


def long_names(count: int) -> bytes:
    """Return a tar of headers of GNU tar's long names, each before another."""
    header = tarfile.TarInfo("././@LongLink")
    header.type, header.size = tarfile.GNUTYPE_LONGNAME, 400
    return (header.tobuf(tarfile.GNU_FORMAT) + b"a" * 399 + bytes(113)) * count


TWO = tar_bytes(info("cat/a.jpg"), info("dog/b.jpg"))
TARS = {
    "negative size": patched(TWO, 0, base256(-1024)),
    "very negative size": patched(TWO, 0, base256(-(2**63))),
    "size of 2**63": patched(TWO, 0, base256(2**63)),
    "size of 2**80": patched(TWO, 0, base256(2**80)),
    "size of 2**62": patched(TWO, 0, base256(2**62)),
    "size that is text": patched(TWO, 0, b"not a number"),
    "negative size in pax": tar_bytes(info("cat/a.jpg", size="-512"), info("dog/b.jpg")),
    "size of 2**64 in pax": tar_bytes(info("cat/a.jpg", size=str(2**64)), info("dog/b.jpg")),
    "size in pax that is text": tar_bytes(info("cat/a.jpg", size="junk"), info("dog/b.jpg")),
    "digits in pax": tar_bytes(info("cat/a.jpg", mtime="9" * 5000, size="9" * 5000)),
    "junk in pax": tar_bytes(info("cat/a.jpg", comment="\x1b[2J\n")).replace(b"comment=", b"=\0\xff\xfe\xfd\0==", 1),
    "long records in pax": tar_bytes(info("cat/a.jpg", comment="x" * 60000), info("dog/b.jpg")),
    "sparse map in pax": tar_bytes(info("cat/a.jpg", **{"GNU.sparse.map": "0,1,junk", "GNU.sparse.size": "9"})),
    "sparse 1.0 in pax": tar_bytes(
        info("cat/a.jpg", **{"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "9"})
    ),
    "sparse of old GNU": TWO[:156] + b"S" + TWO[157:],
    "long names in a row": long_names(97),
    "link to a file outside": tar_bytes(info("cat/a.jpg", tarfile.SYMTYPE, "/etc/passwd"), info("dog/b.jpg")),
    "hard link outside": tar_bytes(info("cat/a.jpg", tarfile.LNKTYPE, "../../../etc/passwd"), info("dog/b.jpg")),
    "pipe": tar_bytes(info("cat/a.jpg", tarfile.FIFOTYPE), info("dog/b.jpg", tarfile.CHRTYPE)),
    "garbage": np.random.RandomState(0).bytes(20000),
    "empty": b"",
    "half a header": TWO[:300],
    "zeros": bytes(99_840),
}


def zip_bytes(**members: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in members.items():
            archive.writestr(name.replace("__", "/").replace("_jpg", ".jpg"), data)
    return buffer.getvalue()


ZIP = zip_bytes(cat__a_jpg=JPEG, dog__b_jpg=JPEG[:-2] + b"\xff\xff\xd9")
ENTRY = ZIP.index(b"PK\x01\x02")


def field(at: int, data: bytes) -> bytes:
    """Return the zip with other bytes in its first directory entry."""
    return ZIP[: ENTRY + at] + data + ZIP[ENTRY + at + len(data) :]


def zip_of_one_place() -> bytes:
    """Return a zip whose directory names one piece of it a thousand times."""
    first = ZIP[ENTRY : ZIP.index(b"PK\x01\x02", ENTRY + 4)]
    directory = b"".join(first.replace(b"cat/a.jpg", b"cat/%05d" % i) for i in range(1000))
    end = struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, 1000, 1000, len(directory), ENTRY, 0)
    return ZIP[:ENTRY] + directory + end


def zip64(size: int) -> bytes:
    """Return a zip whose first file has a size of 64 bits."""
    name = b"cat/a.jpg"
    extra = struct.pack("<HHQQ", 1, 16, size, size)
    entry = struct.pack(
        "<4s6H3I5H2I", b"PK\x01\x02", 45, 45, 0, 0, 0, 0, 0, 2**32 - 1, 2**32 - 1, len(name), len(extra), 0, 0, 0, 0, 0
    )
    directory = entry + name + extra
    return ZIP[:ENTRY] + directory + struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, 1, 1, len(directory), ENTRY, 0)


ZIPS = {
    "size of 2**32 - 2": field(20, struct.pack("<II", 2**32 - 2, 2**32 - 2)),
    "size of 2**63": zip64(2**63),
    "size of 2**64 - 1": zip64(2**64 - 1),
    "offset outside": field(42, struct.pack("<I", 2**31)),
    "two sizes": field(20, struct.pack("<II", 10, 2**31)),
    "one place a thousand times": zip_of_one_place(),
    "compressed": field(10, struct.pack("<H", 8)),
    "version of the future": field(6, struct.pack("<H", 9999)),
    "unknown method": field(10, struct.pack("<H", 77)),
    "long comment": ZIP[:-2] + b"\xff\xff" + b"x" * 65535,
    "directory of 4 GB": ZIP[:-10] + struct.pack("<I", 2**32 - 2) + ZIP[-6:],
    "garbage": b"PK\x03\x04" + np.random.RandomState(0).bytes(9999),
    "empty": b"",
}


def npz(**arrays: object) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def npy(header: str, data: bytes = b"") -> bytes:
    """Return a .npy file with a header of any text."""
    text = header.encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + data


def rezipped(data: bytes, method: int = zipfile.ZIP_STORED, **members: bytes) -> bytes:
    """Return a .npz with other members."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(buffer, "w", method) as new:
        for name in old.namelist():
            new.writestr(name, members.get(name.removesuffix(".npy"), old.read(name)))
    return buffer.getvalue()


def index_changes(data: bytes) -> dict[str, bytes]:
    """Return hostile variants of the file of an index."""
    with np.load(io.BytesIO(data)) as found:
        arrays = dict(found)
    facts = json.loads(arrays.pop("facts").tobytes())

    def own(text: str = "", metadata: object = None, **changed: object) -> bytes:
        own_facts = facts | metadata if isinstance(metadata, dict) else facts if metadata is None else metadata
        encoded = np.frombuffer((text or json.dumps(own_facts)).encode(), dtype=np.uint8)
        return npz(facts=encoded, **{**arrays, **changed})

    count = len(arrays["offset"])
    shape = "{'descr': '<i8', 'fortran_order': False, 'shape': (%s), }"
    changes = {
        "shape of 2**60": rezipped(data, offset=npy(shape % "1152921504606846976,")),
        "negative shape": rezipped(data, offset=npy(shape % "-1,")),
        "header that is no literal": rezipped(data, offset=npy("__import__('os').system('touch evil')")),
        "deep header": rezipped(data, offset=npy("(" * 100 + ")" * 100)),
        "pickled objects": rezipped(
            data, names=npy("{'descr': '|O', 'fortran_order': False, 'shape': (1,), }", b"cos\n")
        ),
        "compressed zeros": rezipped(data, zipfile.ZIP_DEFLATED, names=npy(shape % "8388608,", bytes(8 << 20))),
        "an array more": npz(facts=arrays["names"], more=arrays["names"], **arrays),
        "an array less": npz(facts=arrays["names"]),
        "metadata that is a list": own(metadata=[1, 2]),
        "metadata that is null": own("null"),
        "deep metadata": own("[" * 90000),
        "infinite metadata": own(metadata={"duplicates": float("inf")}),
        "no classes": own(metadata={"classes": [], "numbered": False}),
        "fewer classes": own(metadata={"classes": facts["classes"][:1]}),
        "classes that are numbers": own(metadata={"classes": [1, 2, 3]}),
        "two classes of a name": own(metadata={"classes": [facts["classes"][0]] * len(facts["classes"])}),
        "problems that are a text": own(metadata={"problems": "abc"}),
        "unknown reason": own(metadata={"passed_over": {"\x1b[2J": [1, ["a"]]}}),
        "reason without a count": own(metadata={"passed_over": {"files that are no images": 3}}),
        "label file with a zero": own(metadata={"label_inputs": ["a\0b"]}),
        "label file that is a number": own(metadata={"label_inputs": [7]}),
        "duplicates without names": own(metadata={"duplicates": 3}),
        "another format": own(metadata={"inputs": [99]}),
        "no inputs": own(metadata={"inputs": []}),
    }
    wrong = {
        "archive": [-1, 5],
        "offset": [-1, 2**62, 2**63 - 1],
        "size": [-1, 2**62, 2**40],
        "label": [-1, 900, 2**31 - 1],
        "ends": [-1, 2**62],
    }
    for name, values in wrong.items():
        for value in values:
            array = arrays[name].copy()
            array[count // 2] = value
            changes[f"{name} of {value}"] = own(**{name: array})
        changes[f"{name} of floats"] = own(**{name: arrays[name].astype(np.float64)})
        changes[f"{name} too short"] = own(**{name: arrays[name][:-1]})
        changes[f"{name} of two dimensions"] = own(**{name: arrays[name].reshape(1, -1)})
    changes["no images"] = own(**{name: array[:0] for name, array in arrays.items()})
    return changes


def element(kind: int, data: bytes) -> bytes:
    return struct.pack("<II", kind, len(data)) + data + bytes(-len(data) % 8)


MAT_HEADER = b"MATLAB 5.0 MAT-file".ljust(124) + b"\x00\x01IM"


def nested(levels: int) -> bytes:
    """Return a MAT-file of cells in each other."""
    body = b""
    for _ in range(levels):
        body = element(
            14, element(6, struct.pack("<II", 1, 0)) + element(5, struct.pack("<ii", 1, 1)) + element(1, b"") + body
        )
    return MAT_HEADER + body


MATS = {
    "64 MB in 64 kB": MAT_HEADER + struct.pack("<II", 15, len(ZEROS)) + ZEROS,
    "cells in cells": nested(900),
    "empty elements": MAT_HEADER + bytes(96_000),
    "element behind the end": MAT_HEADER + struct.pack("<II", 14, 2**32 - 1),
    "names of width 0": MAT_HEADER
    + element(
        14,
        element(6, struct.pack("<II", 2, 0))
        + element(5, bytes(8))
        + element(1, b"synsets")
        + element(5, bytes(4))
        + element(1, b"a"),
    ),
    "synsets of one number": MAT_HEADER
    + element(
        14,
        element(6, struct.pack("<II", 6, 0))
        + element(5, struct.pack("<ii", 1, 1))
        + element(1, b"synsets")
        + element(9, bytes(8)),
    ),
    "shape of 2**62": MAT_HEADER
    + element(
        14,
        element(6, struct.pack("<II", 6, 0))
        + element(5, struct.pack("<ii", 2**31 - 1, 2**31 - 1))
        + element(1, b"synsets")
        + element(9, bytes(8)),
    ),
    "garbage": MAT_HEADER + np.random.RandomState(0).bytes(9000),
    "header only": MAT_HEADER,
}


def kit(**files: bytes) -> bytes:
    """Return a compressed development kit with the given files, dots in their names written as _."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, data in files.items():
            own = tarfile.TarInfo(
                f"ILSVRC2012_devkit_t12/data/{TRUTH if name == 'truth' else name.replace('_mat', '.mat')}"
            )
            own.size = len(data)
            tar.addfile(own, io.BytesIO(data))
    return buffer.getvalue()


LABELS: dict[str, tuple[str, bytes]] = {  # name of the label file, and its bytes
    "kit of gigabytes": (KIT, gzip.compress(bytes(96 << 20))),
    "kit with a file of gigabytes": (
        KIT,
        gzip.compress(patched(TWO.replace(b"cat/a.jpg", b"meta.mat\0"), 0, base256(2**40))),
    ),
    "kit of garbage": (KIT, b"\x1f\x8b" + bytes(900)),
    "kit with a negative size": (KIT, gzip.compress(TARS["negative size"])),
    "ground truth of text": (KIT, kit(truth=b"one\ntwo\n", meta_mat=MAT_HEADER)),
    "ground truth of digits": (TRUTH, b"9" * 60000),
    "one long line": ("val.txt", b"a " * 45000),
    "zeros": ("val.txt", bytes(999)),
    "numbers of many digits": ("val.txt", b"".join(b"%d.jpg %s\n" % (i, b"9" * 5000) for i in range(4))),
    "large numbers": ("val.txt", b"".join(b"%d.jpg %d\n" % (i, 10**9 + i) for i in range(4))),
    "escapes": ("val.txt", b"\x1b[2J 1 2 3\n"),
    **{f"meta.mat: {name}": (KIT, kit(truth=b"1\n2\n", meta_mat=data)) for name, data in MATS.items()},
}
CLASS_LISTS: dict[str, bytes] = {
    "deep": b"[" * 90000,
    "deep objects": b'{"a":' * 15000 + b"1" + b"}" * 15000,
    "lists as names": b'{"0": [["a"]], "1": [["b"]]}',
    "numbers as names": b'{"0": [5], "1": "x"}',
    "null": b"[null]",
    "digits": b'{"' + b"9" * 5000 + b'": "a"}',
    "large index": b'{"a": 0, "b": 1e400}',
    "empty lists": b'{"0": [], "1": []}',
    "one name many times": b"cat\n" * 25000,
    "not a number": b'{"a": NaN}',
    "infinite": b'{"a": Infinity}',
    "a long name twice": (b"x" * 45000 + b"\n") * 2,
    "control characters": b'["\\u001b[2J", "\\u001b[2J"]',
}


NO_FILES: dict[str, Callable[[Path], object]] = {  # each makes what is no file at a path
    "pipe": os.mkfifo,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "socket": lambda path: os.mknod(path, stat.S_IFSOCK | 0o600),
    "folder": lambda path: path.mkdir(),
    "huge and sparse": lambda path: (path.touch(), os.truncate(path, 1 << 42)),
}


def flat_val(root: Path) -> Path:
    """Write a val.tar of images without classes, and a train.tar with two; return the root."""
    write_tar(root / "train.tar", [(f"{name}/{i}.jpg", JPEG) for name in ("cat", "dog") for i in range(3)])
    write_tar(root / "val.tar", [(f"{i}.jpg", JPEG) for i in range(2)])
    return root
