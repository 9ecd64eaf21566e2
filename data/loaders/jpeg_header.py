"""JPEG headers: size of the image without decoding it, and fitness of the file for any decoder."""

from typing import NamedTuple

import numpy as np

START, END = b"\xff\xd8", b"\xff\xd9"
STANDALONE = {0x01, *range(0xD0, 0xD8)}  # markers without a length
FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}  # SOF0 .. SOF15; DHT, JPG and DAC lie among them


class FrameHeader(NamedTuple):
    """Frame header of a JPEG."""

    height: int
    width: int
    components: int
    process: int  # 0 baseline, 1 extended, 2 progressive, others rare


def _find_frame(view: memoryview) -> tuple[int, int] | None:
    """Return the marker of a JPEG's frame header and its offset; None without one or for other files."""
    if bytes(view[:2]) != START:
        return None
    at = 2
    while at + 4 <= len(view) and view[at] == 0xFF:
        marker = view[at + 1]
        if marker == 0xFF:  # a fill byte
            at += 1
        elif marker in STANDALONE:
            at += 2
        elif marker in FRAMES:
            return marker, at
        elif marker in (0xD9, 0xDA):  # end of image, start of scan
            return None
        else:
            at += 2 + int.from_bytes(view[at + 2 : at + 4], "big")
    return None


def stated_size(data: np.ndarray) -> tuple[int, int] | None:
    """Return (height, width) from the header of a JPEG of any kind, given its bytes, uint8 (n,); None without a header."""
    view = memoryview(data.data)
    found = _find_frame(view)
    if found is None or len(view) < found[1] + 9:
        return None
    _, at = found  # marker (2 bytes), length (2), precision, height (2), width (2)
    return int.from_bytes(view[at + 5 : at + 7], "big"), int.from_bytes(view[at + 7 : at + 9], "big")


def frame_header(data: np.ndarray) -> FrameHeader | None:
    """Return the frame header of a file's bytes, uint8 (n,); None unless it is a JPEG of 8 bits with a valid header."""
    view = memoryview(data.data)
    found = _find_frame(view)
    if found is None:
        return None
    marker, at = found
    body = bytes(view[at + 4 : at + 10])  # precision, height (2), width (2), components
    sampling = bytes(view[at + 11 : at + 10 + 3 * body[5] : 3]) if len(body) == 6 else b""
    height, width = stated_size(data) or (0, 0)
    if not sampling or len(sampling) < body[5] or body[0] != 8 or not (height and width):
        return None
    return FrameHeader(height, width, body[5], marker - 0xC0)


def ordinary_header(data: np.ndarray) -> FrameHeader | None:
    """Return the frame header of an ordinary JPEG, one that any decoder accepts; None for other files.

    Ordinary are files of one or three components, Huffman-coded and not truncated.
    """
    header = frame_header(data)
    if header is None or header.components not in (1, 3) or header.process > 2:
        return None
    return header if bytes(memoryview(data.data)[-2:]) == END else None
