"""Drawn operations of a batch, packed into tensors and sorted into groups that one pass over the images can run."""

# E operations: of a batch, all images and layers together, or of one group

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch
from torch import Tensor

from data.augment.affine import AXES, matrix
from data.augment.color import argument_table, base_name
from data.augment.color_batch import FILTERS, IMAGE_TABLES
from data.augment.rand_augment_policy import Op

LOOK_UP = "look-up"
ARGUMENT_TABLE = "argument table"  # an operation whose table depends on its argument alone, whatever its name
RowCounts = tuple[tuple[str, int], ...]  # operations in the order of a group's rows, with their numbers of rows


@dataclass(frozen=True)
class OpGroup:
    """Operations of one kind and layer, one for each of E images."""

    kind: str  # LOOK_UP, one of color_batch.FILTERS, or the axes and resampling of an affine operation
    row_counts: RowCounts  # one operation, but for look-ups
    images: Tensor  # int64 (E,), the image each is for
    numbers: Tensor  # float64 (E, 6), affine coefficients, or a factor in the first column
    tables: Tensor  # uint8 (E, 256), of look-ups whose table depends on the argument alone


@dataclass(frozen=True)
class PackedOps:
    """The operations of a batch, with the fields of OpGroup for all groups together."""

    kinds: tuple[tuple[str, RowCounts], ...]  # of the groups, in the order in which they run
    images: Tensor
    numbers: Tensor
    tables: Tensor

    @property
    def groups(self) -> list[OpGroup]:
        """Return the groups in the order in which they run; their tensors are views."""
        rows = [sum(count for _, count in row_counts) for _, row_counts in self.kinds]
        views = zip(*(tensor.split(rows) for tensor in (self.images, self.numbers, self.tables)), strict=True)
        return [OpGroup(kind, row_counts, *own) for (kind, row_counts), own in zip(self.kinds, views, strict=True)]

    def to(self, device: torch.device) -> "PackedOps":
        """Return the operations on a device."""
        tensors = [self.images, self.numbers, self.tables]
        if device.type == "cuda":
            tensors = [tensor.pin_memory() for tensor in tensors]
        return PackedOps(self.kinds, *(tensor.to(device, non_blocking=True) for tensor in tensors))


def pack(ops: Sequence[Sequence[Op]], size: int) -> PackedOps:
    """Sort the operations of a batch of size x size images into groups, layer by layer."""
    kinds: list[tuple[str, RowCounts]] = []
    entries: list[tuple[int, Op]] = []
    for layer in range(max(map(len, ops), default=0)):
        present = [(image, own[layer]) for image, own in enumerate(ops) if len(own) > layer]
        present.sort(key=lambda entry: (_kind(entry[1]), _row_name(entry[1])))
        for kind, members in groupby(present, lambda entry: _kind(entry[1])):
            row_counts = []
            for name, same in groupby(members, lambda entry: _row_name(entry[1])):
                before = len(entries)
                entries += same
                row_counts.append((name, len(entries) - before))
            kinds.append((kind, tuple(row_counts)))
    numbers, tables = np.zeros((len(entries), 6)), np.zeros((len(entries), 256), dtype=np.uint8)
    for row, (_, op) in enumerate(entries):
        if op.name in AXES:
            numbers[row] = matrix(op.name, op.argument or 0.0, size)
        elif _row_name(op) == ARGUMENT_TABLE:
            tables[row] = argument_table(op.name, op.argument or 0.0)
        else:
            numbers[row, 0] = op.argument or 0.0
    images = torch.tensor([image for image, _ in entries], dtype=torch.int64)
    return PackedOps(tuple(kinds), images, torch.from_numpy(numbers), torch.from_numpy(tables))


def _kind(op: Op) -> str:
    """Return OpGroup.kind of an operation."""
    if op.name in AXES:
        return f"{AXES[op.name]} {op.resample}"
    name = base_name(op.name)
    return name if name in FILTERS else LOOK_UP


def _row_name(op: Op) -> str:
    """Return the name of an operation within its group."""
    name = base_name(op.name)
    return name if name in IMAGE_TABLES or name in FILTERS or name in AXES else ARGUMENT_TABLE
