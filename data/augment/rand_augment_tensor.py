"""RandAugment on uint8 tensors with operations drawn by data/augment/rand_augment.py; the pixels are those of Pillow, to the bit.

On the CPU one image after the other, which fits the caches; elsewhere the whole batch, in one pass for each kind of
operation and layer. Which image gets which operation is known on the host, so nothing waits for the device.
"""

# B batch, S side, E operations of a batch, all images and layers together

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data.augment import color, rand_augment
from data.augment.affine import AXES, affine, matrix
from data.augment.affine_cpu import affine_cpu
from data.augment.color_cpu import color_cpu
from data.augment.rand_augment import Op

LOOK_UP = "look-up"


@dataclass(frozen=True)
class Group:
    """Operations of one layer that run together: some rows of the packed operations."""

    kind: str  # look-up, a filter of color.FILTERS, or axes and resampling of an affine one
    parts: tuple[tuple[str, slice], ...]  # operation (one for all but look-ups) and its rows

    @property
    def rows(self) -> slice:
        """All rows of the group."""
        return slice(self.parts[0][1].start, self.parts[-1][1].stop)


@dataclass(frozen=True)
class Packed:
    """The operations of a batch as tensors; groups run in order."""

    groups: tuple[Group, ...]
    images: Tensor  # int64 (E,), which image each is for
    numbers: Tensor  # float64 (E, 6), an affine matrix, or a factor in the first column
    tables: Tensor  # uint8 (E, 256), of operations with a given table

    def to(self, device: torch.device) -> "Packed":
        """Return the operations on a device."""
        tensors = [self.images, self.numbers, self.tables]
        if device.type == "cuda":
            tensors = [tensor.pin_memory() for tensor in tensors]
        return Packed(self.groups, *(tensor.to(device, non_blocking=True) for tensor in tensors))


class RandAugment:
    """Run drawn operations on a batch of images that are all S x S."""

    def __init__(self, fill: tuple[int, int, int], device: torch.device | str = "cpu") -> None:
        self.fill, self.device = fill, torch.device(device)
        self._colour = torch.tensor(fill, dtype=torch.uint8, device=self.device)

    def __call__(self, images: Tensor, ops: Sequence[Sequence[Op]]) -> Tensor:
        """Return uint8 (B, 3, S, S) with the operations of each image run; the images given stay as they are."""
        if self.device.type == "cpu":
            return torch.stack([augment(image, own, self.fill) for image, own in zip(images, ops, strict=True)])
        return self.grouped(images, ops)

    def grouped(self, images: Tensor, ops: Sequence[Sequence[Op]]) -> Tensor:
        """The same for the whole batch at a time, as it runs on a GPU."""
        packed = pack(ops, images.shape[-1]).to(self.device)
        images = images.clone()
        for group in packed.groups:
            own = packed.images[group.rows]
            images.index_copy_(0, own, self._run(group, images.index_select(0, own), packed))
        return images

    def _run(self, group: Group, images: Tensor, packed: Packed) -> Tensor:
        numbers = packed.numbers[group.rows]
        if group.kind == LOOK_UP:
            return color.look_up(images, _tables(group, images, packed))
        if group.kind in color.FILTERS:
            return color.FILTERS[group.kind](images, numbers[:, 0])
        axes, resample = group.kind.split()
        return affine(images, numbers, axes, resample, self._colour)


def augment(image: Tensor, ops: Sequence[Op], fill: tuple[int, int, int]) -> Tensor:
    """Return uint8 (3, S, S) with the operations run, on the CPU."""
    for op in ops:
        kind = _kind(op)
        if kind in ("x bicubic", "y bicubic"):
            image = affine_cpu(image, matrix(op.name, _argument(op), image.shape[-1]), kind[0], fill)
        elif op.name in AXES:  # where Pillow is as fast
            picture = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
            picture = rand_augment.apply(picture, [op], fill)
            image = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
        else:
            planes = image.contiguous().numpy()
            image = torch.from_numpy(color_cpu(planes, op.name.removesuffix("Increasing"), op.argument or 0.0))
    return image


def pack(ops: Sequence[Sequence[Op]], size: int) -> Packed:
    """Sort the operations of a batch of size x size images into groups, layer by layer."""
    groups: list[Group] = []
    entries: list[tuple[int, Op]] = []
    for layer in range(max(map(len, ops), default=0)):
        present = [(row, own[layer]) for row, own in enumerate(ops) if len(own) > layer]
        present.sort(key=lambda entry: (_kind(entry[1]), _base(entry[1])))
        for kind, members in groupby(present, lambda entry: _kind(entry[1])):
            parts = []
            for name, same in groupby(members, lambda entry: _base(entry[1])):
                start = len(entries)
                entries += same
                parts.append((name, slice(start, len(entries))))
            groups.append(Group(kind, tuple(parts)))
    numbers, tables = np.zeros((len(entries), 6)), np.zeros((len(entries), 256), dtype=np.uint8)
    for row, (_, op) in enumerate(entries):
        if op.name in AXES:
            numbers[row] = matrix(op.name, _argument(op), size)
        elif _base(op) == "given":
            tables[row] = color.given_table(op.name, op.argument or 0.0)
        else:
            numbers[row, 0] = op.argument or 0.0
    rows = torch.tensor([row for row, _ in entries], dtype=torch.int64)
    return Packed(tuple(groups), rows, torch.from_numpy(numbers), torch.from_numpy(tables))


def _base(op: Op) -> str:
    """Return what distinguishes an operation within its group: its name, or "given" where it is a given table."""
    name = op.name.removesuffix("Increasing")
    return name if name in color.TABLES or name in color.FILTERS or name in AXES else "given"


def _kind(op: Op) -> str:
    if op.name in AXES:
        return f"{AXES[op.name]} {op.resample}"
    base = _base(op)
    return base if base in color.FILTERS else LOOK_UP


def _argument(op: Op) -> float:
    assert op.argument is not None
    return op.argument


def _tables(group: Group, images: Tensor, packed: Packed) -> Tensor:
    """Return the tables of a look-up, uint8 (B, 3, 256)."""
    tables = []
    for name, rows in group.parts:
        if name == "given":
            tables.append(packed.tables[rows].unsqueeze(1).expand(-1, 3, -1))
        else:
            own = images[rows.start - group.rows.start : rows.stop - group.rows.start]
            tables.append(color.TABLES[name](own, packed.numbers[rows, 0]))
    return torch.cat(tables)
