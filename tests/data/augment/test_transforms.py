"""Crops: drawn by RNG key as in timm, applied within two levels of Pillow; evaluation sizes equal torchvision's."""

import numpy as np
import pytest
import timm.data.transforms as timm_tf
import torch
from PIL import Image
from timm.data import create_transform
from torchvision.transforms import functional as tvf_pil
from torchvision.transforms.v2.functional._geometry import _do_native_uint8_resize_on_cpu

import config
from benchmarks.pillow_rand_augment import apply
from common.rng import keyed_generator
from data.augment.rand_augment_policy import parse_policy
from data.augment.random_erasing import RandomErasing
from data.augment.transforms import INTERPOLATIONS, Crop, EvalTransform, TrainTransform, draw_crop, shorter_side_size
from tests.helpers.data_doubles import TimmRandom, picture

RATIO = (3 / 4, 4 / 3)
FROZEN = [
    ((40, 67, 302, 315), "bicubic", False, ["AutoContrast"], [[0, 0, 0, 0]]),
    ((56, 173, 205, 237), "bicubic", True, [], [[0, 0, 0, 0]]),
    ((14, 97, 265, 263), "bilinear", True, ["TranslateXRel", "Equalize"], [[0, 0, 0, 0]]),
    ((3, 12, 300, 276), "bicubic", False, ["ShearY", "ShearX"], [[0, 0, 0, 0]]),
]


def tensor(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def difference(one, other):
    return (one.int() - other.int()).abs()


@pytest.mark.parametrize(("width", "height"), [(500, 375), (64, 64), (300, 20), (20, 300), (3, 3)])
@pytest.mark.parametrize("scale", [(0.08, 1.0), (0.9, 1.0)])
def test_crop_is_timms_for_the_same_random_numbers(monkeypatch, width, height, scale):
    blank = Image.new("RGB", (width, height))
    crops = set()
    for position in range(100):
        ours = draw_crop(keyed_generator(0, "augment", 0, position), height, width, scale, RATIO)
        with monkeypatch.context() as patch:
            patch.setattr(timm_tf, "random", TimmRandom(keyed_generator(0, "augment", 0, position)))
            wanted = timm_tf.RandomResizedCropAndInterpolation.get_params(blank, scale, RATIO)
        if 0 in wanted[2:]:
            continue  # of a tiny image timm may take a crop without pixels
        assert ours == wanted
        crops.add(ours)
    assert len(crops) >= (30 if min(width, height) > 50 else 1)


@pytest.mark.parametrize(
    ("width", "height", "wanted"),
    [(300, 20, Crop(0, 136, 20, 27)), (20, 300, Crop(136, 0, 27, 20)), (1, 1, Crop(0, 0, 1, 1))],
)
def test_crop_that_never_fits_falls_back_to_the_centre(width, height, wanted):
    assert draw_crop(keyed_generator(0, "augment", 0, 0), height, width, (1.0, 1.0), RATIO) == wanted


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_crop_and_flip_have_pillows_pixels(interpolation):
    image = picture(np.random.RandomState(2), 130, 97)
    transform = TrainTransform(48, 0, interpolation=interpolation)
    flips = set()
    for position in range(12):
        drawn = transform.draw(0, position, 97, 130)
        mode = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}[interpolation]
        wanted = tensor(tvf_pil.resized_crop(image, *drawn.crop, [48, 48], tvf_pil._interpolation_modes_from_int(mode)))
        ours = transform.apply(tensor(image), drawn)
        assert ours.shape == (3, 48, 48)
        assert ours.dtype == torch.uint8
        assert difference(ours, wanted.flip(-1) if drawn.flip else wanted).max() <= 1
        flips.add(drawn.flip)
    assert flips == {True, False}


def test_rand_augment_is_applied_to_the_crop():
    image = tensor(picture(np.random.RandomState(2), 130, 97))
    plain = TrainTransform(48, 0)
    full = TrainTransform(48, 0, policy=parse_policy("rand-m9-mstd0.5-inc1"), fill=(1, 2, 3))
    changed = 0
    for position in range(20):
        drawn = full.draw(0, position, 97, 130)
        crop = plain.apply(image, plain.draw(0, position, 97, 130))
        wanted = apply(Image.fromarray(crop.permute(1, 2, 0).numpy()), drawn.ops, (1, 2, 3))
        assert torch.equal(full.apply(image, drawn), tensor(wanted))
        changed += len(drawn.ops) > 0
    assert changed > 8


def test_draw_depends_on_the_rng_key_alone_and_is_frozen():
    """Changed numbers here mean that every run so far would resume with other augmentation: do not adapt the test."""
    transform = TrainTransform(224, 5, interpolation="random", policy=parse_policy("rand-m9-mstd0.5-inc1"))
    draws = [transform.draw(epoch, position, 375, 500) for epoch in (1, 2) for position in (10, 11)]
    again = TrainTransform(224, 5, interpolation="random", policy=parse_policy("rand-m9-mstd0.5-inc1"))
    assert again.draw(2, 11, 375, 500).crop == draws[3].crop
    assert len({drawn.crop for drawn in draws}) == 4
    found = [(tuple(d.crop), d.interpolation, d.flip, [op.name for op in d.ops], d.erase.tolist()) for d in draws]
    assert found == FROZEN


def test_flip_and_interpolation_have_their_probabilities():
    draws = [TrainTransform(8, 0, hflip=0.3, interpolation="random").draw(0, p, 40, 40) for p in range(2000)]
    assert np.mean([drawn.flip for drawn in draws]) == pytest.approx(0.3, abs=0.04)
    assert np.mean([drawn.interpolation == "bicubic" for drawn in draws]) == pytest.approx(0.5, abs=0.04)


def test_erase_boxes_come_with_the_crop():
    transform = TrainTransform(32, 0, erase=RandomErasing(prob=1.0, count=2))
    cropped, boxes = transform(tensor(picture(np.random.RandomState(2), 60, 50)), 0, 0)
    assert cropped.shape == (3, 32, 32)
    assert boxes.shape == (2, 4)
    assert boxes[0, 2] > 0


def rounds_between_axes(interpolation):
    """Return True if torchvision resizes uint8 images as such and rounds between the two axes, as Pillow does.

    Bilinear without AVX2 goes through float32. Pillow's first rounding, uniform in -1/2..1/2, is then a difference of
    1/4 level in the mean, less where the second axis averages it.
    """
    return _do_native_uint8_resize_on_cpu(INTERPOLATIONS[interpolation])


@pytest.mark.parametrize("size", [(500, 375), (333, 500), (256, 256), (64, 64), (700, 57), (257, 256)])
@pytest.mark.parametrize(("crop", "resize"), [(224, 256), (224, 248), (384, 384), (64, 64)])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_evaluation_equals_timms(size, crop, resize, interpolation):
    image = picture(np.random.RandomState(4), *size)
    timms = create_transform(crop, interpolation=interpolation, crop_pct=crop / (resize + 1e-9), normalize=False)
    resized = timms.transforms[0](image)
    assert shorter_side_size(size[1], size[0], resize) == (resized.height, resized.width)
    ours = EvalTransform(crop, resize, interpolation)(tensor(image))
    wanted = timms(image)
    assert ours.shape == wanted.shape == (3, crop, crop)
    assert difference(ours, wanted).max() <= 2
    assert difference(ours, wanted).float().mean() < (0.06 if rounds_between_axes(interpolation) else 0.06 + 0.25)


def test_evaluation_without_resize_takes_the_whole_image():
    image = picture(np.random.RandomState(4), 90, 60)
    wanted = tensor(image.resize((40, 40), Image.Resampling.BICUBIC))
    assert difference(EvalTransform(40, 0)(tensor(image)), wanted).max() <= 1


def test_impossible_options_are_refused():
    with pytest.raises(ValueError, match=r"DATA.INTERPOLATION must be one of bicubic, bilinear, random, got 'nearest'"):
        config.load(opts=["DATA.INTERPOLATION", "nearest"])
    with pytest.raises(ValueError, match=r"DATA.EVAL_INTERPOLATION must be one of bicubic, bilinear, got 'random'"):
        config.load(opts=["DATA.EVAL_INTERPOLATION", "random"])
    with pytest.raises(ValueError, match=r"DATA.EVAL_RESIZE=31 is smaller than the crop DATA.IMG_SIZE=32"):
        config.load(opts=["DATA.IMG_SIZE", "32", "DATA.EVAL_RESIZE", "31"])
