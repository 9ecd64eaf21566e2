"""JPEG headers: the decoded size, and which files any decoder accepts."""

import io

import numpy as np
import pytest

from data.loaders.jpeg_header import frame_header, is_ordinary
from tests.helpers.data_doubles import picture


def encoded(width=131, height=157, mode="RGB", **options):
    file = io.BytesIO()
    picture(np.random.RandomState(0), width, height).convert(mode).save(file, "JPEG", **options)
    return np.frombuffer(bytearray(file.getvalue()), dtype=np.uint8)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}, {"comment": b"\xff\xc0" * 9}])
def test_jpeg_header_gives_the_decoded_size(mode, options):
    data = encoded(mode=mode, **options)
    found = frame_header(data)
    assert (found.width, found.height) == (131, 157)
    assert found.components == {"RGB": 3, "L": 1, "CMYK": 4}[mode]
    assert found.process == (2 if options.get("progressive") else 0)
    assert is_ordinary(found, data) == (mode != "CMYK")
    assert not is_ordinary(found, data[:-1])
    for end in range(0, 20):
        with pytest.raises(ValueError, match=r"damaged|cut off|begin"):
            frame_header(data[:end])
