"""Shear or translate one image on the CPU exactly as Pillow's bicubic Image.transform does, in half of its time or less.

Along one axis four pixels count, not Pillow's sixteen, and float32 holds their sum to 1e-3 of a level. Only where a sum
comes that close to a whole level, at which Pillow's cutting off decides, is it computed again in Pillow's own float64.
"""

# S side of the image, L lines (rows for x, columns for y; 1 where all are moved alike), T pixels of a line that change

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view
from torch import Tensor

DOUBT = 1e-3  # float32 errs by at most 2e-4 on four products of levels


def affine_cpu(image: Tensor, numbers: tuple[float, ...], axis: str, fill: tuple[int, int, int]) -> Tensor:
    """Transform uint8 (3, S, S) by the six numbers of affine.matrix, which move places along `axis` (x or y) only."""
    lines = (image if axis == "x" else image.transpose(1, 2)).contiguous().numpy()
    scale, slant, constant = numbers[:3] if axis == "x" else (numbers[4], numbers[3], numbers[5])
    size = lines.shape[-1]
    centres = np.arange(size) + 0.5
    places = np.add.outer(slant * (centres if slant else np.zeros(1)), scale * centres)  # (L, S)
    places += constant
    inside = (places >= 0) & (places < size)
    colour = np.array(fill, dtype=np.uint8)[:, None, None]
    result = np.empty_like(lines)
    hit = np.flatnonzero(inside.any(0))
    if len(hit) < size:
        result[:] = colour
    if len(hit):
        part = slice(int(hit[0]), int(hit[-1]) + 1)
        inside = inside[:, part]
        moved = _moved(lines, places, inside, part)
        if not inside.all():
            moved *= inside
            moved += colour * ~inside
        result[..., part] = moved
    found = torch.from_numpy(result)
    return found if axis == "x" else found.transpose(1, 2)


def _moved(lines: np.ndarray, places: np.ndarray, inside: np.ndarray, part: slice) -> np.ndarray:
    """Return what lies at places[:, part] of lines (3, S, S), uint8 (3, S, T)."""
    size, count = lines.shape[-1], part.stop - part.start
    start = places[:, 0] - 0.5
    whole = np.floor(start)
    d = (start - whole)[:, None]
    window = torch.from_numpy(_windows(lines, whole.astype(np.intp) + part.start - 1, count + 3).astype(np.float32))
    first, *rest = (torch.from_numpy(weight.astype(np.float32)) for weight in _weights(d))
    values = window[..., :count] * first
    for k, weight in enumerate(rest, 1):
        values.addcmul_(window[..., k : k + count], weight)
    moved = values.clamp_(0, 255).add_(DOUBT).numpy().astype(np.uint8)
    doubt = np.flatnonzero((moved != values.sub_(2 * DOUBT).numpy().astype(np.uint8)) & inside)
    moved.reshape(-1)[doubt] = _exactly(lines, np.broadcast_to(places, (size, size))[:, part], doubt)
    return moved


def _windows(lines: np.ndarray, starts: np.ndarray, length: int) -> np.ndarray:
    """Return `length` pixels of each line from its start (L,), uint8 (3, S, length), the ends repeated outside."""
    size = lines.shape[-1]
    starts = starts.clip(-size - length, 2 * size)
    before, after = max(0, -int(starts.min())), max(0, int(starts.max()) + length - size)
    padded = np.empty((3, size, before + size + after), dtype=np.uint8)
    padded[..., :before] = lines[..., :1]
    padded[..., before : before + size] = lines
    padded[..., before + size :] = lines[..., -1:]
    if len(starts) == 1:
        return padded[..., before + starts[0] :][..., :length]
    own = np.arange(3 * size) * padded.shape[-1] + before + np.tile(starts, 3)
    return sliding_window_view(padded.reshape(-1), length)[own].reshape(3, size, length)


def _weights(d: np.ndarray) -> tuple[np.ndarray, ...]:
    """Return the shares of the four pixels around a place, d behind the second."""
    square, cube = d * d, d * d * d
    return 2 * square - d - cube, 1 - 2 * square + cube, d + square - cube, cube - square


def _exactly(lines: np.ndarray, places: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """Return the levels at flat indices into (3, S, T), each place being in places (S, T), with Pillow's sums."""
    size = lines.shape[-1]
    line, column = np.divmod(chosen, places.shape[1])  # the line over all three colours
    place = places[line % size, column] - 0.5
    whole = np.floor(place)
    d, first, own = place - whole, whole.astype(np.intp) - 1, line * size
    flat = lines.reshape(-1)
    one, two, three, four = (flat[own + (first + k).clip(0, size - 1)].astype(np.float64) for k in range(4))
    level = two + d * ((three - one) + d * ((2 * (one - two) + three - four) + d * (two - one - three + four)))
    return level.clip(0, 255).astype(np.uint8)
