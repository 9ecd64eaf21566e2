"""RandAugment's operations on pixels: one entry for one image on the CPU and for a batch on any device.

Both forms give Pillow's pixels bit for bit. One image is computed by NumPy's small integers, which fit the caches; a batch
by torch, in one pass for each group of operations.
"""

# S side of the square images, E operations of a group

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data.augment.affine import AXES, matrix
from data.augment.affine_batch import affine_batch
from data.augment.affine_cpu import affine_cpu
from data.augment.color_batch import FILTERS, IMAGE_TABLES, look_up
from data.augment.color_cpu import color_cpu
from data.augment.op_groups import ARGUMENT_TABLE, LOOK_UP, OpGroup
from data.augment.rand_augment_policy import Op

RESAMPLING = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


def run_op(image: Tensor, op: Op, fill: Tensor) -> Tensor:
    """Return an image, uint8 (3, S, S) on the CPU, with an operation applied.

    `fill`, uint8 (3,), is the colour outside the image.
    """
    if op.name in AXES:
        return _affine_image(image, op, fill)
    return torch.from_numpy(color_cpu(image.contiguous().numpy(), op.name, op.argument or 0.0))


def run_group(images: Tensor, group: OpGroup, fill: Tensor) -> Tensor:
    """Return the images of a group, uint8 (E, 3, S, S) on its device, with its operations applied, without synchronising.

    `fill`, uint8 (3,), is the colour outside the images.
    """
    if group.kind == LOOK_UP:
        return look_up(images, _tables(images, group))
    if group.kind in FILTERS:
        return FILTERS[group.kind](images, group.numbers[:, 0])
    axes, resample = group.kind.split()
    return affine_batch(images, group.numbers, axes, resample, fill)


def _affine_image(image: Tensor, op: Op, fill: Tensor) -> Tensor:
    coefficients = matrix(op.name, op.argument or 0.0, image.shape[-1])
    if op.resample == "bicubic" and len(AXES[op.name]) == 1:
        return affine_cpu(image, coefficients, AXES[op.name], fill)
    picture = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())  # Pillow is as fast here
    picture = picture.transform(
        picture.size, Image.Transform.AFFINE, coefficients, RESAMPLING[op.resample], fillcolor=tuple(fill.tolist())
    )
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def _tables(images: Tensor, group: OpGroup) -> Tensor:
    """Return the tables of a group of look-ups, uint8 (E, 3, 256)."""
    counts = [count for _, count in group.row_counts]
    split = zip(*(t.split(counts) for t in (images, group.numbers[:, 0], group.tables)), strict=True)
    return torch.cat(
        [
            tables.unsqueeze(1).expand(-1, 3, -1) if name == ARGUMENT_TABLE else IMAGE_TABLES[name](own, arguments)
            for (name, _), (own, arguments, tables) in zip(group.row_counts, split, strict=True)
        ]
    )
