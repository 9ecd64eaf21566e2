"""RandAugment on uint8 tensors, with operations that were drawn by rand_augment_policy.py; the pixels are Pillow's bit for bit.

On the CPU one image after the other, all operations of each; elsewhere the whole batch, group by group. The host knows which
image gets which operation, so that nothing synchronises with the device.
"""

# B batch, S side of the square images

from collections.abc import Sequence

import torch
from torch import Tensor

from data.augment.op_groups import pack
from data.augment.operations import run_group, run_op
from data.augment.rand_augment_policy import Op


class RandAugment:
    """Apply drawn operations to a batch of images that are all S x S."""

    def __init__(self, fill: tuple[int, int, int], device: torch.device | str = "cpu") -> None:
        """`fill` is the colour outside the image, for affine operations."""
        self.device = torch.device(device)
        self.fill = torch.tensor(fill, dtype=torch.uint8, device=self.device)

    def __call__(self, images: Tensor, ops: Sequence[Sequence[Op]]) -> Tensor:
        """Return uint8 (B, 3, S, S) with the operations of each image applied, in new memory."""
        if self.device.type == "cpu":
            return torch.stack([_augment(image, own, self.fill) for image, own in zip(images, ops, strict=True)])
        return self.grouped(images, ops)

    def grouped(self, images: Tensor, ops: Sequence[Sequence[Op]]) -> Tensor:
        """Return the same as __call__, group by group as on a GPU, on any device."""
        images = images.clone()
        for group in pack(ops, images.shape[-1]).to(self.device).groups:
            images.index_copy_(0, group.images, run_group(images.index_select(0, group.images), group, self.fill))
        return images


def augment(image: Tensor, ops: Sequence[Op], fill: tuple[int, int, int]) -> Tensor:
    """Return uint8 (3, S, S) with the operations applied, on the CPU; `fill` is the colour outside the image."""
    return _augment(image, ops, torch.tensor(fill, dtype=torch.uint8)) if ops else image


def _augment(image: Tensor, ops: Sequence[Op], fill: Tensor) -> Tensor:
    for op in ops:
        image = run_op(image, op, fill)
    return image
