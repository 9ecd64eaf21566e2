"""Colour operations of RandAugment for one image on the CPU, with Pillow's levels exactly, in at most half of its time.

Written for NumPy's 8 and 16 bit arithmetic: posterize, solarize and brightness need no table here.
"""

# S side of the image

from collections.abc import Callable

import numpy as np
from PIL import Image

from data.augment.color import GREY_WEIGHTS, base_name

LEVELS = np.arange(256)


def color_cpu(planes: np.ndarray, name: str, argument: float) -> np.ndarray:
    """Apply an operation, by timm's name, to uint8 (3, S, S), contiguous."""
    return _OPERATIONS[base_name(name)](planes, argument)


def _posterize(planes: np.ndarray, bits: float) -> np.ndarray:
    return planes & np.uint8(256 - 2 ** (8 - int(bits)) if bits > 0 else 0)


def _solarize(planes: np.ndarray, threshold: float) -> np.ndarray:
    if threshold > 255:
        return planes
    return planes ^ ((planes >= np.uint8(threshold)) * np.uint8(255))


def _solarize_add(planes: np.ndarray, add: float) -> np.ndarray:
    return planes + (planes < np.uint8(128)) * np.uint8(add)  # at most 127 + 128


def _autocontrast(planes: np.ndarray, _: float) -> np.ndarray:
    flat = planes.reshape(3, -1)
    tables = []
    for low, high in zip(flat.min(1).tolist(), flat.max(1).tolist(), strict=True):
        scale = 255.0 / (high - low) if high > low else 1.0
        tables.append((LEVELS * scale - (low * scale if high > low else 0.0)).clip(0, 255).astype(np.uint8))
    return _look_up(planes, tables)


def _equalize(planes: np.ndarray, _: float) -> np.ndarray:
    tables = []
    for plane in planes:
        counts = np.array(Image.fromarray(plane).histogram())
        step = (plane.size - int(counts[counts.nonzero()[0][-1]])) // 255
        below = counts.cumsum() - counts
        tables.append(((step // 2 + below) // step if step else LEVELS).clip(0, 255).astype(np.uint8))
    return _look_up(planes, tables)


def _look_up(planes: np.ndarray, tables: list[np.ndarray]) -> np.ndarray:
    """Replace the levels of each plane by its table; bytes.translate is faster than a NumPy index of 8 bytes a level."""
    result = np.empty_like(planes)
    for plane, table, out in zip(planes, tables, result, strict=True):
        out.reshape(-1)[:] = np.frombuffer(plane.tobytes().translate(table.tobytes()), dtype=np.uint8)
    return result


def _brightness(planes: np.ndarray, factor: float) -> np.ndarray:
    return _truncate(planes * np.float32(factor), factor)


def _contrast(planes: np.ndarray, factor: float) -> np.ndarray:
    mean = np.float32(int(int(_luminance(planes).sum(dtype=np.int64)) / planes[0].size + 0.5))
    return _blend(mean, planes, factor)


def _color(planes: np.ndarray, factor: float) -> np.ndarray:
    return _blend(_luminance(planes).astype(np.float32), planes, factor)


def _sharpness(planes: np.ndarray, factor: float) -> np.ndarray:
    pixels = planes.astype(np.uint16)
    lines = pixels[..., :-2] + pixels[..., 1:-1]
    lines += pixels[..., 2:]
    total = lines[:, :-2] + lines[:, 1:-1]
    total += lines[:, 2:]
    total += pixels[:, 1:-1, 1:-1] << 2
    total <<= 1
    total += 13
    total //= 26  # the weighted mean of 13, rounded
    pixels[:, 1:-1, 1:-1] = total
    return _blend(pixels.astype(np.float32), planes, factor)


def _luminance(planes: np.ndarray) -> np.ndarray:
    """Return Pillow's luminance, uint32 (S, S)."""
    red, green, blue = (plane.astype(np.uint32) for plane in planes)
    red *= np.uint32(GREY_WEIGHTS[0])
    green *= np.uint32(GREY_WEIGHTS[1])
    blue *= np.uint32(GREY_WEIGHTS[2])
    red += green
    red += blue
    red += np.uint32(32768)
    red >>= np.uint32(16)
    return red


def _blend(start: np.ndarray | np.float32, planes: np.ndarray, factor: float) -> np.ndarray:
    """Return uint8 start + factor * (planes - start) in float32, as Pillow's Image.blend."""
    values = planes.astype(np.float32)
    values -= start
    values *= np.float32(factor)
    values += start
    return _truncate(values, factor)


def _truncate(values: np.ndarray, factor: float) -> np.ndarray:
    """Return float32 levels as uint8; a factor up to 1 leaves none outside 0 .. 255."""
    return (values.clip(0, 255, out=values) if factor > 1 else values).astype(np.uint8)


_OPERATIONS: dict[str, Callable[[np.ndarray, float], np.ndarray]] = {
    "AutoContrast": _autocontrast,
    "Equalize": _equalize,
    "Invert": lambda planes, _: ~planes,
    "Posterize": _posterize,
    "Solarize": _solarize,
    "SolarizeAdd": _solarize_add,
    "Color": _color,
    "Contrast": _contrast,
    "Brightness": _brightness,
    "Sharpness": _sharpness,
}
