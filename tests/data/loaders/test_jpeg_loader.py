"""JPEG headers, and decoding no further than the crop: the same pixels, and silence about it."""

import io

import numpy as np
import pytest
import torch

from data.loaders.decode import UnreadableImageError, decode
from data.loaders.decode_top import decode_top
from data.loaders.jpeg import frame, ordinary
from tests.helpers.data_doubles import picture


def encoded(width=131, height=157, mode="RGB", **options):
    file = io.BytesIO()
    picture(np.random.RandomState(0), width, height).convert(mode).save(file, "JPEG", **options)
    return np.frombuffer(bytearray(file.getvalue()), dtype=np.uint8)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}, {"comment": b"\xff\xc0" * 9}])
def test_jpeg_header_gives_the_loader_the_decoded_size(mode, options):
    data = encoded(mode=mode, **options)
    found = frame(data)
    assert (found.width, found.height) == (131, 157)
    assert found.components == {"RGB": 3, "L": 1, "CMYK": 4}[mode]
    assert found.process == (2 if options.get("progressive") else 0)
    assert (ordinary(data) is None) == (mode == "CMYK")
    assert ordinary(data[:-1]) is None
    assert all(frame(data[:end]) is None for end in range(0, 20))


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("restart", [{}, {"restart_marker_blocks": 5}, {"restart_marker_rows": 1}])
@pytest.mark.parametrize("subsampling", [0, 1, 2])
def test_jpeg_loader_decodes_the_top_as_of_the_whole(capfd, mode, restart, subsampling):
    data = encoded(mode=mode, subsampling=subsampling, **restart)
    whole, shorter = decode(data.copy(), ""), 0
    for rows in [*range(1, 20), 63, 64, 65, 100, 140, 150, 156, 157]:
        top = decode_top(data.copy(), ordinary(data), rows, "")
        assert top.shape[1] >= rows
        assert torch.equal(top[:, :rows], whole[:, :rows])
        shorter += top.shape[1] < 157
    assert shorter > 20
    assert capfd.readouterr().err == ""


def test_jpeg_loader_decodes_all_of_a_progressive_one():
    data = encoded(progressive=True)
    assert torch.equal(decode_top(data.copy(), ordinary(data), 10, ""), decode(data.copy(), ""))


def test_jpeg_loader_says_of_corrupt_data_what_decoding_says():
    data = encoded()
    at = data.tobytes().index(b"\xff\xc4")
    data[at + 4 : at + 30] = 255
    with pytest.raises(UnreadableImageError) as wanted:
        decode(data.copy(), "x")
    with pytest.raises(UnreadableImageError) as found:
        decode_top(data.copy(), ordinary(data), 10, "x")
    assert str(found.value) == str(wanted.value)
