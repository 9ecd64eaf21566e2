"""Brightness of a sample of images: files whose samples use a small part of their type's range decode to black."""

from collections.abc import Sequence
from contextlib import suppress

import numpy as np
from torch import Tensor

from data.loaders.decode import UnreadableImageError
from data.loaders.image_source import ImageSource, load

NEARLY_BLACK = 2.0  # mean level, of 255, below which an image is
SAMPLE = 16  # images decoded at the start of a run


def mean_level(image: Tensor) -> float:
    """Return the mean of an image's samples, uint8 (3, H, W), in levels of 255."""
    return float(image.numpy().mean())


def darkness(levels: Sequence[float], name: str) -> str:
    """Return a warning if most of some images, given by their mean levels, are nearly black, else ""; `name` is their split's."""
    dark = sum(level < NEARLY_BLACK for level in levels)
    if 2 * dark <= len(levels):
        return ""
    return (
        f"{dark} of {len(levels)} decoded images of {name} are nearly black (mean below level {NEARLY_BLACK:g} of 255): samples are "
        "scaled by the file's type, so 12 bits in a 16-bit file become dark; scale the files to the whole range of their type"
    )


def sample_darkness(source: ImageSource, name: str) -> list[str]:
    """Decode a few images spread over a split; return the warning of `darkness`, if any. Unreadable images are left out."""
    levels = []
    for index in np.unique(np.linspace(0, len(source) - 1, min(len(source), SAMPLE)).round().astype(np.int64)).tolist():
        with suppress(UnreadableImageError):
            levels.append(mean_level(load(source, index)))
    warning = darkness(levels, name)
    return [warning] if warning else []
