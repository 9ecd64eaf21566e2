"""Samples of every type: scaled to 8 bits by the file's type and never by its content, or refused; alpha is dropped."""

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from data.loaders.brightness import darkness, is_dark, sample_darkness
from data.loaders.decode import UnreadableImageError, decode
from tests.helpers.data_doubles import picture

SIDE = 16
RGB = picture(np.random.RandomState(3), SIDE, SIDE)
RAMP = np.linspace(0, 65535, SIDE * SIDE).astype(np.uint16).reshape(SIDE, SIDE)


def as_array(data):
    return np.frombuffer(bytearray(data), dtype=np.uint8)


def encoded(image, form, **options):
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def png(rows, bits, colour):
    """Return a PNG of raw rows of samples, which Pillow cannot write for all types."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", SIDE, SIDE, bits, colour, 0, 0, 0)
    body = zlib.compress(b"".join(b"\0" + row for row in rows))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def png16(samples, colour):
    """Return a PNG of 16-bit samples (H, W, channels)."""
    return png([row.astype(">u2").tobytes() for row in samples], 16, colour)


def packed_png(levels, bits):
    """Return a grey PNG of 1, 2 or 4 bits a sample."""
    rows = []
    for row in levels:
        whole = "".join(f"{level:0{bits}b}" for level in row)
        rows.append(int(whole, 2).to_bytes(SIDE * bits // 8, "big"))
    return png(rows, bits, 0)


def tiff(strip, bits, sample_format=1, byte_order="<", photometric=1):
    """Return a grey TIFF of raw samples."""
    tags = {
        256: SIDE,
        257: SIDE,
        258: bits,
        259: 1,
        262: photometric,
        273: 0,
        277: 1,
        278: SIDE,
        279: len(strip),
        339: sample_format,
    }
    order = b"II*\0" if byte_order == "<" else b"MM\0*"
    size = 8 + 2 + 12 * len(tags) + 4
    tags[273] = size
    entries = b"".join(struct.pack(f"{byte_order}HHII", tag, 4, 1, value) for tag, value in sorted(tags.items()))
    header = order + struct.pack(f"{byte_order}I", 8) + struct.pack(f"{byte_order}H", len(tags)) + entries
    return header + struct.pack(f"{byte_order}I", 0) + strip


def tiff12(samples):
    """Return a grey TIFF of 12 bits a sample."""
    return tiff(
        b"".join(int("".join(f"{s:012b}" for s in row), 2).to_bytes(SIDE * 12 // 8, "big") for row in samples), 12
    )


GREY_16 = {
    "png": lambda grey: encoded(Image.fromarray(grey), "PNG"),
    "tiff, little-endian": lambda grey: tiff(grey.astype("<u2").tobytes(), 16),
    "tiff, big-endian": lambda grey: tiff(grey.astype(">u2").tobytes(), 16, byte_order=">"),
    "tiff, deflated": lambda grey: encoded(Image.fromarray(grey), "TIFF", compression="tiff_adobe_deflate"),
    "pgm": lambda grey: encoded(Image.fromarray(grey), "PPM"),
    "rgb png": lambda grey: png16(np.stack([grey] * 3, -1), 2),
    "rgba png": lambda grey: png16(np.stack([grey] * 3 + [grey // 2], -1), 6),
    "grey with alpha png": lambda grey: png16(np.stack([grey, grey // 2], -1), 4),
}


@pytest.mark.parametrize("kind", GREY_16)
@pytest.mark.parametrize("brightest", [65535, 40000, 4095, 257, 256, 255, 1, 0])
def test_16_bits_are_scaled_alike_whatever_the_brightest_sample(kind, brightest):
    samples = np.minimum(RAMP, brightest)
    image = decode(as_array(GREY_16[kind](samples)), "x")
    assert torch.equal(image, torch.from_numpy((samples >> 8).astype(np.uint8)).expand(3, SIDE, SIDE))
    exact = samples / 257  # 65535 is white
    assert np.abs(image[0].numpy() - exact).max() < 1


@pytest.mark.parametrize("brightest", [4095, 2000, 255, 15, 1])
def test_12_bit_tiff_is_scaled_from_12_bits(brightest):
    samples = np.minimum(RAMP >> 4, brightest)
    assert np.array_equal(decode(as_array(tiff12(samples)), "x")[1].numpy(), samples >> 4)


@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("share", [1, 2, 8])
def test_few_bits_are_scaled_to_white(bits, share):
    white = 2**bits - 1
    levels = (np.arange(SIDE * SIDE).reshape(SIDE, SIDE) % (white + 1)) // share
    assert np.array_equal(decode(as_array(packed_png(levels, bits)), "x")[2].numpy(), levels * 255 // white)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB"])
def test_types_of_8_bits_are_converted_as_by_pillow(mode):
    image = Image.merge("LAB", RGB.split()) if mode == "LAB" else RGB.convert("P" if mode == "PA" else mode)
    data = encoded(image.convert(mode), "TIFF")
    with Image.open(io.BytesIO(data)) as file:
        wanted = np.array(file.convert("RGB"))
    assert np.array_equal(decode(as_array(data), "x").permute(1, 2, 0).numpy(), wanted)


UNDEFINED = {
    "float tiff of 0..1": encoded(
        Image.fromarray(np.random.RandomState(0).rand(SIDE, SIDE).astype(np.float32)), "TIFF"
    ),
    "float tiff of 0..255": encoded(Image.fromarray(RAMP.astype(np.float32) / 257), "TIFF"),
    "32-bit tiff": encoded(Image.fromarray(RAMP.astype(np.int32)), "TIFF"),
    "32-bit tiff of one level": encoded(Image.new("I", (SIDE, SIDE), 200), "TIFF"),
    "signed 16-bit tiff": tiff((RAMP >> 1).astype("<i2").tobytes(), 16, sample_format=2),
    "signed 16-bit big-endian tiff": tiff((RAMP >> 1).astype(">i2").tobytes(), 16, sample_format=2, byte_order=">"),
}


@pytest.mark.parametrize("kind", UNDEFINED)
def test_type_without_a_brightest_value_is_refused(kind):
    with pytest.raises(
        UnreadableImageError,
        match=r"^cat/7: .*mode [IF] in a \w+ file, have no defined brightest value; convert it to 8 bits",
    ):
        decode(as_array(UNDEFINED[kind]), "cat/7")


@pytest.mark.parametrize("form", ["PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("mode", ["RGBA", "LA"])
@pytest.mark.parametrize("alpha", [0, 1, 128, 255])
def test_alpha_is_dropped_and_colours_stay(form, mode, alpha):
    base = RGB.convert(mode[:-1])
    image = base.convert(mode)
    image.putalpha(alpha)
    options = {"lossless": True, "exact": True} if form == "WEBP" else {}
    got = decode(as_array(encoded(image, form, **options)), "x").permute(1, 2, 0).numpy()
    assert np.array_equal(got, np.array(base.convert("RGB")))


@pytest.mark.parametrize("mode", ["L", "RGB", "P", "I;16"])
def test_transparent_colour_stays(mode):
    image = Image.fromarray(RAMP) if mode == "I;16" else RGB.convert(mode)
    colour = (1, 2, 3) if mode == "RGB" else 5
    with_colour, without = (encoded(image, "PNG", **more) for more in ({"transparency": colour}, {}))
    assert torch.equal(decode(as_array(with_colour), "x"), decode(as_array(without), "x"))


class Files:
    """Image source of a list of files."""

    def __init__(self, *files):
        self.files, self.labels = files, np.zeros(len(files), dtype=np.int64)

    def __len__(self):
        return len(self.files)

    def name(self, index):
        return f"{index}"

    def read(self, index):
        return as_array(self.files[index])


BRIGHT = encoded(RGB, "PNG")
DARK = encoded(Image.fromarray(RAMP >> 8), "PNG")  # 8 bits in 16


@pytest.mark.parametrize(
    ("files", "dark"),
    [
        ([DARK] * 5, 5),
        ([DARK, DARK, BRIGHT], 2),
        ([encoded(Image.new("L", (9, 9), 1), "PNG")] * 40, 16),
        ([DARK, b"", b""], 1),
        ([DARK, BRIGHT], 0),
        ([BRIGHT] * 3, 0),
        ([encoded(Image.new("L", (9, 9), 16), "PNG")], 0),
        ([b""], 0),
    ],
)
def test_warning_if_most_images_are_nearly_black(files, dark):
    found = sample_darkness(Files(*files), "the split")
    assert len(found) == (dark > 0)
    assert all(text.startswith(f"{dark} of ") and "images of the split are nearly black" in text for text in found)


def test_no_images_are_not_dark():
    assert darkness([], "x") == ""


@pytest.mark.parametrize("bits", [8, 16])
def test_tiff_whose_zero_is_white_is_inverted(bits):
    samples = RAMP >> (16 - bits)
    image = decode(as_array(tiff(samples.astype(f"<u{bits // 8}").tobytes(), bits, photometric=0)), "x")
    assert torch.equal(image, torch.from_numpy(255 - (RAMP >> 8).astype(np.uint8)).expand(3, SIDE, SIDE))


@pytest.mark.parametrize(("bits", "kind"), [(8, "i1"), (16, "i2"), (32, "i4")])
def test_signed_tiff_is_refused(bits, kind):
    data = tiff(np.full((SIDE, SIDE), 100, f"<{kind}").tobytes(), bits, sample_format=2)
    with pytest.raises(UnreadableImageError, match="no defined brightest value"):
        decode(as_array(data), "x")


@pytest.mark.parametrize(("bits", "kind"), [(16, "f2"), (64, "f8")])
def test_tiff_of_samples_that_are_not_read_is_named(bits, kind):
    data = tiff(np.full((SIDE, SIDE), 0.5, f"<{kind}").tobytes(), bits, sample_format=3)
    with pytest.raises(UnreadableImageError, match="of a type of samples that is not read"):
        decode(as_array(data), "x")


@pytest.mark.parametrize(
    ("brightest", "dark"), [(65535, False), (16383, False), (4095, True), (1023, True), (255, True)]
)
def test_12_bits_in_16_are_dark_however_bright_they_are(brightest, dark):
    bright = np.full((SIDE, SIDE), brightest, np.uint16)  # white where the file had that many bits
    assert is_dark(decode(as_array(encoded(Image.fromarray(bright), "PNG")), "x")) == dark
