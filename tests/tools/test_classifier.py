"""Evaluation crop that a checkpoint states: refused, with the file's name, if there is no such crop."""

import pytest

from tools.classifier import _stated_transform


@pytest.mark.parametrize(
    ("stated", "message"),
    [
        ({"interpolation": "nearest"}, r"best\.pt states the evaluation interpolation 'nearest', .*bilinear, bicubic"),
        ({"mode": "full"}, r"best\.pt states the evaluation mode 'full', .*center, squash, border"),
        ({"resize": 31}, r"best\.pt states an evaluation crop of 32 pixels from images resized to 31"),
    ],
)
def test_impossible_crop_of_a_file_is_refused(stated, message):
    with pytest.raises(ValueError, match=message):
        _stated_transform({"crop": 32, "fill": [1, 2, 3], **stated}, "best.pt")
