"""Brightness of a sample of images: files whose samples use a small part of their type's range decode to black."""

from collections.abc import Sequence
from contextlib import suppress

import numpy as np
from torch import Tensor

from data.loaders.decode import UnreadableImageError
from data.loaders.image_source import ImageSource, load

NEARLY_BLACK = 2.0  # mean level, of 255, below which an image is
BRIGHTEST_OF_12_BITS = 15  # level of 12 bits stored in 16
SAMPLE = 16  # images decoded at the start of a run


def mean_level(image: Tensor) -> float:
    """Return the mean of an image's samples, uint8 (3, H, W), in levels of 255."""
    return float(image.numpy().mean())


def is_dark(image: Tensor) -> bool:
    """Return True for an image that is nearly black: by its mean, or since no sample exceeds what 12 bits in 16 can be."""
    return mean_level(image) < NEARLY_BLACK or int(image.max()) <= BRIGHTEST_OF_12_BITS


def darkness(found: Sequence[bool], name: str) -> str:
    """Return a warning if most of some images are nearly black, given by `is_dark` of each, else ""; `name` is their split's."""
    dark = sum(found)
    if 2 * dark <= len(found):
        return ""
    return (
        f"{dark} of {len(found)} decoded images of {name} are nearly black (mean below level {NEARLY_BLACK:g} of 255, or none above {BRIGHTEST_OF_12_BITS}): samples are "
        "scaled by the file's type, so 12 bits in a 16-bit file become dark; scale the files to the whole range of their type"
    )


def sample_darkness(source: ImageSource, name: str) -> list[str]:
    """Decode a few images spread over a split; return the warning of `darkness`, if any. Unreadable images are left out."""
    found = []
    for index in np.unique(np.linspace(0, len(source) - 1, min(len(source), SAMPLE)).round().astype(np.int64)).tolist():
        with suppress(UnreadableImageError):
            found.append(is_dark(load(source, index)))
    warning = darkness(found, name)
    return [warning] if warning else []
