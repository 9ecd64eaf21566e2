"""Limits on image files, checked before they are decoded: bytes, pixels, metadata, and whether the data can hold the pixels.

A file of a few kilobytes can state billions of pixels, or thousands of scans, chunks and tags. Pillow allocates for some
of them while it opens a file. The limits are far above what cameras, scanners and programs write.
"""

import struct
from collections.abc import Callable

import numpy as np

from common.text import shorten
from data.loaders.jpeg_header import FrameHeader, check_coding, frame_header

MAX_PIXELS = 178_956_970  # of an image; Pillow has the same limit
MAX_RATIO = 1000  # of the longer side to the shorter one, which evaluation scales up to the crop
MAX_BYTES = 3 * MAX_PIXELS  # of a file: as many as its decoded pixels take at most
MAX_TEXT = 1 << 20  # bytes of a GIF before its first frame; Pillow joins them block by block
SMALL_CHUNKS = 1000  # of a PNG; beyond, chunks must have CHUNK bytes on average
CHUNK = 256
DEFLATE = 1032  # largest ratio of pixels to data in a PNG
MAX_TAGS = 1 << 16
MAX_NUMBERS = 1 << 22  # in the tags of a TIFF, as the offsets of its strips
TYPE_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # of a PNG's colour types
MIN_COVER = 4  # the first frame of an animation covers at least 1/4 of its canvas


def check_pixels(height: int, width: int) -> None:
    """Raise ValueError for an image too large, or too narrow, to be decoded and resized."""
    if height * width > MAX_PIXELS:
        raise ValueError(f"{width} x {height} pixels are more than the {MAX_PIXELS} that are decoded")
    if max(height, width) > MAX_RATIO * min(height, width):
        raise ValueError(f"{width} x {height} pixels are narrower than 1 : {MAX_RATIO}")


def check_file(data: np.ndarray, form: str) -> None:
    """Raise ValueError for a file, uint8 (n,), of one of Pillow's formats, that Pillow would open or decode in too long a time or too much memory."""
    _check_length(data)
    try:
        if form in CHECKS:
            CHECKS[form](memoryview(data.data))
    except (IndexError, struct.error) as error:
        raise ValueError("its header is cut off") from error


def _check_length(data: np.ndarray) -> None:
    if len(data) > MAX_BYTES:
        raise ValueError(f"{len(data)} bytes are more than the {MAX_BYTES} that are decoded")


def check_jpeg(data: np.ndarray) -> FrameHeader:
    """Return the frame header of a JPEG, uint8 (n,); ValueError as for `check_file`. Takes some ten microseconds."""
    _check_length(data)
    header = frame_header(data)
    check_pixels(header.height, header.width)
    check_coding(header, len(data))
    return header


def _check_pillow_jpeg(view: memoryview) -> None:
    """Check a JPEG, and what Pillow parses while it opens one: the tags of EXIF and of MPF."""
    header = check_jpeg(np.frombuffer(view, dtype=np.uint8))
    payloads = [bytes(view[start:end]) for start, end in header.metadata]
    for name in (b"Exif\0\0", b"MPF\0"):  # Pillow joins the payloads of each kind
        joined = b"".join(payload[len(name) :] for payload in payloads if payload.startswith(name))
        if joined:
            check_tags(memoryview(joined))


def check_tags(view: memoryview) -> None:
    """Raise ValueError for a TIFF, or a block of EXIF, whose tags state more data than it holds, as overlapping ones do."""
    order = {b"II": "<", b"MM": ">"}.get(bytes(view[:2]))
    if order is None or len(view) < 16:
        return  # neither: Pillow refuses it
    big = 43 in struct.unpack_from("<BB", view, 2)
    (at,) = struct.unpack_from(f"{order}{'Q' if big else 'I'}", view, 8 if big else 4)
    count_form, entry_form, entry = ("Q", "HHQ", 20) if big else ("H", "HHI", 12)
    first = at + struct.calcsize(f"{order}{count_form}")
    if first > len(view):
        return
    (count,) = struct.unpack_from(f"{order}{count_form}", view, at)
    total = numbers = 0
    for start in range(first, min(first + min(count, MAX_TAGS) * entry, len(view) - entry + 1), entry):
        _, kind, number = struct.unpack_from(f"{order}{entry_form}", view, start)
        total += number * TYPE_BYTES.get(kind, 1)
        numbers += number * (TYPE_BYTES.get(kind, 1) > 1)
    if count > MAX_TAGS or total > 2 * len(view) or numbers > MAX_NUMBERS:
        raise ValueError(
            f"its {count} tags state {total} bytes and {numbers} numbers of metadata, in {len(view)} bytes"
        )


def _check_png(view: memoryview) -> None:
    at, coded = 8, 0
    for _ in range(SMALL_CHUNKS + len(view) // CHUNK):
        if at + 8 > len(view):
            break
        length, name = struct.unpack_from(">I4s", view, at)
        coded += length * (name == b"IDAT")
        at += 12 + length
    else:
        raise ValueError(f"it has more than {SMALL_CHUNKS} chunks, of less than {CHUNK} bytes on average")
    width, height, bits, colour = struct.unpack_from(">IIBB", view, 16)
    check_pixels(height, width)
    if height * width * bits * CHANNELS.get(colour, 1) > 8 * DEFLATE * (coded + 64):
        raise ValueError(f"it states {width} x {height} pixels, but is truncated: {coded} bytes cannot hold them")


def _check_gif(view: memoryview) -> None:
    """Check the canvas, and the length and size of what comes before the data of the first frame."""
    width, height, flags = struct.unpack_from("<HHB", view, 6)
    check_pixels(height, width)
    at = 13 + (3 << (flags & 7) + 1) * (flags >> 7)
    while (kind := view[at]) != 0x2C:  # the description of a frame
        at += 2 if kind == 0x21 else 1  # an extension
        while kind == 0x21 and at < MAX_TEXT and view[at]:
            at += 1 + view[at]
        at += kind == 0x21
        if at >= MAX_TEXT:
            raise ValueError(f"more than {MAX_TEXT} bytes come before its first frame")
    check_cover(height, width, *struct.unpack_from("<HH", view, at + 5)[::-1])


def check_cover(height: int, width: int, own_height: int, own_width: int) -> None:
    """Raise ValueError for an animation whose first frame fills little of its canvas; the rest would be black."""
    if MIN_COVER * own_height * own_width < height * width:
        raise ValueError(
            f"it states {width} x {height} pixels, but its first frame holds {own_width} x {own_height} of them"
        )


def _check_webp(view: memoryview) -> None:
    """Check the size, for which Pillow allocates while it opens a file, and that of the first frame of an animation."""
    name, at = bytes(view[12:16]), 20
    if name == b"VP8 ":
        width, height = (side & 0x3FFF for side in struct.unpack_from("<HH", view, at + 6))
    elif name == b"VP8L":
        (sides,) = struct.unpack_from("<I", view, at + 1)
        width, height = (sides & 0x3FFF) + 1, (sides >> 14 & 0x3FFF) + 1
    elif name == b"VP8X":
        width, height = _pair_of_24(view, at + 4)
    else:
        raise ValueError(f"its first chunk is {shorten(name)}")
    check_pixels(height, width)
    if name != b"VP8X":
        return
    for _ in range(SMALL_CHUNKS):
        if at + 8 > len(view):
            return
        kind, length = struct.unpack_from("<4sI", view, at - 8)
        if kind == b"ANMF":
            check_cover(height, width, *_pair_of_24(view, at + 6)[::-1])
            return
        at += 8 + length + length % 2
    raise ValueError(f"it has more than {SMALL_CHUNKS} chunks before its first frame")


def _pair_of_24(view: memoryview, at: int) -> tuple[int, int]:
    first, second = (int.from_bytes(view[i : i + 3], "little") + 1 for i in (at, at + 3))
    return first, second


CHECKS: dict[str, Callable[[memoryview], None]] = {
    "JPEG": _check_pillow_jpeg,
    "PNG": _check_png,
    "GIF": _check_gif,
    "WEBP": _check_webp,
    "TIFF": check_tags,
}
