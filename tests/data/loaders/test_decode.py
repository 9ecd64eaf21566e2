"""Decoding: Pillow's pixels for every kind of file in an image folder."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from data.loaders.decode import decode
from tests.helpers.data_doubles import picture

RNG = np.random.RandomState(0)
RGB = picture(RNG, 61, 47)


def encoded(image, form, **options):
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return np.frombuffer(bytearray(buffer.getvalue()), dtype=np.uint8)


def pillow(data):
    return torch.from_numpy(np.array(Image.open(io.BytesIO(data.tobytes())).convert("RGB"))).permute(2, 0, 1)


def without_adobe_marker(data):
    """Remove the segment that marks a CMYK JPEG as inverted."""
    start = data.tobytes().index(b"\xff\xee\x00\x0eAdobe")
    return np.delete(data, slice(start, start + 16))


def rotated_exif():
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: lies on its side
    return exif


@pytest.mark.parametrize(
    "data",
    [
        encoded(RGB, "JPEG", quality=90),
        encoded(RGB, "JPEG", quality=90, progressive=True),
        encoded(RGB, "JPEG", quality=90, subsampling=0),
        encoded(RGB.convert("L"), "JPEG"),
        encoded(RGB.convert("CMYK"), "JPEG"),
        without_adobe_marker(encoded(RGB.convert("CMYK"), "JPEG")),
        encoded(RGB, "JPEG", exif=rotated_exif()),
        encoded(RGB, "PNG"),
        encoded(RGB.convert("RGBA"), "PNG"),
        encoded(RGB.convert("LA"), "PNG"),
        encoded(RGB.convert("1"), "PNG"),
        encoded(RGB.quantize(17), "PNG"),
        encoded(RGB.quantize(17), "GIF"),
        encoded(RGB, "WEBP", lossless=True),
        encoded(RGB, "TIFF"),
        encoded(RGB, "BMP"),
        encoded(RGB, "PPM"),
    ],
    ids=lambda data: f"{len(data)} bytes",
)
def test_pixels_equal_pillows(data):
    image = decode(data, "x")
    assert image.dtype == torch.uint8
    assert image.shape == (3, 47, 61)
    assert torch.equal(image, pillow(data))


def test_palette_with_transparency_gives_its_colours():
    transparent = RGB.quantize(9)
    data = encoded(transparent, "PNG", transparency=bytes(range(9)))
    assert torch.equal(decode(data, "x"), torch.from_numpy(np.array(transparent.convert("RGB"))).permute(2, 0, 1))


def test_torchvision_decodes_jpeg(monkeypatch):
    """Pillow is the fallback: the fast path must not be lost silently."""
    monkeypatch.setattr("data.loaders.decode._read_pixels", None)
    assert decode(encoded(RGB, "JPEG"), "x").shape == (3, 47, 61)


def test_without_the_operator_pillow_decodes_jpeg(monkeypatch):
    monkeypatch.setattr("data.loaders.decode.HAS_JPEG_OPERATOR", False)
    by_pillow = torch.full((3, 47, 61), 9, dtype=torch.uint8)
    monkeypatch.setattr("data.loaders.decode._read_pixels", lambda data, form: by_pillow)
    assert decode(encoded(RGB, "JPEG"), "x") is by_pillow


@pytest.mark.parametrize(
    "data",
    [
        np.zeros(0, dtype=np.uint8),
        np.frombuffer(bytearray(b"not an image at all, but long enough"), dtype=np.uint8),
        encoded(RGB, "JPEG")[:700],
        encoded(RGB, "JPEG")[:20],
        encoded(RGB, "PNG")[:500],
    ],
    ids=["empty", "garbage", "truncated jpeg", "jpeg without a frame", "truncated png"],
)
def test_error_of_an_undecodable_file_names_it(data):
    with pytest.raises(ValueError, match=r"train/cat/7\.jpg: cannot be decoded \(\d+ bytes; .*\); restore the file"):
        decode(data, "train/cat/7.jpg")
