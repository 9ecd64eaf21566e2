"""Mixup, cutmix and label smoothing for a micro-batch, as timm's Mixup in mode "batch".

"mixup", Zhang et al. 2018, and "CutMix", Yun et al. 2019, in timm's version (timm/data/mixup.py): one draw for the
whole micro-batch, each image mixed with its counterpart in the flipped batch. The draw is made on the host, so that
neither drawing nor mixing synchronises with the device.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class MixupDraw(NamedTuple):
    """Drawn mixing of a micro-batch: weight of each image itself, and box taken from its partner (None: mixup)."""

    share: float  # timm's lam; 1 leaves the batch unchanged
    box: tuple[int, int, int, int] | None = None  # top, bottom, left, right

    @property
    def blends(self) -> bool:
        """Return True if pixels are weighted sums of two images, as in mixup but not in cutmix."""
        return self.share != 1.0 and self.box is None


@dataclass(frozen=True)
class Mixup:
    """Parameters of mixup, cutmix and label smoothing; an alpha (`mixup`, `cutmix`) of 0 turns its method off."""

    num_classes: int
    mixup: float = 0.8
    cutmix: float = 1.0
    prob: float = 1.0
    switch_prob: float = 0.5
    smoothing: float = 0.1

    def draw(self, rng: np.random.RandomState, size: int) -> MixupDraw:
        """Draw the mixing of one micro-batch of size x size images."""
        if (self.mixup <= 0 and self.cutmix <= 0) or rng.random_sample() >= self.prob:
            return MixupDraw(1.0)
        use_cutmix = self.cutmix > 0
        if self.mixup > 0 and self.cutmix > 0:
            use_cutmix = rng.random_sample() < self.switch_prob
        alpha = self.cutmix if use_cutmix else self.mixup
        share = float(rng.beta(alpha, alpha))
        if not use_cutmix or share == 1.0:
            return MixupDraw(share)
        side = int(size * np.sqrt(1 - share))
        centre = rng.randint(size), rng.randint(size)
        (top, bottom), (left, right) = ((max(c - side // 2, 0), min(c + (side + 1) // 2, size)) for c in centre)
        return MixupDraw(1.0 - (bottom - top) * (right - left) / float(size * size), (top, bottom, left, right))

    def targets(self, labels: Tensor, share: float) -> Tensor:
        """Return the soft targets of a mixed micro-batch, float32 (B, classes)."""
        off = self.smoothing / self.num_classes
        target = torch.full((len(labels), self.num_classes), off, device=labels.device)
        target.scatter_(1, labels.view(-1, 1), 1.0 - self.smoothing + off)
        return target * share + target.flip(0) * (1.0 - share)


def mix_images(images: Tensor, mix: MixupDraw) -> Tensor:
    """Mix a batch of images (B, C, S, S) with its flipped self, in place."""
    if mix.share == 1.0:
        return images
    if mix.box is None:
        partner = images.flip(0).mul_(1.0 - mix.share)
        return images.mul_(mix.share).add_(partner)
    top, bottom, left, right = mix.box
    images[:, :, top:bottom, left:right] = images[:, :, top:bottom, left:right].flip(0)
    return images
