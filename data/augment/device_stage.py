"""The part of the data path that runs on the device: uint8 batches become normalised, erased and mixed floats."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from common.rng import keyed_generator, keyed_torch_seed
from common.timeline import Timeline
from data.augment.mixup import Mixup, mix_images
from data.augment.random_erasing import erase
from data.loaders.batch import Batch

EraseMode = Literal["pixel", "rand", "const"]
Order = Literal["erase_then_mix", "mix_then_erase"]


class DeviceStage:
    """Turn a loader's batch into what the model and the loss take.

    Orders: erase_then_mix normalises, erases, mixes (timm with its loss on soft targets); mix_then_erase mixes pixel
    values and rounds them, normalises, erases (timm's FastCollateMixup, which SG-Former uses). A timeline `mix_prob`
    takes the place of the mixing's constant one.
    """

    def __init__(
        self,
        mixing: Mixup,
        mean: Sequence[float],
        std: Sequence[float],
        seed: int,
        device: torch.device | str = "cpu",
        erase_mode: EraseMode = "pixel",
        order: Order = "erase_then_mix",
        mix_prob: Timeline | None = None,
    ) -> None:
        self.mixing, self.seed, self.erase_mode, self.order = mixing, seed, erase_mode, order
        self.mix_prob = mix_prob
        self.device = torch.device(device)
        self.mean = torch.tensor([255.0 * value for value in mean], device=self.device).view(1, 3, 1, 1)
        self.std = torch.tensor([255.0 * value for value in std], device=self.device).view(1, 3, 1, 1)
        self._rows: dict[int, tuple[Tensor, Tensor]] = {}
        self._noise = torch.Generator(self.device)

    def train(self, batch: Batch, update: int, micro: int, epoch: int) -> tuple[Tensor, Tensor]:
        """Move a batch to the device; return images float32 (B, 3, S, S), channels last, and soft targets (B, classes).

        (epoch, update, micro) is the micro-batch's address: it alone decides noise and mixing, so `micro` is its number
        within the update over all processes. `update` may count from the start of the run or of the epoch.
        """
        batch = batch.to(self.device, non_blocking=True)
        address = epoch, update, micro
        mixing = replace(self.mixing, prob=self.mix_prob.at(epoch)) if self.mix_prob else self.mixing
        mix = mixing.draw(keyed_generator(self.seed, "mix", *address), batch.images.shape[-1])
        images = self._float(batch.images)
        if self.order == "mix_then_erase":
            images = mix_images(images, mix)
            if mix.blends:
                images.round_()
            images = self._erase(self._normalise(images), batch, address)
        else:
            images = mix_images(self._erase(self._normalise(images), batch, address), mix)
        return images, self.mixing.targets(batch.labels, mix.share)

    def evaluate(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Move a batch to the device; return normalised images float32 (B, 3, S, S), channels last, and labels (B,)."""
        batch = batch.to(self.device, non_blocking=True)
        return self._normalise(self._float(batch.images)), batch.labels

    def _float(self, images: Tensor) -> Tensor:
        """Return the images as float32, channels last; those given stay as they are."""
        count, channels, height, width = images.shape
        pixels = torch.empty(count, height, width, channels, device=self.device).permute(0, 3, 1, 2)
        if self.device.type == "cpu" and images.is_contiguous():  # four times as fast there as all planes in one call
            for plane, values in zip(pixels.unbind(1), images.unbind(1), strict=True):
                plane.copy_(values)
            return pixels
        return pixels.copy_(images)

    def _normalise(self, images: Tensor) -> Tensor:
        """Subtract the mean and divide by the deviation, in place; images must be channels last."""
        count, channels, height, width = images.shape
        if width not in self._rows:  # of a row of pixels each: on the CPU nine times as fast as three numbers
            self._rows[width] = self.mean.flatten().repeat(width), self.std.flatten().repeat(width)
        mean, std = self._rows[width]
        images.permute(0, 2, 3, 1).view(count, height, width * channels).sub_(mean).div_(std)
        return images

    def _erase(self, images: Tensor, batch: Batch, address: tuple[int, int, int]) -> Tensor:
        if batch.erase is None or batch.erase.shape[1] == 0:
            return images
        self._noise.manual_seed(keyed_torch_seed(self.seed, "erase", *address))
        return erase(images, batch.erase, self.erase_mode, self._noise)
