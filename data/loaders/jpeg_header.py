"""JPEG headers, read as libjpeg reads them: size, coding and number of scans without decoding, and bounds on what is decoded.

The size found here is the decoder's, also for files with bytes between their segments, because markers are searched in the
way of libjpeg: bytes up to the next FF are skipped, and so are FF 00 and repeated FF. A file whose header does not
come to a first scan in this way is refused. (Annex B of ITU-T T.81; next_marker and get_sof of libjpeg.)
"""

import re
import struct
from typing import NamedTuple

import numpy as np

START, END = b"\xff\xd8", b"\xff\xd9"
SCAN = b"\xff\xda"
MARKER = re.compile(rb"\xff[^\x00\xff]")
SCAN_END = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")
CODED = bytes((89 * i + 37) % 255 for i in range(64))  # coded data, of any meaning
MORE = CODED + b"".join(bytes([0xFF, 0xD0 + i]) + CODED for i in range(8))
BARE = {0x01, *range(0xD0, 0xD8)}  # markers without a length: TEM, RST0 .. RST7
FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}  # SOF0 .. SOF15; DHT, JPG and DAC lie among them
ARITHMETIC = 9  # from this process on, Huffman codes do not bound the size of the data
PROGRESSIVE = {2, 6, 10, 14}
MAX_SEGMENTS = 10_000  # a megabyte of metadata has 16; each costs a microsecond
MAX_SKIPPED = 1 << 16  # bytes between two segments
MAX_SCANS = 100  # encoders write up to about 20
MAX_SCANNED = 1 << 30  # pixels times scans: 10 scans, as most encoders write, of 107 million pixels


FRAME = struct.Struct(">HBHHB")  # length, precision, height, width, components


class FrameHeader(NamedTuple):
    """Frame header of a JPEG."""

    height: int
    width: int
    components: int
    process: int  # 0 baseline, 1 extended, 2 progressive, others rare
    precision: int  # bits of a sample
    blocks: int  # blocks of 8 x 8 coefficients
    scans: int  # 1 if the first scan holds all components of a sequential file
    metadata: tuple[tuple[int, int], ...]  # beginning and end of the payload of each APP1 and APP2 segment


def frame_header(data: np.ndarray) -> FrameHeader:
    """Return the frame header of a JPEG, given its bytes, uint8 (n,). ValueError if libjpeg would not come to a first scan."""
    view = memoryview(data.data)
    if bytes(view[:2]) != START:
        raise ValueError("it does not begin as a JPEG")
    metadata: list[tuple[int, int]] = []
    frame, at = 0, 2
    for _ in range(MAX_SEGMENTS):
        marker, at = _next_marker(view, at)
        if marker in BARE:
            continue
        length = view[at] << 8 | view[at + 1]
        if marker == 0xDA:
            return _parse_frame(view, frame, at, tuple(metadata))
        if marker in (0xD8, 0xD9) or at + max(2, length) > len(view):
            break
        if marker in (0xE1, 0xE2):
            metadata.append((at + 2, at + length))
        if marker in FRAMES:
            if frame:
                break
            frame = at
        at += max(2, length)
    else:
        raise ValueError(f"its header has more than {MAX_SEGMENTS} segments")
    raise ValueError("its header is damaged")


def _next_marker(view: memoryview, at: int) -> tuple[int, int]:
    """Return the next marker at or after `at`, and the position behind it. ValueError if there is none nearby."""
    if at + 4 <= len(view) and view[at] == 0xFF and view[at + 1] not in (0, 0xFF):  # in nearly all files
        return view[at + 1], at + 2
    found = MARKER.search(bytes(view[at : at + MAX_SKIPPED]))
    if found is None or at + found.end() + 2 > len(view):
        raise ValueError("its header is damaged or cut off")
    return found[0][-1], at + found.end()


def _parse_frame(view: memoryview, at: int, scan: int, metadata: tuple[tuple[int, int], ...]) -> FrameHeader:
    """Return the frame header whose length field lies at `at`, of a file whose first scan header lies at `scan`."""
    body = bytes(view[at : at + 776])  # of 256 components at most
    if not at or len(body) < 8:
        raise ValueError("its header states no size")
    process = view[at - 1] - 0xC0
    length, precision, height, width, components = FRAME.unpack_from(body)
    if not (height and width and components) or length != 8 + 3 * components:
        raise ValueError(f"its header states {width} x {height} pixels of {components} components")
    factors = body[9:length:3]
    across, down = [factor >> 4 for factor in factors], [factor & 15 for factor in factors]
    if min(across) < 1 or min(down) < 1 or max(across) > 4 or max(down) > 4:
        raise ValueError("its header states sampling factors outside 1 .. 4")
    wide, high = 8 * max(across), 8 * max(down)
    blocks = 0
    for h, v in zip(across, down, strict=True):
        blocks += -(-width * h // wide) * -(-height * v // high)
    several = process in PROGRESSIVE or scan + 2 >= len(view) or view[scan + 2] != components
    scans = bytes(view[scan:]).count(SCAN) + 1 if several else 1
    return FrameHeader(height, width, components, process, precision, blocks, scans, metadata)


def check_coding(header: FrameHeader, length: int) -> None:
    """Raise ValueError for a JPEG of `length` bytes that would take long to decode, or is too short for its pixels.

    A Huffman-coded block takes at least two bits, its DC and its end; in a progressive file one, its DC.
    """
    if header.scans > MAX_SCANS or header.scans * header.height * header.width > MAX_SCANNED:
        raise ValueError(
            f"its {header.scans} scans of {header.width} x {header.height} pixels would take long to decode; "
            f"{MAX_SCANS} scans, and {MAX_SCANNED:,} pixels in all of them, are the limits"
        )
    bits = 0 if header.process >= ARITHMETIC else 1 if header.process in PROGRESSIVE else 2
    if 8 * length < bits * header.blocks:
        raise ValueError(
            f"it states {header.width} x {header.height} pixels, but is truncated: its {length} bytes cannot hold them"
        )


def is_ordinary(header: FrameHeader, data: np.ndarray) -> bool:
    """Return True for a JPEG that any decoder accepts: of one or three components of 8 bits, Huffman-coded, with an end."""
    plain = header.components in (1, 3) and header.process <= 2 and header.precision == 8
    return plain and bytes(memoryview(data.data)[-2:]) == END


def lengthen_scans(data: np.ndarray) -> np.ndarray:
    """Return a JPEG with more coded data at the end of each scan, which a decoder reads only if a scan is too short.

    With restart markers, since scans with restart intervals are read from one to the next.
    """
    view, raw = memoryview(data.data), data.tobytes()
    pieces, done, at = [], 0, 2
    for _ in range(MAX_SEGMENTS):
        try:
            marker, at = _next_marker(view, at)
        except ValueError:  # no segment follows
            break
        if marker in BARE:
            continue
        at += max(2, view[at] << 8 | view[at + 1])
        if marker == 0xDA:
            end = SCAN_END.search(raw, at)
            at = end.start() if end else len(raw)
            pieces += [raw[done:at], MORE]
            done = at
    return np.frombuffer(bytearray(b"".join([*pieces, raw[done:]])), dtype=np.uint8)
