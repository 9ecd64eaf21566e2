"""Damaged and unusual image files: unreadable ones, and readable ones."""

import io
import struct
import zlib

import numpy as np
from PIL import Image

from tests.helpers.data_doubles import picture

RGB = picture(np.random.RandomState(7), 61, 47)


def encoded(image: Image.Image, form: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def rotated() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: lies on its side
    return exif


def stated_size(jpeg: bytes, width: int, height: int) -> bytes:
    """Return a JPEG with another size in its header."""
    at = jpeg.index(b"\xff\xc0") + 5
    return jpeg[:at] + struct.pack(">HH", height, width) + jpeg[at + 4 :]


def png_bomb(side: int) -> bytes:
    """Return a PNG of a few bytes whose header states side x side pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(99))) + chunk(b"IEND", b"")
    )


JPEG = encoded(RGB, "JPEG", quality=90)
UNREADABLE = {
    "truncated": JPEG[: len(JPEG) // 2],
    "only a header": JPEG[:200],
    "truncated png": encoded(RGB, "PNG")[:900],
    "empty": b"",
    "zeros": bytes(3000),
    "garbage": np.random.RandomState(3).bytes(5000),
    "garbage that begins as a jpeg": b"\xff\xd8\xff" + np.random.RandomState(4).bytes(5000),
    "html": b"\n<!DOCTYPE html><html><body>404 Not Found</body></html>",
    "jpeg bomb": stated_size(JPEG, 65500, 65500),
    "png bomb": png_bomb(60000),
}
READABLE = {
    "cmyk": encoded(RGB.convert("CMYK"), "JPEG"),
    "grayscale": encoded(RGB.convert("L"), "JPEG"),
    "progressive": encoded(RGB, "JPEG", progressive=True),
    "16 bit png": encoded(Image.fromarray(np.arange(0, 65536, 64, dtype=np.uint16).reshape(32, 32)), "PNG"),
    "gif": encoded(RGB.quantize(17), "GIF"),
    "png": encoded(RGB, "PNG"),
    "exif rotated": encoded(RGB, "JPEG", exif=rotated()),
    "1 x 1": encoded(RGB.crop((0, 0, 1, 1)), "JPEG"),
    "1 x 1 png": encoded(RGB.crop((0, 0, 1, 1)), "PNG"),
    "1 x 700": encoded(RGB.resize((1, 700)), "JPEG"),
    "huge": encoded(Image.new("RGB", (4000, 3000), (9, 99, 199)), "JPEG"),
}
