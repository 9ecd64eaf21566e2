"""Colour operations of RandAugment for a batch, with Pillow's levels exactly.

All look-ups of a batch take one gather, whatever their operations. Each function takes uint8 (B, 3, H, W) and float64 (B,)
arguments on any device, and does not synchronise with it.
"""

# B batch, H W pixels, L = 256 levels

from collections.abc import Callable

import torch
from torch import Tensor

from data.augment.color import GREY_WEIGHTS


def autocontrast_tables(images: Tensor) -> Tensor:
    """Return tables uint8 (B, 3, L) that stretch each channel to 0 .. 255."""
    low, high = (f(images.flatten(2), 2).to(torch.float64).unsqueeze(-1) for f in (torch.amin, torch.amax))  # (B, 3, 1)
    levels = torch.arange(256, dtype=torch.float64, device=images.device)
    scale = torch.full_like(high, 255.0) / (high - low)  # 255.0 / tensor would multiply by a rounded reciprocal
    stretched = (levels * scale - low * scale).clamp_(0, 255)  # nan where a channel has one level
    return torch.where(high > low, stretched, levels).to(torch.uint8)


def equalize_tables(images: Tensor) -> Tensor:
    """Return tables uint8 (B, 3, L) that spread each channel's levels evenly."""
    flat = images.flatten(2).to(torch.int64)
    counts = torch.zeros(*flat.shape[:2], 256, dtype=torch.int64, device=images.device)
    counts.scatter_add_(2, flat, torch.ones_like(flat))
    highest = counts.gather(2, flat.amax(2, keepdim=True))  # (B, 3, 1) pixels of the highest level
    step = (flat.shape[2] - highest) // 255
    below = counts.cumsum(2) - counts
    spread = ((step // 2 + below) // step.clamp(min=1)).clamp_(max=255)
    return torch.where(step > 0, spread, torch.arange(256, device=images.device)).to(torch.uint8)


def contrast_tables(images: Tensor, factors: Tensor) -> Tensor:
    """Return tables uint8 (B, 3, L) that blend with the image's mean grey."""
    mean = (grey(images).sum((1, 2, 3), dtype=torch.int64).to(torch.float64) / images[0, 0].numel() + 0.5).floor()
    levels = torch.arange(256, dtype=torch.float32, device=images.device)
    return blend(mean.float().view(-1, 1), levels, factors.view(-1, 1)).unsqueeze(1).expand(-1, 3, -1)


def look_up(images: Tensor, tables: Tensor) -> Tensor:
    """Return the images with each channel's levels, uint8 (B, 3, H, W), replaced by its table's, uint8 (B, 3, L)."""
    return tables.gather(2, images.flatten(2).to(torch.int64)).view(images.shape)


def color(images: Tensor, factors: Tensor) -> Tensor:
    """Blend with grey."""
    return blend(grey(images).float(), images, factors.view(-1, 1, 1, 1))


def sharpness(images: Tensor, factors: Tensor) -> Tensor:
    """Blend with the image smoothed by [1 1 1, 1 5 1, 1 1 1] / 13, whose border pixels stay."""
    pixels = images.to(torch.float32)
    lines = pixels[..., :-2] + pixels[..., 1:-1] + pixels[..., 2:]
    total = lines[..., :-2, :] + lines[..., 1:-1, :] + lines[..., 2:, :] + 4 * pixels[..., 1:-1, 1:-1]
    smooth = pixels.clone()
    smooth[..., 1:-1, 1:-1] = (total / 13 + 0.5).floor_()  # never within 1/26 of the next integer: exact in float32
    return blend(smooth, pixels, factors.view(-1, 1, 1, 1))


def grey(images: Tensor) -> Tensor:
    """Return Pillow's luminance, int32 (B, 1, H, W)."""
    red, green, blue = images.to(torch.int32).split(1, 1)
    return (red * GREY_WEIGHTS[0] + green * GREY_WEIGHTS[1] + blue * GREY_WEIGHTS[2] + 32768) >> 16


def blend(start: Tensor, end: Tensor, factors: Tensor) -> Tensor:
    """Return start + factor * (end - start) in float32, cut off to uint8, as Pillow's Image.blend."""
    return ((end - start) * factors.to(torch.float32) + start).clamp_(0, 255).to(torch.uint8)


# Operations whose table depends on the image: (images, arguments) -> tables, uint8 (B, 3, L).
IMAGE_TABLES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "AutoContrast": lambda images, _: autocontrast_tables(images),
    "Equalize": lambda images, _: equalize_tables(images),
    "Contrast": contrast_tables,
}
# Operations that no table describes: (images, arguments) -> images.
FILTERS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"Color": color, "Sharpness": sharpness}
