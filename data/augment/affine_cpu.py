"""Affine operations along one axis for one image on the CPU, as Pillow's bicubic Image.transform, in at most half of its time.

Along one axis four pixels count, not Pillow's sixteen, and float32 holds their sum to 1e-3 of a level. A sum within that
distance of a whole level, where truncation decides, is computed again in Pillow's float64.
"""

# S side of the image, L lines (rows for x, columns for y; 1 where all lines move by the same distance), T pixels of a line
# that come from inside the image

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view
from torch import Tensor

TOLERANCE = 1e-3  # of a level; float32 errs by at most 2e-4 on four products of levels


def affine_cpu(image: Tensor, coefficients: tuple[float, ...], axis: str, fill: Tensor) -> Tensor:
    """Transform uint8 (3, S, S) by six affine coefficients that move pixels along `axis` (x or y) only; `fill` is uint8 (3,)."""
    lines = (image if axis == "x" else image.transpose(1, 2)).contiguous().numpy()
    scale, shear, constant = coefficients[:3] if axis == "x" else (coefficients[4], coefficients[3], coefficients[5])
    size = lines.shape[-1]
    centres = np.arange(size) + 0.5
    coordinates = np.add.outer(shear * (centres if shear else np.zeros(1)), scale * centres)  # (L, S)
    coordinates += constant
    inside = (coordinates >= 0) & (coordinates < size)
    colour = fill.numpy()[:, None, None]
    result = np.empty_like(lines)
    reached = np.flatnonzero(inside.any(0))
    if len(reached) < size:
        result[:] = colour
    if len(reached):
        columns = slice(int(reached[0]), int(reached[-1]) + 1)
        inside = inside[:, columns]
        moved = _interpolate(lines, coordinates, inside, columns)
        if not inside.all():
            moved *= inside
            moved += colour * ~inside
        result[..., columns] = moved
    found = torch.from_numpy(result)
    return found if axis == "x" else found.transpose(1, 2)


def _interpolate(lines: np.ndarray, coordinates: np.ndarray, inside: np.ndarray, columns: slice) -> np.ndarray:
    """Return the levels of lines (3, S, S) at coordinates[:, columns], uint8 (3, S, T)."""
    size, count = lines.shape[-1], columns.stop - columns.start
    start = coordinates[:, 0] - 0.5
    whole = np.floor(start)
    d = (start - whole)[:, None]
    window = torch.from_numpy(
        _line_windows(lines, whole.astype(np.intp) + columns.start - 1, count + 3).astype(np.float32)
    )
    first, *rest = (torch.from_numpy(weight.astype(np.float32)) for weight in _cubic_weights(d))
    values = window[..., :count] * first
    for k, weight in enumerate(rest, 1):
        values.addcmul_(window[..., k : k + count], weight)
    moved = values.clamp_(0, 255).add_(TOLERANCE).numpy().astype(np.uint8)
    uncertain = np.flatnonzero((moved != values.sub_(2 * TOLERANCE).numpy().astype(np.uint8)) & inside)
    moved.reshape(-1)[uncertain] = _interpolate_float64(
        lines, np.broadcast_to(coordinates, (size, size))[:, columns], uncertain
    )
    return moved


def _line_windows(lines: np.ndarray, starts: np.ndarray, length: int) -> np.ndarray:
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


def _cubic_weights(d: np.ndarray) -> tuple[np.ndarray, ...]:
    """Return the bicubic weights of the four pixels around a coordinate that lies d after the second."""
    square, cube = d * d, d * d * d
    return 2 * square - d - cube, 1 - 2 * square + cube, d + square - cube, cube - square


def _interpolate_float64(lines: np.ndarray, coordinates: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """Return the levels at flat indices `chosen` into (3, S, T), coordinates being (S, T), in float64 and Pillow's order."""
    size = lines.shape[-1]
    line, column = np.divmod(chosen, coordinates.shape[1])  # the line over all three colours
    coordinate = coordinates[line % size, column] - 0.5
    whole = np.floor(coordinate)
    d, first, own = coordinate - whole, whole.astype(np.intp) - 1, line * size
    flat = lines.reshape(-1)
    one, two, three, four = (flat[own + (first + k).clip(0, size - 1)].astype(np.float64) for k in range(4))
    level = two + d * ((three - one) + d * ((2 * (one - two) + three - four) + d * (two - one - three + four)))
    return level.clip(0, 255).astype(np.uint8)
