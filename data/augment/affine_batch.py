"""Affine operations of RandAugment for a batch on any device, as Pillow's Image.transform, bit for bit.

grid_sample does not match: Pillow's bicubic kernel has a = -1, samples the input only where the centre of the output pixel
maps inside the image, and truncates the result. The arithmetic is in float64 and in Pillow's order, because the last bit of
a sum decides which level truncation gives.
"""

# B batch, S side of the square images, K taps (2 or 4 pixels along an axis)

import torch
from torch import Tensor


def affine_batch(images: Tensor, matrices: Tensor, axes: str, resample: str, fill: Tensor) -> Tensor:
    """Transform uint8 (B, 3, S, S) by the coefficients float64 (B, 6); return uint8 (B, 3, S, S), channels last.

    `axes` (x, y or xy) are those along which pixels move; `resample` is bilinear or bicubic; `fill`, uint8 (3,), is the
    colour outside the image.
    """
    size = images.shape[-1]
    centres = torch.arange(size, dtype=torch.float64, device=images.device) + 0.5
    along_x, along_y = centres.view(1, 1, size), centres.view(1, size, 1)
    a, b, c, d, e, f = matrices.view(-1, 6, 1, 1).unbind(1)  # each (B, 1, 1)
    coordinates = {"x": a * along_x + b * along_y + c, "y": d * along_x + e * along_y + f}  # each (B, S, S)
    inside = torch.stack([(coordinates[axis] >= 0) & (coordinates[axis] < size) for axis in axes]).all(0).unsqueeze(-1)
    taps, kernel = (2, _linear) if resample == "bilinear" else (4, _cubic)
    pixels = _pack_pixels(images)
    if axes == "xy":
        rows, down = _taps(coordinates["y"], taps)
        columns, right = _taps(coordinates["x"], taps)
        lines = [kernel([_read(pixels, row * size + column) for column in columns], right) for row in rows]
        values = kernel(lines, down)
    else:
        stops, fraction = _taps(coordinates[axes], taps)
        own = torch.arange(size, device=images.device)
        index = [stop + own.view(size, 1) * size if axes == "x" else stop * size + own for stop in stops]
        values = kernel([_read(pixels, i) for i in index], fraction)
    coloured = torch.where(inside, values.clamp_(0, 255)[..., :3].to(torch.uint8), fill)
    return coloured.permute(0, 3, 1, 2)


def _pack_pixels(images: Tensor) -> Tensor:
    """Return the three channels of each pixel in one word, int32 (B, S * S)."""
    padded = torch.nn.functional.pad(images.permute(0, 2, 3, 1), (0, 1))  # (B, S, S, 4)
    return padded.contiguous().view(torch.int32).flatten(1)


def _read(pixels: Tensor, index: Tensor) -> Tensor:
    """Return the pixels at flat indices (B, S, S), int16 (B, S, S, 4)."""
    found = pixels.gather(1, index.flatten(1)).view(torch.uint8)
    return found.view(*index.shape, 4).to(torch.int16)


def _taps(coordinates: Tensor, taps: int) -> tuple[list[Tensor], Tensor]:
    """Return the `taps` pixels around each coordinate, clipped to the image, and its distance from the middle one."""
    coordinates = coordinates - 0.5
    floor = coordinates.floor()
    first = floor.to(torch.int64) - (taps // 2 - 1)
    last = coordinates.shape[-1] - 1
    return [(first + k).clamp_(0, last) for k in range(taps)], (coordinates - floor).unsqueeze(-1)


def _linear(values: list[Tensor], fraction: Tensor) -> Tensor:
    """Interpolate two pixels linearly."""
    one, two = values
    return (two - one) * fraction + one


def _cubic(values: list[Tensor], fraction: Tensor) -> Tensor:
    """Interpolate four pixels by Pillow's BICUBIC kernel, summing in its order."""
    one, two, three, four = values
    linear = three - one
    square = 2 * (one - two) + three - four
    cube = two - one - three + four
    return ((cube * fraction).add_(square).mul_(fraction).add_(linear)).mul_(fraction).add_(two)
