"""What a JPEG's header says: the size of the image, without decoding it, and whether a decoder will take the file."""

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


def frame(data: np.ndarray) -> Frame | None:
    """Return the frame header of a file's bytes, uint8 (n,); None if it is no JPEG of 8 bits, or damaged up to there."""
    head = memoryview(data.data)
    if bytes(head[:2]) != START:
        return None
    at = 2
    while at + 4 <= len(head) and head[at] == 0xFF:
        marker = head[at + 1]
        if marker == 0xFF:  # a fill byte
            at += 1
        elif marker in ALONE:
            at += 2
        elif marker in FRAMES:  # length (2 bytes), precision, height (2), width (2), components
            body = bytes(head[at + 4 : at + 10])
            height, width = int.from_bytes(body[1:3], "big"), int.from_bytes(body[3:5], "big")
            if len(body) < 6 or body[0] != 8 or not (height and width):
                return None
            return Frame(height, width, body[5], marker - 0xC0)
        elif marker in (0xD9, 0xDA):
            return None
        else:
            at += 2 + int.from_bytes(head[at + 2 : at + 4], "big")
    return None


def ordinary(data: np.ndarray) -> Frame | None:
    """Return the frame header if any decoder takes the file: grey or three colours, Huffman-coded, not cut off."""
    found = frame(data)
    if found is None or found.components not in (1, 3) or found.process > 2:
        return None
    return found if bytes(memoryview(data.data)[-2:]) == END else None
