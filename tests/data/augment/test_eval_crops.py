"""Evaluation crops from the config: modes, sizes and border colour of timm; errors for mistyped keys and values."""

import math

import numpy as np
import pytest
import torch
from timm.data import create_transform

import config
from data.augment.build import build_eval_transform
from data.augment.transforms import EvalTransform, longer_side_size
from tests.helpers.data_doubles import picture


def tensor(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def cfg_of(*opts):
    return config.load(opts=["DATA.WORKERS", "0", *map(str, opts)])


SIZES = [(500, 375), (333, 500), (256, 256), (700, 57), (257, 256), (30, 31)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("mode", ["center", "squash", "border"])
@pytest.mark.parametrize("crop_pct", [1.0, 0.96, 0.875])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_crop_equals_timms(size, mode, crop_pct, interpolation):
    image = picture(np.random.RandomState(4), *size)
    timms = create_transform(224, interpolation=interpolation, crop_pct=crop_pct, crop_mode=mode, normalize=False)
    opts = ("EVAL.MODE", mode, "EVAL.CROP_PCT", crop_pct, "DATA.EVAL_INTERPOLATION", interpolation)
    ours = _transform(*opts)
    assert ours.resize == math.floor(224 / crop_pct)
    wanted, got = tensor(np.asarray(timms(image).permute(1, 2, 0))), ours(tensor(image))
    assert got.shape == wanted.shape == (3, 224, 224)
    assert got.dtype == torch.uint8
    difference = (got.int() - wanted.int()).abs()
    assert difference.max() <= 2
    assert difference.float().mean() < 0.3  # squashing a portrait, torch resizes rows first, Pillow columns


def _transform(*opts):
    return build_eval_transform(cfg_of(*opts))


@pytest.mark.parametrize("size", SIZES)
def test_border_has_timms_size_and_the_mean_colour(size):
    image = picture(np.random.RandomState(5), *size)
    timms = create_transform(224, crop_pct=1.0, crop_mode="border", normalize=False, mean=(0.2, 0.4, 0.9))
    resized = timms.transforms[0](image)
    assert longer_side_size(image.height, image.width, 224) == (resized.height, resized.width)
    ours = _transform("EVAL.MODE", "border", "DATA.MEAN", "[0.2, 0.4, 0.9]")(tensor(image))
    wanted = timms(image)
    outside = torch.ones(224, 224, dtype=torch.bool)
    top, left = (224 - resized.height) // 2, (224 - resized.width) // 2
    outside[top : top + resized.height, left : left + resized.width] = False
    assert torch.equal(ours[:, outside], wanted[:, outside])
    assert (ours[:, outside] == torch.tensor([[51], [102], [230]])).all()


def test_border_of_a_line_keeps_a_pixel():
    assert EvalTransform(32, mode="border")(torch.zeros(3, 1, 900, dtype=torch.uint8)).shape == (3, 32, 32)


def test_resize_comes_from_the_most_specific_key():
    assert _transform().resize == 256
    assert _transform("EVAL.CROP_PCT", 0.95).resize == 235
    assert _transform("EVAL.CROP_PCT", 0.95, "DATA.EVAL_RESIZE", 300).resize == 235
    assert _transform("EVAL.MODE", "squash").resize == 0  # the whole image
    assert _transform("EVAL.MODE", "border", "DATA.EVAL_RESIZE", 300).resize == 0


def test_squash_equals_no_resize():
    image = tensor(picture(np.random.RandomState(6), 90, 60))
    assert torch.equal(_transform("EVAL.MODE", "squash")(image), _transform("DATA.EVAL_RESIZE", 0)(image))


def test_resize_smaller_than_the_crop_is_refused_only_where_it_is_used():
    with pytest.raises(ValueError, match=r"DATA.EVAL_RESIZE=200"):
        cfg_of("DATA.EVAL_RESIZE", 200)
    cfg_of("DATA.EVAL_RESIZE", 200, "EVAL.CROP_PCT", 0.9)
    cfg_of("DATA.EVAL_RESIZE", 200, "EVAL.MODE", "squash")


@pytest.mark.parametrize(
    ("opts", "parts"),
    [
        (["EVAL.CROP_PCT", "87.5"], ["EVAL.CROP_PCT", "between 0 and 1", "87.5"]),
        (["EVAL.CROP_PCT", "-0.5"], ["EVAL.CROP_PCT", "-0.5"]),
        (["EVAL.CROP_PCT", "0.00875"], ["EVAL.CROP_PCT=0.00875", "0.05", "0.875"]),
        (["EVAL.CROP_PCT", "nan"], ["EVAL.CROP_PCT", "nan"]),
        (["EVAL.MODE", "centre"], ["EVAL.MODE", "center, squash, border", "did you mean center"]),
        (["EVAL.FLIP", "1"], ["EVAL.FLIP", "bool", "1"]),
        (["EVAL.CROPPCT", "0.9"], ["EVAL.CROPPCT", "EVAL.CROP_PCT"]),
    ],
)
def test_mistyped_protocol_is_refused_with_the_remedy(opts, parts):
    with pytest.raises(ValueError, match="EVAL") as caught:
        config.load(opts=opts)
    for part in parts:
        assert part in str(caught.value), str(caught.value)


def test_unknown_mode_is_refused():
    with pytest.raises(ValueError, match=r"EVAL.MODE must be one of center, squash, border, got 'full'"):
        config.load(opts=["EVAL.MODE", "full"])
