"""Image files made to end, to stop or to fill the process that decodes them, none over 100 kB; and to be taken for whole."""

import struct
import zlib

import numpy as np
from PIL import Image

from tests.helpers.damaged_images import JPEG, RGB, encoded, png_bomb, rotated, stated_size
from tests.helpers.data_doubles import picture

SMALL = picture(np.random.RandomState(5), 64, 64)
SOS = b"\xff\xda"
ZEROS = zlib.compress(bytes(64 << 20))
SMALL_JPEG = encoded(SMALL, "JPEG")


def before_frame(jpeg: bytes, data: bytes) -> bytes:
    """Return a JPEG with bytes between two segments, before its frame header."""
    at = jpeg.index(b"\xff\xc0")
    return jpeg[:at] + data + jpeg[at:]


def scans(count: int, side: int) -> bytes:
    """Return a grey progressive JPEG of side x side pixels with one scan of DC, and then many of AC, nearly without data."""
    jpeg = encoded(Image.new("L", (64, 64), 90), "JPEG", progressive=True).replace(
        b"\x08\0\x40\0\x40", b"\x08" + struct.pack(">HH", side, side)
    )
    first = jpeg.index(SOS)
    end = jpeg.index(SOS, first + 2)
    more = SOS + b"\0\x08\x01\x01\0\x01\x3f\0" + b"\0" * 10  # AC, all coefficients at once
    tables = jpeg[first + 10 : end]
    tables = tables[tables.index(b"\xff\xc4") :] if b"\xff\xc4" in tables else b""
    return jpeg[: first + 10] + bytes(side * side // 512 + 1) + tables + more * (count - 1) + b"\xff\xd9"


def segment(marker: int, data: bytes) -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", len(data) + 2) + data


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width: int, height: int, *chunks: bytes, rows: int | None = None) -> bytes:
    """Return a grey PNG that states width x height pixels, with white data for some rows, and more chunks before them."""
    rows = height if rows is None else rows
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress((b"\0" + b"\xff" * width) * rows, 9))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + body + chunk(b"IEND", b"")


def tags(entries: int, size: int, data: int) -> bytes:
    """Return a TIFF header whose tags all point to the same `data` bytes, `size` of them each."""
    own = b"".join(struct.pack("<HHII", 40000 + i, 7, size, 8) for i in range(entries))
    image = b"".join(
        struct.pack("<HHII", tag, 4, 1, value)
        for tag, value in ((256, 8), (257, 8), (258, 8), (259, 1), (262, 1), (273, 8), (277, 1), (278, 8), (279, 64))
    )
    return (
        b"II*\0" + struct.pack("<I", 8 + data) + bytes(data) + struct.pack("<H", entries + 9) + image + own + bytes(4)
    )


def gif(width: int, height: int, before: bytes = b"", frame: tuple[int, int] | None = None) -> bytes:
    """Return a GIF that states width x height pixels, of which its data hold one row of 64 pixels."""
    small = encoded(Image.new("L", (64, 64), 255), "GIF")
    canvas = small[:6] + struct.pack("<HH", width, height) + small[10:13]
    start = small.index(b",\0\0\0\0")
    own = struct.pack("<HH", *(frame or (width, height)))
    return (
        canvas
        + small[13 : 13 + 3 * 2 ** ((small[10] & 7) + 1)]
        + before
        + small[start : start + 5]
        + own
        + small[start + 9 :]
    )


def bmp_runs(width: int, height: int) -> bytes:
    """Return a run-length coded BMP of one pixel a row, which Pillow completes in Python."""
    header = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, 1, 0, 0, 0, 256, 0)
    offset = 14 + 40 + 1024
    body = b"\x01\xff\0\0" * min(height, 20000) + b"\0\x01"
    return b"BM" + struct.pack("<IHHI", offset + len(body), 0, 0, offset) + header + bytes(range(256)) * 4 + body


def webp_canvas(width: int, height: int) -> bytes:
    """Return an animated WebP that states a canvas of width x height pixels, with frames of 64 x 64."""
    data = encoded(SMALL, "WEBP", save_all=True, append_images=[SMALL.transpose(Image.Transpose.ROTATE_90)])
    canvas = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    return data[:24] + canvas + data[30:]


def strips(width: int, height: int, held: int) -> bytes:
    """Return a grey TIFF of which only the first `held` rows have data."""
    data = b"\xff" * (width * held)
    entries = (
        (256, width),
        (257, height),
        (258, 8),
        (259, 1),
        (262, 1),
        (273, 8),
        (277, 1),
        (278, held),
        (279, len(data)),
    )
    own = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in entries)
    return b"II*\0" + struct.pack("<I", 8 + len(data)) + data + struct.pack("<H", len(entries)) + own + bytes(4)


EPS = (
    b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\n/Helvetica findfont 9 scalefont setfont\n"
    b"(x) show\nshowpage\n%%EOF\n"
)
EXIF_TAGS = tags(1500, 40000, 40000)
HOSTILE = {
    "bomb behind a stray byte": before_frame(stated_size(JPEG, 13000, 14000), b"\0"),
    "bomb behind FF 00": before_frame(stated_size(JPEG, 13000, 14000), b"\xff\0"),
    "bomb behind fill bytes": before_frame(stated_size(JPEG, 13000, 14000), b"\xff" * 9),
    "bomb behind a restart marker": before_frame(stated_size(JPEG, 13000, 14000), b"\xff\xd3"),
    "bomb behind an empty segment": before_frame(stated_size(JPEG, 13000, 14000), b"\xff\xe3\0\0"),
    "bomb behind a small first frame": JPEG[:2]
    + JPEG[JPEG.index(b"\xff\xc0") :][:19]
    + stated_size(JPEG, 13000, 13000)[2:],
    "large, but within the limit": stated_size(JPEG, 13000, 13000),
    "sampling of 0": JPEG.replace(b"\x01\x22\0\x02\x11", b"\x01\x20\0\x02\x11"),
    "sampling of 15": JPEG.replace(b"\x01\x22\0\x02\x11", b"\x01\xff\0\x02\x11"),
    "no components": JPEG.replace(b"\0\x11\x08\0\x2f\0\x3d\x03", b"\0\x11\x08\0\x2f\0\x3d\0"),
    "height of 0": stated_size(JPEG, 64, 0),
    "1000 scans": scans(1000, 1000),
    "60 large scans": scans(60, 7000),
    "many segments": JPEG[:2] + segment(0xE5, b"") * 20000 + JPEG[2:],
    "bytes without a marker": JPEG[:2] + bytes([0xFF, 0xE5, 0, 2]) + b"\1" * 90000 + JPEG[2:],
    "FF bytes": JPEG[:3] + b"\xff" * 90000,
    "jpeg of 5000 x 5000 with data of 64 x 64": stated_size(SMALL_JPEG, 5000, 5000),
    "jpeg of 100 x 100 with data of 64 x 64": stated_size(SMALL_JPEG, 100, 100),
    "jpeg of 64 x 200 with data of 64 x 64": stated_size(SMALL_JPEG, 64, 200),
    "jpeg with restarts, of 500 x 400": stated_size(encoded(SMALL, "JPEG", restart_marker_blocks=1), 500, 400),
    "progressive jpeg of 300 x 300": encoded(SMALL, "JPEG", progressive=True).replace(
        b"\x08\0\x40\0\x40", b"\x08\x01\x2c\x01\x2c"
    ),
    "cmyk jpeg of 300 x 300": stated_size(encoded(SMALL.convert("CMYK"), "JPEG"), 300, 300),
    "jpeg cut off, with an end": JPEG[: len(JPEG) * 2 // 3] + b"\xff\xd9",
    "narrow jpeg": stated_size(JPEG, 1, 65500),
    "png of 5000 x 5000 with data of 64 rows": png(5000, 5000, rows=64),
    "png of 100 x 100 with data of 64 rows": png(100, 100, rows=64),
    "png of 13000 x 13000": png_bomb(13000),
    "png of 2**31": png_bomb(2**31 - 1),
    "narrow png": png(1, 60000),
    "compressed text": png(8, 8, chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(1_000_000))) * 90),
    "text of 64 MB": png(8, 8, chunk(b"zTXt", b"a\0\0" + ZEROS)),
    "profile of 64 MB": png(8, 8, chunk(b"iCCP", b"a\0\0" + ZEROS)),
    "many chunks": png(8, 8, chunk(b"aaAa", b"") * 8000),
    "tags that overlap": tags(1500, 60000, 60000),
    "exif tags that overlap": JPEG[:2]
    + segment(0xE1, b"Exif\0\0" + EXIF_TAGS)[:65535]
    + JPEG[2:].replace(b"\xff\xd9", b""),
    "tiff of 5000 x 5000 with data of 8 rows": strips(5000, 5000, 8),
    "tiff in many pieces": strips(16, 16, 16).replace(
        struct.pack("<HHII", 278, 4, 1, 16), struct.pack("<HHII", 278, 4, 1, 0)
    ),
    "gif of 5000 x 5000 with data of 64 x 64": gif(5000, 5000),
    "gif of 5000 x 5000 with a frame of 64 x 64": gif(5000, 5000, frame=(64, 64)),
    "gif of 60000 x 60000": gif(60000, 60000),
    "bmp of runs": bmp_runs(13000, 13000),
    "bmp cut off": encoded(SMALL, "BMP")[:3000],
    "bmp of runs, of 100 x 100": bmp_runs(100, 100).replace(b"\x01\xff\0\0" * 100, b"\x01\xff\0\0" * 20),
    "webp of 16384 x 16384": webp_canvas(16384, 16384),
    "webp of 5000 x 5000 with frames of 64 x 64": webp_canvas(5000, 5000),
    "plain ppm of 9000 x 9000": b"P2\n9000 9000\n255\n" + b"1 " * 40000,
    "ppm of odd levels": b"P5\n9000 9000\n254\n" + bytes(90000),
    "ppm of a huge number": b"P5\n" + b"9" * 5000 + b" 5\n255\n",
    "eps": EPS,
    "eps behind a preview": b"\xc5\xd0\xd3\xc6" + struct.pack("<6I", 32, len(EPS), 0, 0, 0, 0) + b"\0" * 4 + EPS,
    "jpeg 2000": encoded(SMALL, "JPEG2000"),
    "ico": encoded(SMALL, "ICO"),
    "tga": encoded(SMALL, "TGA"),
    "pcx": encoded(SMALL, "PCX"),
    "pdf": encoded(SMALL, "PDF"),
    "float map": encoded(Image.new("F", (8, 8), 0.5), "PPM"),
}
WHOLE = {  # odd, and read
    "grey": encoded(Image.new("RGB", (64, 64), (128, 128, 128)), "JPEG"),
    "grey, progressive": encoded(Image.new("RGB", (64, 64), (128, 128, 128)), "JPEG", progressive=True),
    "grey, with restarts": encoded(Image.new("RGB", (64, 64), (128, 128, 128)), "JPEG", restart_marker_blocks=3),
    "grey cmyk": encoded(Image.new("CMYK", (64, 64), (64, 64, 64, 64)), "JPEG"),
    "stray bytes": before_frame(JPEG, b"\0\1\2\xff\0"),
    "progressive": encoded(RGB, "JPEG", progressive=True),
    "flat": encoded(Image.new("RGB", (900, 700)), "JPEG", quality=5, optimize=True),
    "flat, progressive": encoded(Image.new("RGB", (900, 700), (128, 128, 128)), "JPEG", quality=5, progressive=True),
    "black": encoded(Image.new("RGB", (50, 40)), "PNG"),
    "black, interlaced": encoded(Image.new("P", (50, 40)), "GIF", interlace=1),
    "black tiff": encoded(Image.new("L", (50, 40)), "TIFF", compression="tiff_lzw"),
    "black bmp": encoded(Image.new("L", (50, 40)), "BMP"),
    "black 1 bit": encoded(Image.new("1", (50, 40)), "PNG"),
    "black 16 bits": encoded(Image.new("I;16", (50, 40)), "PNG"),
    "black with alpha": encoded(Image.new("RGBA", (50, 40)), "PNG"),
    "black transparent gif": encoded(Image.new("P", (50, 40)), "GIF", transparency=0),
    "animated gif": encoded(SMALL, "GIF", save_all=True, append_images=[SMALL.rotate(90)] * 20),
    "animated webp": encoded(SMALL, "WEBP", save_all=True, append_images=[SMALL.rotate(90)] * 5),
    "animated png": encoded(SMALL, "PNG", save_all=True, append_images=[SMALL.rotate(90)] * 5),
    "tiff of pages": encoded(SMALL, "TIFF", save_all=True, append_images=[SMALL.rotate(90)] * 5),
    "mpo": encoded(SMALL, "MPO", save_all=True, append_images=[SMALL.rotate(90)]),
    "lossless webp": encoded(SMALL, "WEBP", lossless=True),
    "exif": encoded(RGB, "JPEG", exif=rotated()),
    "comments in a gif": encoded(SMALL, "GIF", comment=b"x" * 3000),
    "1 x 1": encoded(Image.new("RGB", (1, 1)), "JPEG"),
}
