"""Any image size, square or not, divisible or not."""

import math

import pytest
import torch

from tests.helpers.small_models import NAMES, SMALLEST, images, scrambled, shrunken

SIZES = [(32, 32), (1, 1), (33, 47), (64, 96), (50, 131), (127, 65), (224, 320)]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", SMALLEST)
def test_classification_runs_at(name, size):
    model = scrambled(shrunken(name, img_size=size)).eval()
    with torch.no_grad():
        logits = model(images(2, 3, *size))
    assert logits.shape == (2, 10)
    assert logits.isfinite().all()
    assert not torch.allclose(logits[0], logits[1])


@pytest.mark.parametrize("name", NAMES)
def test_features_have_four_strides(name):
    model = shrunken(name, img_size=(75, 100), features_only=True).eval()
    with torch.no_grad():
        maps = model(images(1, 3, 75, 100))
    assert [tuple(m.shape[2:]) for m in maps] == [(math.ceil(75 / s), math.ceil(100 / s)) for s in (4, 8, 16, 32)]
    assert all(m.isfinite().all() for m in maps)


@pytest.mark.parametrize("name", SMALLEST)
def test_training_runs_at_a_size_no_stride_divides(name):
    model = shrunken(name, img_size=(50, 61)).train()
    model(images(2, 3, 50, 61)).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
