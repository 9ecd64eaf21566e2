"""Rotate, shear and translate a batch as Pillow's Image.transform does, to the last bit, on the CPU or a GPU.

grid_sample does not match: Pillow's bicubic takes a = -1, reads outside the picture only where the centre of the pixel
lies inside, and cuts the fraction off. The arithmetic follows Pillow's in order and in float64, since where the fraction
is cut off the last bit of a sum decides a level.
"""

# B batch, S side of the square images, K taps (2 or 4 pixels along an axis)

import math

import torch
from torch import Tensor

AXES = {"Rotate": "xy", "ShearX": "x", "TranslateXRel": "x", "ShearY": "y", "TranslateYRel": "y"}


def matrix(name: str, argument: float, size: int) -> tuple[float, ...]:
    """Return Pillow's six numbers, from a pixel of the output to a place in the input, of a geometric operation."""
    if name == "Rotate":
        angle = -math.radians(argument % 360.0)
        cos, sin = round(math.cos(angle), 15), round(math.sin(angle), 15)
        centre = size / 2
        return cos, sin, cos * -centre + sin * -centre + centre, -sin, cos, -sin * -centre + cos * -centre + centre
    return {
        "ShearX": (1.0, argument, 0.0, 0.0, 1.0, 0.0),
        "ShearY": (1.0, 0.0, 0.0, argument, 1.0, 0.0),
        "TranslateXRel": (1.0, 0.0, argument * size, 0.0, 1.0, 0.0),
        "TranslateYRel": (1.0, 0.0, 0.0, 0.0, 1.0, argument * size),
    }[name]


def affine(images: Tensor, matrices: Tensor, axes: str, resample: str, fill: Tensor) -> Tensor:
    """Transform uint8 (B, 3, S, S) by float64 (B, 6); uint8 (B, 3, S, S), channels last.

    `axes` (x, y or xy) says along which the places differ from pixels; `resample` is bilinear or bicubic; `fill`, uint8
    (3,), colours what lies outside.
    """
    size = images.shape[-1]
    centres = torch.arange(size, dtype=torch.float64, device=images.device) + 0.5
    along_x, along_y = centres.view(1, 1, size), centres.view(1, size, 1)
    a, b, c, d, e, f = matrices.view(-1, 6, 1, 1).unbind(1)  # each (B, 1, 1)
    places = {"x": a * along_x + b * along_y + c, "y": d * along_x + e * along_y + f}  # each (B, S, S)
    inside = torch.stack([(places[axis] >= 0) & (places[axis] < size) for axis in axes]).all(0).unsqueeze(-1)
    taps, curve = (2, _line) if resample == "bilinear" else (4, _cubic)
    pixels = _packed(images)
    if axes == "xy":
        rows, down = _taps(places["y"], taps)
        columns, right = _taps(places["x"], taps)
        lines = [curve([_read(pixels, row * size + column) for column in columns], right) for row in rows]
        values = curve(lines, down)
    else:
        stops, fraction = _taps(places[axes], taps)
        own = torch.arange(size, device=images.device)
        index = [stop + own.view(size, 1) * size if axes == "x" else stop * size + own for stop in stops]
        values = curve([_read(pixels, i) for i in index], fraction)
    coloured = torch.where(inside, values.clamp_(0, 255)[..., :3].to(torch.uint8), fill)
    return coloured.permute(0, 3, 1, 2)


def _packed(images: Tensor) -> Tensor:
    """Return each pixel's colours in one word, int32 (B, S * S)."""
    padded = torch.nn.functional.pad(images.permute(0, 2, 3, 1), (0, 1))  # (B, S, S, 4)
    return padded.contiguous().view(torch.int32).flatten(1)


def _read(pixels: Tensor, index: Tensor) -> Tensor:
    """Return the pixels at flat indices (B, S, S), int16 (B, S, S, 4)."""
    found = pixels.gather(1, index.flatten(1)).view(torch.uint8)
    return found.view(*index.shape, 4).to(torch.int16)


def _taps(places: Tensor, taps: int) -> tuple[list[Tensor], Tensor]:
    """Return the `taps` pixels around each place, clipped to the image, and how far it lies behind the middle one."""
    places = places - 0.5
    floor = places.floor()
    first = floor.to(torch.int64) - (taps // 2 - 1)
    last = places.shape[-1] - 1
    return [(first + k).clamp_(0, last) for k in range(taps)], (places - floor).unsqueeze(-1)


def _line(values: list[Tensor], fraction: Tensor) -> Tensor:
    one, two = values
    return (two - one) * fraction + one


def _cubic(values: list[Tensor], fraction: Tensor) -> Tensor:
    """Pillow's BICUBIC, sums in its order."""
    one, two, three, four = values
    linear = three - one
    square = 2 * (one - two) + three - four
    cube = two - one - three + four
    return ((cube * fraction).add_(square).mul_(fraction).add_(linear)).mul_(fraction).add_(two)
