"""Bytes of an image file to RGB pixels: JPEG through torchvision, everything else through Pillow, EXIF ignored.

Both decode a JPEG to the same pixels, grey and CMYK ones too, torchvision faster. Its operator is called by the registered
name, because torchvision 0.29 warns at each call of the Python wrapper that decoding moves to TorchCodec; a torchvision
that no longer has the operator leaves all decoding to Pillow and says so once.
"""

import io
import warnings

import numpy as np
import torch
import torchvision.io  # registers torch.ops.image
from PIL import Image, UnidentifiedImageError
from torch import Tensor

JPEG_START = b"\xff\xd8"
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


def decode(data: np.ndarray, name: str) -> Tensor:
    """Decode a file's bytes, uint8 (n,), to uint8 (3, H, W); UnreadableImageError names a file that is no image."""
    if HAS_JPEG_OPERATOR and data[:2].tobytes() == JPEG_START:
        try:
            return torch.ops.image.decode_jpeg(torch.from_numpy(data), RGB_MODE, False)
        except RuntimeError:
            pass  # Pillow either can, or says better what is wrong
    try:
        return _decode_pillow(data)
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        why = "no image format that Pillow knows" if isinstance(error, UnidentifiedImageError) else error
        raise UnreadableImageError(
            f"{name}: cannot be decoded ({len(data)} bytes; {why}); restore the file or take it out of the folder"
        ) from error


def _decode_pillow(data: np.ndarray) -> Tensor:
    with Image.open(io.BytesIO(data.data)) as file:
        file.load()
        image: Image.Image = file
        if image.mode.startswith("I"):  # 16 bit grey; Pillow's own conversion would clip it at 255
            grey = np.asarray(image).astype(np.int64)
            image = Image.fromarray((grey >> 8 if grey.max() > 255 else grey).clip(0, 255).astype(np.uint8))
        elif image.mode == "P" and "transparency" in image.info:
            image = image.convert("RGBA")  # the same colours as straight to RGB, without Pillow's warning
        pixels = np.array(image.convert("RGB"))  # (H, W, 3)
    return torch.from_numpy(pixels).permute(2, 0, 1)
