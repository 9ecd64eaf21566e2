"""Random erasing: boxes drawn with the sample's address on the CPU, filled on the device.

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
class EraseBoxes:
    """How boxes are drawn: with probability `prob`, 1 to `count` boxes of together `area` of the image."""

    prob: float = 0.25
    count: int = 1
    area: tuple[float, float] = (0.02, 1 / 3)
    aspect: tuple[float, float] = (0.3, 1 / 0.3)

    @property
    def slots(self) -> int:
        """Boxes stored per image, 0 if erasing is off."""
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
    """Fill boxes (B, count, 4) of normalised images (B, C, S, S); nothing waits for the device.

    Modes: pixel (standard normal noise), rand (one normal colour per box), const (zero, the mean colour).
    """
    noise = images.new_zeros(())
    if mode == "pixel":  # drawn in the order of memory, six times as fast on the CPU
        shape = images.permute(0, 2, 3, 1).shape  # (B, S, S, C), images being channels last
        noise = torch.randn(shape, device=images.device, generator=generator).permute(0, 3, 1, 2)
    along = torch.arange(images.shape[-1], device=images.device)
    for top, left, height, width in (box.unsqueeze(-1).unbind(1) for box in boxes.unbind(1)):  # each (B, 1)
        rows = (along >= top) & (along < top + height)  # (B, H)
        columns = (along >= left) & (along < left + width)  # (B, W)
        if mode == "rand":
            noise = torch.randn(*images.shape[:2], 1, 1, device=images.device, generator=generator)
        images = torch.where((rows.unsqueeze(2) & columns.unsqueeze(1)).unsqueeze(1), noise, images)
    return images
