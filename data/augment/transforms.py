"""Transforms of decoded images to the uint8 crops that the model is trained or evaluated on.

Training draws every parameter first, from the sample's RNG key and the image's size, then applies them, so that a loader
that crops or augments elsewhere draws the same. Crop, flip, RandAugment and erasing boxes are drawn in this order, each
with torchvision's and timm's semantics and timm's order of draws.
"""

import math
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as tvf

from common.rng import keyed_generator
from common.timeline import Timeline
from data.augment.rand_augment import augment
from data.augment.rand_augment_policy import Op, Policy, draw_ops
from data.augment.random_erasing import RandomErasing

ATTEMPTS = 10
INTERPOLATIONS = {"bilinear": InterpolationMode.BILINEAR, "bicubic": InterpolationMode.BICUBIC}
EVAL_MODES = ("center", "squash", "border")
IMAGENET_FILL = (124, 116, 104)


class Crop(NamedTuple):
    """Part of an image, in its pixels."""

    top: int
    left: int
    height: int
    width: int


@dataclass(frozen=True)
class TrainDraw:
    """Drawn augmentation of one sample."""

    size: int  # of the result, pixels
    crop: Crop
    interpolation: str
    flip: bool
    ops: tuple[Op, ...]
    erase: np.ndarray  # int64 (count, 4)


def draw_crop(
    rng: np.random.RandomState, height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float]
) -> Crop:
    """Draw a random crop of `scale` of the area and `ratio` width to height; after 10 that do not fit, the centre."""
    log_ratio = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(ATTEMPTS):
        area = rng.uniform(*scale) * (width * height)
        aspect = math.exp(rng.uniform(*log_ratio))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return Crop(int(rng.randint(height - h + 1)), int(rng.randint(width - w + 1)), h, w)
    w, h = width, height
    if width / height < ratio[0]:
        h = min(height, round(width / ratio[0]))
    elif width / height > ratio[1]:
        w = min(width, round(height * ratio[1]))
    return Crop((height - h) // 2, (width - w) // 2, h, w)


@dataclass(frozen=True)
class TrainTransform:
    """Random resized crop, flip and RandAugment to a size x size image, by the RNG key (epoch, position).

    The timelines `sizes` and `magnitude` (of RandAugment), where given, override the constants.
    """

    size: int
    seed: int
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    hflip: float = 0.5
    interpolation: Literal["bicubic", "bilinear", "random"] = "bicubic"  # random: one of the two for each image
    policy: Policy | None = None  # None is off
    erase: RandomErasing = field(default_factory=RandomErasing)
    fill: tuple[int, int, int] = IMAGENET_FILL  # outside the image, for RandAugment's affine operations
    sizes: Timeline | None = None
    magnitude: Timeline | None = None

    def size_in(self, epoch: int) -> int:
        """Return the size of an epoch's images."""
        return int(self.sizes.at(epoch)) if self.sizes else self.size

    def policy_in(self, epoch: int) -> Policy | None:
        """Return the RandAugment policy of an epoch."""
        if self.policy and self.magnitude:
            return replace(self.policy, magnitude=self.magnitude.at(epoch))
        return self.policy

    def draw(self, epoch: int, position: int, height: int, width: int) -> TrainDraw:
        """Draw the augmentation of the sample at a position of an epoch, an image of height x width pixels."""
        rng = keyed_generator(self.seed, "augment", epoch, position)
        crop = draw_crop(rng, height, width, self.scale, self.ratio)
        interpolation: str = self.interpolation
        if interpolation == "random":
            interpolation = ("bilinear", "bicubic")[rng.randint(2)]
        flip = bool(rng.random_sample() < self.hflip)
        policy, size = self.policy_in(epoch), self.size_in(epoch)
        ops = draw_ops(policy, rng, self.interpolation) if policy else ()
        return TrainDraw(size, crop, interpolation, flip, ops, self.erase.draw(rng, size))

    def apply(self, image: Tensor, drawn: TrainDraw) -> Tensor:
        """Return the crop, uint8 (3, size, size), of an image, uint8 (3, H, W)."""
        mode = INTERPOLATIONS[drawn.interpolation]
        image = tvf.resized_crop(image, *drawn.crop, [drawn.size, drawn.size], mode, antialias=True)
        if drawn.flip:
            image = image.flip(-1)
        return augment(image, drawn.ops, self.fill)

    def __call__(self, image: Tensor, epoch: int, position: int) -> tuple[Tensor, np.ndarray]:
        """Return the crop and its erasing boxes."""
        drawn = self.draw(epoch, position, image.shape[-2], image.shape[-1])
        return self.apply(image, drawn), drawn.erase


def shorter_side_size(height: int, width: int, resize: int) -> tuple[int, int]:
    """Return (height, width) with the shorter side at `resize`; the longer one is rounded down, as torchvision does."""
    if height <= width:
        return resize, int(resize * width / height)
    return int(resize * height / width), resize


def longer_side_size(height: int, width: int, resize: int) -> tuple[int, int]:
    """Return (height, width) with the longer side at `resize`; the shorter one is rounded, as timm does."""
    ratio = max(height, width) / resize
    return max(1, round(height / ratio)), max(1, round(width / ratio))


@dataclass(frozen=True)
class EvalTransform:
    """Resize, then crop the centre, in one of timm's modes.

    center resizes the shorter side, squash both sides, border the longer side and pads to the crop. With resize 0 the
    crop is the whole image: center is then squash, and squash and border resize to the crop.
    """

    crop: int
    resize: int = 0
    interpolation: str = "bicubic"
    mode: str = "center"
    fill: tuple[int, int, int] = IMAGENET_FILL  # around an image in border mode

    def __post_init__(self) -> None:
        assert self.interpolation in INTERPOLATIONS, self.interpolation
        assert self.mode in EVAL_MODES, self.mode
        assert not 0 < self.resize < self.crop, (self.resize, self.crop)

    def geometry(self, height: int, width: int) -> tuple[tuple[int, int], Crop]:
        """Return (height, width) that an image of height x width pixels is resized to, and the crop of that.

        In border mode the crop may lie outside the image.
        """
        side = self.resize or self.crop
        size = (side, side)
        if self.mode == "border":
            size = longer_side_size(height, width, side)
        elif self.mode == "center" and self.resize:
            size = shorter_side_size(height, width, side)
        top, left = (round((side - self.crop) / 2.0) for side in size)  # to even, as torchvision does
        return size, Crop(top, left, self.crop, self.crop)

    def __call__(self, image: Tensor) -> Tensor:
        """Return uint8 (3, crop, crop) of an image, uint8 (3, H, W)."""
        size, crop = self.geometry(image.shape[-2], image.shape[-1])
        image = tvf.resize(image, list(size), INTERPOLATIONS[self.interpolation], antialias=True)
        return self._pad(image) if self.mode == "border" else tvf.crop(image, *crop)

    def describe(self) -> str:
        """Return a short description of the transform, for the summary."""
        side, crop = self.resize or self.crop, self.crop
        crop_text = "" if side == crop else ", centre crop"
        if self.mode == "border":
            resizing = f"longer side to {side} ({self.interpolation}), border of the mean colour{crop_text}"
        elif self.mode == "center" and self.resize:
            resizing = f"shorter side to {side} ({self.interpolation}), centre crop"
        else:
            resizing = f"squashed to {side}x{side} ({self.interpolation}){crop_text}"
        return f"{crop} px: {resizing}"

    def _pad(self, image: Tensor) -> Tensor:
        height, width = (min(side, self.crop) for side in image.shape[-2:])
        top, left = (self.crop - height) // 2, (self.crop - width) // 2
        square = torch.tensor(self.fill, dtype=torch.uint8).view(3, 1, 1).repeat(1, self.crop, self.crop)
        square[:, top : top + height, left : left + width] = tvf.center_crop(image, [height, width])
        return square
