"""Read the meta.mat of ImageNet's development kit: a MAT-file of level 5 with structs of numbers and text."""

import struct
import zlib
from typing import Any

import numpy as np

from common.text import shorten

HEADER = 128
COMPRESSED, MATRIX = 15, 14
NUMBERS = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}
TEXT = {16: "utf-8", 17: "utf-16-le", 18: "utf-32-le"}
CELL, STRUCT, CHAR = 1, 2, 4


def read_mat(data: bytes) -> dict[str, Any]:
    """Return the variables of a MAT-file: structs and cells as flat lists, text as str, numbers as arrays.

    ValueError for any other type, and for a damaged file.
    """
    if len(data) < HEADER or data[126:128] != b"IM" or not data.startswith(b"MATLAB 5.0"):
        raise ValueError("not a little-endian MAT-file of level 5")
    try:
        return dict(_variable(kind, body) for kind, body in _elements(data[HEADER:]))
    except (struct.error, zlib.error, KeyError, IndexError, UnicodeDecodeError) as error:
        raise ValueError(f"a damaged MAT-file ({shorten(error)})") from error


def synset_ids(data: bytes) -> dict[int, str]:
    """Return {ILSVRC2012_ID: WordNet id} of the classes, from the bytes of a meta.mat."""
    synsets = read_mat(data).get("synsets", [])
    leaves = (s for s in synsets if int(s["num_children"].item()) == 0)
    found = {int(s["ILSVRC2012_ID"].item()): str(s["WNID"]) for s in leaves}
    if not found:
        raise ValueError("no variable synsets in it")
    return found


def _elements(data: bytes) -> list[tuple[int, bytes]]:
    found: list[tuple[int, bytes]] = []
    at = 0
    while at + 8 <= len(data):
        kind, size = struct.unpack_from("<II", data, at)
        if kind >> 16:  # a small element: size and type in one word, the data in the next
            found.append((kind & 0xFFFF, data[at + 4 : at + 4 + (kind >> 16)]))
            at += 8
            continue
        if at + 8 + size > len(data):
            raise IndexError(f"an element of {size} bytes ends behind the file")
        found.append((kind, data[at + 8 : at + 8 + size]))
        at += 8 + (size if kind == COMPRESSED else -(-size // 8) * 8)
    return found


def _variable(kind: int, body: bytes) -> tuple[str, Any]:
    if kind == COMPRESSED:
        ((kind, body),) = _elements(zlib.decompress(body))
    if kind != MATRIX:
        raise ValueError(f"element type {kind} where a variable should begin")
    return _matrix(body)


def _matrix(body: bytes) -> tuple[str, Any]:
    """Return the name and value of a matrix element."""
    if not body:
        return "", np.zeros(0)
    parts = _elements(body)
    form = parts[0][1][0]  # the class of the array, in the lowest byte of its flags
    shape = np.frombuffer(parts[1][1], dtype="<i4")
    name, rest = parts[2][1].decode("latin-1"), parts[3:]
    if form == STRUCT:
        width = int(np.frombuffer(rest[0][1], dtype="<i4")[0])
        names = [rest[1][1][i : i + width].split(b"\0")[0].decode() for i in range(0, len(rest[1][1]), width)]
        values = [_matrix(part)[1] for _, part in rest[2:]]
        return name, [
            dict(zip(names, values[i : i + len(names)], strict=True)) for i in range(0, len(values), len(names))
        ]
    if form == CELL:
        return name, [_matrix(part)[1] for _, part in rest]
    kind, raw = rest[0] if rest else (9, b"")
    if form == CHAR:
        return name, raw.decode(TEXT[kind]) if kind in TEXT else "".join(map(chr, _numbers(kind, raw)))
    return name, _numbers(kind, raw).reshape(shape, order="F")


def _numbers(kind: int, raw: bytes) -> np.ndarray:
    return np.frombuffer(raw, dtype="<" + NUMBERS[kind])
