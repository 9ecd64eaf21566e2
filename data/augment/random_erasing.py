"""Random erasing: boxes drawn by the sample's RNG key on the CPU, filled on the device.

"Random Erasing Data Augmentation", Zhong et al. 2017, with timm's draws (timm/data/random_erasing.py). The noise inside
a box is drawn on the device, so it is the same for any number of processes but differs between CPU and CUDA.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

ATTEMPTS = 10


@dataclass(frozen=True)
class RandomErasing:
    """Distribution of erasing boxes: with probability `prob`, 1 to `count` boxes that cover the fraction `area` of the image together."""

    prob: float = 0.25
    count: int = 1
    area: tuple[float, float] = (0.02, 1 / 3)
    aspect: tuple[float, float] = (0.3, 1 / 0.3)

    @property
    def slots(self) -> int:
        """Number of boxes stored per image, 0 if erasing is off."""
        return self.count if self.prob > 0 else 0

    def draw(self, rng: np.random.RandomState, size: int) -> np.ndarray:
        """Return boxes for one square image, int64 (slots, 4) as top, left, height, width; zeros for no box."""
        boxes = np.zeros((self.slots, 4), dtype=np.int64)
        if not self.slots or rng.random_sample() > self.prob:
            return boxes
        count = 1 if self.count == 1 else rng.randint(1, self.count + 1)
        log_aspect = math.log(self.aspect[0]), math.log(self.aspect[1])
        for box in boxes[:count]:
            for _ in range(ATTEMPTS):
                area = rng.uniform(*self.area) * size * size / count
                aspect = math.exp(rng.uniform(*log_aspect))
                height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
                if height < size and width < size:
                    box[:] = rng.randint(size - height + 1), rng.randint(size - width + 1), height, width
                    break
        return boxes


def erase(images: Tensor, boxes: Tensor, mode: str, generator: torch.Generator) -> Tensor:
    """Fill boxes (B, count, 4) of normalised images (B, C, S, S) in place, without synchronising with the device.

    Modes: pixel (standard normal noise), rand (one normal colour per box), const (zero, the mean colour).
    """
    if images.device.type == "cpu":
        return _erase_boxes(images, boxes, mode, generator)
    return _erase_masked(images, boxes, mode, generator)


def _erase_boxes(images: Tensor, boxes: Tensor, mode: str, generator: torch.Generator) -> Tensor:
    """Erase on the CPU, box by box."""
    numbers = boxes.tolist()
    if not any(height for own in numbers for _, _, height, _ in own):
        return images
    noise = _pixel_noise(images, generator) if mode == "pixel" else None
    for slot in range(boxes.shape[1]):
        colours = _colour_noise(images, generator) if mode == "rand" else None
        for row, own in enumerate(numbers):
            top, left, height, width = own[slot]
            if not height:
                continue
            region = row, slice(None), slice(top, top + height), slice(left, left + width)
            images[region] = noise[region] if noise is not None else 0.0 if colours is None else colours[row]
    return images


def _erase_masked(images: Tensor, boxes: Tensor, mode: str, generator: torch.Generator) -> Tensor:
    """Erase the whole batch by a mask, on a device whose boxes the host must not read."""
    along = torch.arange(images.shape[-1], device=images.device)
    top, left, height, width = boxes.unsqueeze(-1).unbind(2)  # each (B, count, 1)
    rows = (along >= top) & (along < top + height)  # (B, count, H)
    columns = (along >= left) & (along < left + width)  # (B, count, W)
    inside = rows.unsqueeze(3) & columns.unsqueeze(2)  # (B, count, H, W)
    if mode == "rand":
        for own in inside.unbind(1):
            torch.where(own.unsqueeze(1), _colour_noise(images, generator), images, out=images)
        return images
    inside = inside.any(1, keepdim=True)
    if mode == "const":
        return images.masked_fill_(inside, 0.0)
    return torch.where(inside, _pixel_noise(images, generator), images, out=images)


def _pixel_noise(images: Tensor, generator: torch.Generator) -> Tensor:
    """Draw noise for every pixel, in channels-last memory order, which is six times as fast on the CPU."""
    shape = images.permute(0, 2, 3, 1).shape
    return torch.randn(shape, device=images.device, generator=generator).permute(0, 3, 1, 2)


def _colour_noise(images: Tensor, generator: torch.Generator) -> Tensor:
    """Draw a normal colour for every image, (B, C, 1, 1)."""
    return torch.randn(*images.shape[:2], 1, 1, device=images.device, generator=generator)
