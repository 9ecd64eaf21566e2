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
MAX_BYTES = 1 << 25  # of a file, and of all its unpacked variables; meta.mat has some 100 thousand
MAX_VALUES = 1_000_000  # numbers, texts and structs; meta.mat has 15 thousand
MAX_DEPTH = 8  # of structs and cells in each other


def read_mat(data: bytes) -> dict[str, Any]:
    """Return the variables of a MAT-file: structs and cells as flat lists, text as str, numbers as arrays.

    ValueError for any other type, and for a damaged file, one too large or with too many values.
    """
    if len(data) < HEADER or data[126:128] != b"IM" or not data.startswith(b"MATLAB 5.0"):
        raise ValueError("not a little-endian MAT-file of level 5")
    if len(data) > MAX_BYTES:
        raise ValueError(f"a MAT-file of {len(data)} bytes, more than {MAX_BYTES}")
    try:
        return _Reader().variables(data[HEADER:])
    except Exception as error:  # of a damaged file: in any offset, size, type or text
        raise ValueError(f"a damaged MAT-file ({shorten(error)})") from error


def synset_ids(data: bytes) -> dict[int, str]:
    """Return {ILSVRC2012_ID: WordNet id} of the classes, from the bytes of a meta.mat. ValueError for another file."""
    synsets = read_mat(data).get("synsets", [])
    try:
        leaves = [s for s in synsets if int(s["num_children"].item()) == 0]
        found = {int(s["ILSVRC2012_ID"].item()): str(s["WNID"]) for s in leaves}
    except Exception as error:  # of variables of any other type
        raise ValueError("its variable synsets lacks ILSVRC2012_ID, WNID or num_children") from error
    if not found:
        raise ValueError("no variable synsets in it")
    return found


class _Reader:
    """One reading of a MAT-file, which counts its values and unpacked bytes."""

    def __init__(self) -> None:
        self.values = self.unpacked = 0

    def variables(self, data: bytes) -> dict[str, Any]:
        """Return the variables by name."""
        return dict(self._variable(kind, body) for kind, body in self._elements(data))

    def _elements(self, data: bytes) -> list[tuple[int, bytes]]:
        found: list[tuple[int, bytes]] = []
        at = 0
        while at + 8 <= len(data):
            self.values += 1
            if self.values > MAX_VALUES:
                raise ValueError(f"more than {MAX_VALUES} values")
            kind, size = struct.unpack_from("<II", data, at)
            if kind >> 16:  # a small element: size and type in one word, the data in the next
                found.append((kind & 0xFFFF, data[at + 4 : at + 4 + min(4, kind >> 16)]))
                at += 8
                continue
            if at + 8 + size > len(data):
                raise ValueError(f"an element of {size} bytes ends behind the file")
            found.append((kind, data[at + 8 : at + 8 + size]))
            at += 8 + (size if kind == COMPRESSED else -(-size // 8) * 8)
        return found

    def _variable(self, kind: int, body: bytes) -> tuple[str, Any]:
        if kind == COMPRESSED:
            unpacking = zlib.decompressobj()
            plain = unpacking.decompress(body, MAX_BYTES - self.unpacked + 1)
            self.unpacked += len(plain)
            if self.unpacked > MAX_BYTES or not unpacking.eof:
                raise ValueError(f"its variables are cut off, or unpack to more than {MAX_BYTES} bytes")
            ((kind, body),) = self._elements(plain)
        if kind != MATRIX:
            raise ValueError(f"element type {kind} where a variable should begin")
        return self._matrix(body, 0)

    def _matrix(self, body: bytes, depth: int) -> tuple[str, Any]:
        """Return the name and value of a matrix element."""
        if not body:
            return "", np.zeros(0)
        if depth > MAX_DEPTH:
            raise ValueError(f"structs and cells more than {MAX_DEPTH} deep")
        parts = self._elements(body)
        form = parts[0][1][0]  # the class of the array, in the lowest byte of its flags
        shape = np.frombuffer(parts[1][1], dtype="<i4")
        name, rest = parts[2][1].decode("latin-1"), parts[3:]
        if form == STRUCT:
            return name, self._struct(rest, depth)
        if form == CELL:
            return name, [self._matrix(part, depth + 1)[1] for _, part in rest]
        kind, raw = rest[0] if rest else (9, b"")
        if form == CHAR:
            return name, raw.decode(TEXT[kind]) if kind in TEXT else "".join(map(chr, _numbers(kind, raw)))
        return name, _numbers(kind, raw).reshape(shape, order="F")

    def _struct(self, parts: list[tuple[int, bytes]], depth: int) -> list[dict[str, Any]]:
        width = int(np.frombuffer(parts[0][1], dtype="<i4")[0])
        text = parts[1][1]
        if width < 1 or len(text) > MAX_VALUES:
            raise ValueError(f"names of {width} bytes, {len(text)} in all")
        names = [text[i : i + width].split(b"\0")[0].decode() for i in range(0, len(text), width)]
        values = [self._matrix(part, depth + 1)[1] for _, part in parts[2:]]
        return [dict(zip(names, values[i : i + len(names)], strict=True)) for i in range(0, len(values), len(names))]


def _numbers(kind: int, raw: bytes) -> np.ndarray:
    return np.frombuffer(raw, dtype="<" + NUMBERS[kind])
