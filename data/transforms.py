"""From a decoded image to the uint8 crop the model is trained or evaluated on.

Training draws every parameter first, from the sample's address and the image's size, then applies them: a loader that
crops or augments elsewhere shares the drawing. Crop, flip, RandAugment and erasing boxes are drawn in this order, each
with torchvision's and timm's semantics and timm's order of draws.
"""

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as tvf

from data import rand_augment
from data.address import generator
from data.augment import augment
from data.erasing import EraseBoxes

ATTEMPTS = 10
INTERPOLATIONS = {"bilinear": InterpolationMode.BILINEAR, "bicubic": InterpolationMode.BICUBIC}
IMAGENET_FILL = (124, 116, 104)


class Crop(NamedTuple):
    """A piece of an image, in its pixels."""

    top: int
    left: int
    height: int
    width: int


@dataclass(frozen=True)
class TrainDraw:
    """All random choices for one sample."""

    crop: Crop
    interpolation: str
    flip: bool
    ops: tuple[rand_augment.Op, ...]
    erase: np.ndarray  # int64 (count, 4)
    size: int  # side of the result


def draw_crop(
    rng: np.random.RandomState, height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float]
) -> Crop:
    """Draw a random crop of `scale` of the area and `ratio` width to height; after 10 misfits, the centre."""
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
    """Random resized crop, flip and RandAugment to a size x size image, by the address (epoch, position)."""

    size: int
    seed: int
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    hflip: float = 0.5
    interpolation: str = "bicubic"  # bicubic, bilinear, or random of the two
    policy: rand_augment.Policy | None = None  # None is off
    erase: EraseBoxes = field(default_factory=EraseBoxes)
    fill: tuple[int, int, int] = IMAGENET_FILL  # what RandAugment's geometric operations bring in from outside

    def __post_init__(self) -> None:
        if self.interpolation not in (*INTERPOLATIONS, "random"):
            raise ValueError(f"DATA.INTERPOLATION={self.interpolation!r} must be bicubic, bilinear or random")

    def draw(self, epoch: int, position: int, height: int, width: int) -> TrainDraw:
        """Draw the choices for the sample at a position of an epoch, an image of height x width pixels."""
        rng = generator(self.seed, "augment", epoch, position)
        crop = draw_crop(rng, height, width, self.scale, self.ratio)
        interpolation = self.interpolation
        if interpolation == "random":
            interpolation = ("bilinear", "bicubic")[rng.randint(2)]
        flip = bool(rng.random_sample() < self.hflip)
        ops = rand_augment.draw(self.policy, rng, self.interpolation) if self.policy else ()
        return TrainDraw(crop, interpolation, flip, ops, self.erase.draw(rng, self.size), self.size)

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


@dataclass(frozen=True)
class EvalTransform:
    """Resize the shorter side, then crop the centre; with resize 0, the whole image becomes the crop."""

    crop: int
    resize: int = 0
    interpolation: str = "bicubic"

    def __post_init__(self) -> None:
        if self.interpolation not in INTERPOLATIONS:
            raise ValueError(f"DATA.EVAL_INTERPOLATION={self.interpolation!r} must be bicubic or bilinear")
        if 0 < self.resize < self.crop:
            raise ValueError(f"DATA.EVAL_RESIZE={self.resize} must be 0 or at least the crop DATA.IMG_SIZE={self.crop}")

    def geometry(self, height: int, width: int) -> tuple[tuple[int, int], Crop]:
        """Return (height, width) that an image of height x width pixels is resized to, and the crop of that."""
        size = shorter_side_size(height, width, self.resize) if self.resize else (self.crop, self.crop)
        top, left = (round((side - self.crop) / 2.0) for side in size)  # to even, as torchvision does
        return size, Crop(top, left, self.crop, self.crop)

    def __call__(self, image: Tensor) -> Tensor:
        """Return uint8 (3, crop, crop) of an image, uint8 (3, H, W)."""
        size, crop = self.geometry(image.shape[-2], image.shape[-1])
        image = tvf.resize(image, list(size), INTERPOLATIONS[self.interpolation], antialias=True)
        return tvf.crop(image, *crop)
