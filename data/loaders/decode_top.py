"""Decode a JPEG down to the last row that is needed, with the pixels of decoding all of it."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from torch import Tensor

from data.loaders.decode import UnreadableImageError, decode
from data.loaders.jpeg import Frame, cut, set_height


def decode_top(data: np.ndarray, found: Frame, rows: int, name: str) -> Tensor:
    """Decode at least the first `rows` of an ordinary JPEG, uint8 (3, rows or more, W), in a loader process only.

    libjpeg writes to stderr that bytes are left over, and has no switch for it: so stderr is closed for the while, which a
    process that others write in could not do.
    """
    if cut(data, found, rows):
        try:
            with _without_stderr():
                return decode(data, name)
        except UnreadableImageError:
            set_height(data, found, found.height)
    return decode(data, name)


@contextmanager
def _without_stderr() -> Iterator[None]:
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
