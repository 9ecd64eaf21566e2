"""Batch of uint8 images, as every loader yields it, before normalising, erasing and mixing on the device."""

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class BadImage:
    """A file that could not be read, and the image that replaces it."""

    path: str
    reason: str
    replaced_by: str
    index: int
    replaced_by_index: int


@dataclass(frozen=True)
class Batch:
    """Images with their labels; B images of S x S pixels."""

    images: Tensor  # uint8 (B, 3, S, S)
    labels: Tensor  # int64 (B,)
    indices: Tensor  # int64 (B,), each image's index in its data set
    erase: Tensor | None = None  # training: int64 (B, count, 4), boxes as top, left, height, width; size zero: no box
    bad: tuple[BadImage, ...] = ()  # training: unreadable images; `labels` and `indices` are those of the replacements

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Batch":
        """Return the batch on a device."""
        moved = {name: value.to(device, non_blocking=non_blocking) for name, value in self._tensors().items()}
        return replace(self, **moved)

    def pin_memory(self) -> "Batch":
        """Return the batch in page-locked memory; DataLoader calls this method."""
        return replace(self, **{name: value.pin_memory() for name, value in self._tensors().items()})

    def _tensors(self) -> dict[str, Any]:
        return {f.name: value for f in fields(self) if isinstance(value := getattr(self, f.name), Tensor)}
