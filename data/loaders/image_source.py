"""Image sources: the interface through which loaders read the files of a data set, folders and archives alike."""

from typing import Protocol

import numpy as np
from torch import Tensor

from data.loaders.decode import UnreadableImageError, decode


class ImageSource(Protocol):
    """Labels and encoded files of a data set, by image index."""

    labels: np.ndarray  # int64 (n,)

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """Return the path of an image, for messages."""

    def read(self, index: int) -> np.ndarray:
        """Return the bytes of an image's file, uint8 (n,), writable; OSError if the storage fails."""


def read(source: ImageSource, index: int) -> np.ndarray:
    """Return the bytes of an image's file, uint8 (n,); UnreadableImageError names it."""
    try:
        return source.read(index)
    except Exception as error:  # of any store: it is this image that cannot be read
        reason = str(error) if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
        raise UnreadableImageError(
            source.name(index), f"cannot be read ({reason})", "see whether the storage is still there"
        ) from error


def load(source: ImageSource, index: int) -> Tensor:
    """Return an image, uint8 (3, H, W); UnreadableImageError names its file."""
    return decode(read(source, index), source.name(index))
