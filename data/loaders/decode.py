"""Decode image files to RGB pixels: JPEG by torchvision, other formats by Pillow; the EXIF orientation is ignored.

Samples of more than 8 bits are scaled by the file's type, never by its content: of 16 bits the high byte is kept, for grey and
for colour, so that 65535 is white. Types without a brightest value (floats, 32-bit and signed integers) are refused. Alpha is
dropped.

Both decode a JPEG to the same pixels, grey and CMYK ones too; torchvision is faster. Its operator is called by the registered
name, because torchvision 0.29 warns at each call of the Python wrapper that decoding moves to TorchCodec. Without the
operator in later versions of torchvision, Pillow decodes everything, with one warning.
"""

import io
import warnings

import numpy as np
import torch
import torchvision.io  # registers torch.ops.image
from PIL import Image, UnidentifiedImageError
from PIL.ImageFile import ImageFile
from PIL.TiffImagePlugin import BITSPERSAMPLE, PHOTOMETRIC_INTERPRETATION, SAMPLEFORMAT, TiffImageFile
from torch import Tensor

from data.loaders.file_limits import check_file, check_jpeg, check_pixels
from data.loaders.jpeg_header import lengthen_scans
from data.stores.image_files import HEAD, format_of, is_unread

MAX_SLOW = 1 << 23  # samples of an image that Pillow decodes in Python, about two seconds
MISSING = [128, 128, 128]  # colour of pixels without data, in a JPEG of one or three components
LONGEST = 300  # characters of a decoder's message
UNSIGNED, WHITE_IS_ZERO = 1, 0  # of TIFF
RGB_MODE = 3  # torchvision.io.ImageReadMode.RGB, which is deprecated with the wrapper
HAS_JPEG_OPERATOR = hasattr(torch.ops.image, "decode_jpeg")
if not HAS_JPEG_OPERATOR:
    warnings.warn(
        f"torchvision {torchvision.__version__} cannot decode JPEG; Pillow does, at about 3/4 of the speed "
        "(an older torchvision brings it back)",
        stacklevel=2,
    )


class UnreadableImageError(ValueError):
    """An image file that cannot be read or decoded."""

    def __init__(self, name: str, reason: str = "", remedy: str = "") -> None:
        super().__init__(f"{name}: {reason}; {remedy}" if reason else name)
        self.name, self.reason = name, reason


def decode(data: np.ndarray, name: str) -> Tensor:
    """Decode a file's bytes, uint8 (n,), to uint8 (3, H, W); UnreadableImageError names the file, whatever is wrong with it."""
    try:
        if format_of(data[:HEAD].tobytes()) == "JPEG":
            return _decode_jpeg(data)
        return _decode_pillow(data)
    except Exception as error:  # Pillow raises many kinds of errors for damaged files, MemoryError among them
        raise UnreadableImageError(
            name,
            f"cannot be decoded ({len(data)} bytes; {_reason(data, error)})",
            "restore the file or take it out of the folder",
        ) from error


def _reason(data: np.ndarray, error: Exception) -> str:
    if len(data) == 0:
        return "the file is empty"
    if not data.any():
        return "all bytes are zero"
    head = data[:512].tobytes()
    if head.lstrip()[:5].lower() in (b"<html", b"<!doc"):
        return "a web page, not an image"
    if not format_of(head[:HEAD]):
        return "an image format that is not read" if is_unread(head[:HEAD]) else "no image format that is read"
    if isinstance(error, UnidentifiedImageError):
        if format_of(head[:HEAD]) == "TIFF":
            return "a TIFF file that is damaged, or of a type of samples that is not read: convert it to 8 bits"
        return "a damaged header"
    return str(error)[:LONGEST] or type(error).__name__


def _decode_jpeg(data: np.ndarray) -> Tensor:
    """Decode a JPEG, and check that it holds as many pixels as it states.

    libjpeg fills what is missing with grey. So if the last pixel is grey, it is decoded again with more data at its end: where
    this changes the image, data were missing.
    """
    header = check_jpeg(data)
    image = _decode_pixels(data)
    if image.shape[1:] != (header.height, header.width):
        raise ValueError(
            f"it states {header.width} x {header.height} pixels and holds {image.shape[2]} x {image.shape[1]}"
        )
    if (header.components == 4 or image[:, -1, -1].tolist() == MISSING) and not _is_whole_jpeg(data):
        raise ValueError(
            f"it states {header.width} x {header.height} pixels, but is truncated: data for the last are missing"
        )
    return image


def _is_whole_jpeg(data: np.ndarray) -> bool:
    """Return False if a JPEG decodes to other pixels with more data at its end. By Pillow, since torchvision prints warnings.

    Compared by NumPy: torch's threads would wait forever in a process forked after they were used.
    """
    own, longer = (_read_pixels(one, "JPEG").numpy() for one in (data, lengthen_scans(data)))
    return np.array_equal(own, longer)


def _decode_pixels(data: np.ndarray) -> Tensor:
    """Decode a JPEG to uint8 (3, H, W)."""
    if HAS_JPEG_OPERATOR:
        try:
            return torch.ops.image.decode_jpeg(torch.from_numpy(data), RGB_MODE, False)
        except RuntimeError:
            pass  # Pillow can decode it, or has the better message
    return _read_pixels(data, "JPEG")


def _decode_pillow(data: np.ndarray) -> Tensor:
    form = format_of(data[:HEAD].tobytes())
    if not form:
        raise ValueError("no image format that is read")
    return _read_pixels(data, form)


def _read_pixels(data: np.ndarray, form: str) -> Tensor:
    """Decode a file by Pillow's decoder of one format to uint8 (3, H, W)."""
    check_file(data, form)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about sizes, which are checked here, and about metadata
        with Image.open(io.BytesIO(data.data), formats=(form,)) as file:
            _load(file)
            if not _is_whole(file, data, form):
                raise ValueError(
                    f"it states {file.width} x {file.height} pixels, but is truncated: the last are missing"
                )
            image: Image.Image = file
            if bits := _grey_bits(file):
                levels = (np.asarray(image) >> (bits - 8)).astype(np.uint8)
                image = Image.fromarray(255 - levels if _white_is_zero(file) else levels)
            elif image.mode == "P" and "transparency" in image.info:
                image = image.convert("RGBA")  # the same colours as straight to RGB, without Pillow's warning
            pixels = np.array(image.convert("RGB"))  # (H, W, 3)
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _load(file: ImageFile) -> None:
    """Decode an opened file; ValueError if it is too large, or would take long."""
    check_pixels(file.height, file.width)
    tiles = 16 + 8 * (file.height + file.height * file.width // 256)
    if len(file.tile) > tiles:
        raise ValueError(f"its {file.width} x {file.height} pixels lie in {len(file.tile)} pieces")
    slow = [tile.codec_name for tile in file.tile if tile.codec_name in Image.DECODERS]  # those in Python
    if slow and file.height * file.width * len(file.getbands()) > MAX_SLOW:
        raise ValueError(
            f"{file.width} x {file.height} pixels coded as {slow[0]} would take long; write it without, or as PNG"
        )
    file.load()


def _is_whole(file: ImageFile, data: np.ndarray, form: str) -> bool:
    """Return False if Pillow's decoder left the last row of an image as it was, which is no error to it.

    Such a row is zero, so if it is, the image is decoded again onto one that is not zero.
    """
    box = (0, file.height - 1, file.width, file.height)
    row = file.crop(box)
    if form not in ("PNG", "GIF", "TIFF", "BMP") or any(row.tobytes()):
        return True
    with Image.open(io.BytesIO(data.data), formats=(form,)) as again:
        bands = len(again.getbands())
        again.im = Image.new(again.mode, again.size, 255 if bands == 1 else (255,) * bands).im
        again.load()
        return again.crop(box).tobytes() == row.tobytes()


def _grey_bits(file: ImageFile) -> int:
    """Return the bits a sample of a grey image of more than 8, which Pillow's conversion would clip at 255; 0 for other images.

    Raises ValueError for a type of samples without a brightest value.
    """
    if file.mode.startswith("I;16"):
        return int(file.tag_v2.get(BITSPERSAMPLE, (16,))[0]) if isinstance(file, TiffImageFile) else 16
    if file.mode == "I" and file.format in ("PNG", "PPM"):  # Pillow scales a PGM's brightest value to 65535
        return 16
    signed = isinstance(file, TiffImageFile) and UNSIGNED not in (file.tag_v2.get(SAMPLEFORMAT) or (UNSIGNED,))
    if file.mode[0] in "IF" or signed:
        raise ValueError(
            f"its samples, of Pillow's mode {file.mode} in a {file.format} file, have no defined brightest value; "
            "convert it to 8 bits, or to unsigned 16 bits with 65535 as white"
        )
    return 0


def _white_is_zero(file: ImageFile) -> bool:
    """Return True for a TIFF whose sample 0 is white; Pillow inverts those of 8 bits, not those of more."""
    return isinstance(file, TiffImageFile) and file.tag_v2.get(PHOTOMETRIC_INTERPRETATION) == WHITE_IS_ZERO
