"""What a JPEG's header says: the size of the image, without decoding it, and whether a decoder will take the file.

Rows are coded from the top. So a decoder that is told of a smaller height stops early, and gives the same pixels down to
there: a seventh of the work of decoding lies below the average random crop.
"""

from typing import NamedTuple

import numpy as np

START, END = b"\xff\xd8", b"\xff\xd9"
ALONE = {0x01, *range(0xD0, 0xD8)}  # markers without a length
FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}  # SOF0 .. SOF15; DHT, JPG and DAC lie among them


class Frame(NamedTuple):
    """The frame header of a JPEG."""

    height: int
    width: int
    components: int
    process: int  # 0 baseline, 1 extended, 2 progressive, others rare
    unit: int  # rows that are coded together
    at: int  # where in the file the height stands


def _find_frame(head: memoryview) -> tuple[int, int] | None:
    """Return the marker of a JPEG's frame header and where it stands; None before any, or for other files."""
    if bytes(head[:2]) != START:
        return None
    at = 2
    while at + 4 <= len(head) and head[at] == 0xFF:
        marker = head[at + 1]
        if marker == 0xFF:  # a fill byte
            at += 1
        elif marker in ALONE:
            at += 2
        elif marker in FRAMES:
            return marker, at
        elif marker in (0xD9, 0xDA):  # end of image, start of scan
            return None
        else:
            at += 2 + int.from_bytes(head[at + 2 : at + 4], "big")
    return None


def stated_size(data: np.ndarray) -> tuple[int, int] | None:
    """Return (height, width) as the header of a JPEG of any kind states them, uint8 (n,) being its bytes."""
    head = memoryview(data.data)
    found = _find_frame(head)
    if found is None or len(head) < found[1] + 9:
        return None
    _, at = found  # marker (2 bytes), length (2), precision, height (2), width (2)
    return int.from_bytes(head[at + 5 : at + 7], "big"), int.from_bytes(head[at + 7 : at + 9], "big")


def frame(data: np.ndarray) -> Frame | None:
    """Return the frame header of a file's bytes, uint8 (n,); None if it is no JPEG of 8 bits, or damaged up to there."""
    head = memoryview(data.data)
    found = _find_frame(head)
    if found is None:
        return None
    marker, at = found
    body = bytes(head[at + 4 : at + 10])  # precision, height (2), width (2), components
    sampling = bytes(head[at + 11 : at + 10 + 3 * body[5] : 3]) if len(body) == 6 else b""
    height, width = stated_size(data) or (0, 0)
    if not sampling or len(sampling) < body[5] or body[0] != 8 or not (height and width):
        return None
    return Frame(height, width, body[5], marker - 0xC0, 8 * max(value & 15 for value in sampling), at + 5)


def ordinary(data: np.ndarray) -> Frame | None:
    """Return the frame header if any decoder takes the file: grey or three colours, Huffman-coded, not cut off."""
    found = frame(data)
    if found is None or found.components not in (1, 3) or found.process > 2:
        return None
    return found if bytes(memoryview(data.data)[-2:]) == END else None


def cut(data: np.ndarray, found: Frame, rows: int) -> bool:
    """Write a height that suffices for the first `rows` into an ordinary file's bytes; False if it saves nothing."""
    height = (-(-rows // found.unit) + 1) * found.unit  # a unit more, since colours are smoothed across its border
    if found.process > 1 or height >= found.height:
        return False
    set_height(data, found, height)
    return True


def set_height(data: np.ndarray, found: Frame, height: int) -> None:
    """Write a height into a file's bytes."""
    data[found.at : found.at + 2] = divmod(height, 256)
