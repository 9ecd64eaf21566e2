"""RandAugment by timm's functions on a Pillow image: the reference for data/augment/."""

from collections.abc import Sequence

from PIL import Image
from timm.data import auto_augment

from data.augment.rand_augment_policy import Op


def apply(image: Image.Image, ops: Sequence[Op], fill: tuple[int, int, int]) -> Image.Image:
    """Return an RGB image with the operations applied; `fill` is the colour outside the image, for affine ones."""
    for op in ops:
        if op.name.startswith("Posterize") and op.argument is not None and op.argument <= 0:
            image = Image.new("RGB", image.size)  # no bits kept: black in Pillow 12, an error in Pillow 13
            continue
        arguments = () if op.argument is None else (op.argument,)
        resample = Image.Resampling.BILINEAR if op.resample == "bilinear" else Image.Resampling.BICUBIC
        image = auto_augment.NAME_TO_OP[op.name](image, *arguments, fillcolor=fill, resample=resample)
    return image
