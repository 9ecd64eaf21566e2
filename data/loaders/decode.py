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

from data.loaders.jpeg_header import START, stated_size

MAX_PIXELS = 178_956_970  # of an image; Pillow has the same limit
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
    """Decode a file's bytes, uint8 (n,), to uint8 (3, H, W); UnreadableImageError names the file."""
    try:
        if data[:2].tobytes() == START:
            _check_pixels(*(stated_size(data) or (0, 0)))
            if HAS_JPEG_OPERATOR:
                try:
                    return torch.ops.image.decode_jpeg(torch.from_numpy(data), RGB_MODE, False)
                except RuntimeError:
                    pass  # Pillow can decode it, or has the better message
        return _decode_pillow(data)
    except Exception as error:  # Pillow raises many kinds of errors for damaged files
        raise UnreadableImageError(
            name,
            f"cannot be decoded ({len(data)} bytes; {_reason(data, error)})",
            "restore the file or take it out of the folder",
        ) from error


def _check_pixels(height: int, width: int) -> None:
    if height * width > MAX_PIXELS:
        raise ValueError(f"{width} x {height} pixels are more than the {MAX_PIXELS} that are decoded")


def _reason(data: np.ndarray, error: Exception) -> str:
    if len(data) == 0:
        return "the file is empty"
    if not data.any():
        return "all bytes are zero"
    if data[:512].tobytes().lstrip()[:5].lower() in (b"<html", b"<!doc"):
        return "a web page, not an image"
    if isinstance(error, UnidentifiedImageError):
        if data[:4].tobytes() in (b"II*\0", b"MM\0*"):
            return "a TIFF file that is damaged, or of a type of samples that is not read: convert it to 8 bits"
        return "no image format that Pillow knows"
    return str(error) or type(error).__name__


def _decode_pillow(data: np.ndarray) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about sizes, which are checked here, and about metadata
        return _read_pixels(data)


def _read_pixels(data: np.ndarray) -> Tensor:
    with Image.open(io.BytesIO(data.data)) as file:
        _check_pixels(file.height, file.width)
        file.load()
        image: Image.Image = file
        if bits := _grey_bits(file):
            levels = (np.asarray(image) >> (bits - 8)).astype(np.uint8)
            image = Image.fromarray(255 - levels if _white_is_zero(file) else levels)
        elif image.mode == "P" and "transparency" in image.info:
            image = image.convert("RGBA")  # the same colours as straight to RGB, without Pillow's warning
        pixels = np.array(image.convert("RGB"))  # (H, W, 3)
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _grey_bits(file: ImageFile) -> int:
    """Return the bits a sample of a grey image of more than 8, which Pillow's conversion would clip at 255; 0 for other images.

    Raises ValueError for a type of samples without a brightest value.
    """
    if file.mode.startswith("I;16") and file.format != "FITS":  # a FITS file's 16 bits are signed
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
