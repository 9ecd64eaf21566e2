"""A photograph and the crop of it that is a model's input, to align maps with its pixels."""

from dataclasses import dataclass

import numpy as np
from PIL import Image

RESAMPLING = {True: Image.Resampling.BICUBIC, False: Image.Resampling.NEAREST}


@dataclass(frozen=True)
class Photograph:
    """Pixels of a photograph, and the position of the square that is the model's input.

    `box` is its left, top, right and bottom in pixels of the photograph; it may stick out (evaluation in border mode).
    `side` is its size in pixels of the model's input.
    """

    pixels: np.ndarray  # uint8 (H, W, 3)
    box: tuple[float, float, float, float]
    side: int
    name: str = ""

    @classmethod
    def framed(
        cls, pixels: np.ndarray, size: tuple[int, int], crop: tuple[int, int, int, int], name: str = ""
    ) -> "Photograph":
        """Return a photograph that was resized to `size` (height, width) and then cropped (top, left, height, width)."""
        down, across = pixels.shape[0] / size[0], pixels.shape[1] / size[1]
        top, left, height, width = crop
        box = (left * across, top * down, (left + width) * across, (top + height) * down)
        return cls(pixels, box, height, name)

    @property
    def size(self) -> tuple[int, int]:
        """Return height and width."""
        return self.pixels.shape[0], self.pixels.shape[1]

    @property
    def seen(self) -> tuple[int, int, int, int]:
        """Return left, top, right and bottom of the whole pixels in the model's input."""
        height, width = self.size
        left, top, right, bottom = (round(edge) for edge in self.box)
        return max(left, 0), max(top, 0), min(right, width), min(bottom, height)

    def window(self) -> tuple[slice, slice]:
        """Return the rows and columns of the model's input."""
        left, top, right, bottom = self.seen
        return slice(top, bottom), slice(left, right)

    def lay(self, values: np.ndarray, patch: int, smooth: bool = False) -> np.ndarray:
        """Enlarge a map (h, w), of tokens of patch × patch input pixels, to the pixels of the model's input.

        smooth: bicubic between the tokens' centres; else every pixel has its token's value. Gives float32, or int32 for numbers.
        """
        kind = np.int32 if values.dtype.kind == "i" else np.float32
        left, top, right, bottom = self.seen
        area = (*self.tokens(left, top, patch), *self.tokens(right, bottom, patch))
        height, width = values.shape
        area = (max(area[0], 0.0), max(area[1], 0.0), min(area[2], width), min(area[3], height))
        image = Image.fromarray(np.ascontiguousarray(values.astype(kind)))
        return np.asarray(image.resize((right - left, bottom - top), RESAMPLING[smooth], box=area))

    def tokens(self, x: float, y: float, patch: int) -> tuple[float, float]:
        """Return a position in the photograph in tokens of the model's grid, from left and top."""
        left, top, right, bottom = self.box
        across, down = self.side / patch / (right - left), self.side / patch / (bottom - top)
        return (x - left) * across, (y - top) * down

    def place(self, x: float, y: float) -> tuple[float, float]:
        """Return a position in the photograph as fractions of the model's input. Raises ValueError if it lies outside."""
        left, top, right, bottom = self.seen
        if not (left <= x < right and top <= y < bottom):
            raise ValueError(
                f"{self.name}: the model does not see pixel {x:g},{y:g}; it sees x from {left} to {right - 1} and y from "
                f"{top} to {bottom - 1}"
            )
        a, b, c, d = self.box
        return (x - a) / (c - a), (y - b) / (d - b)

    def from_tokens(self, points: np.ndarray, patch: int) -> np.ndarray:
        """Return points (..., 2), given as x and y in tokens, in pixels of the photograph."""
        left, top, right, bottom = self.box
        scale = np.array([(right - left), (bottom - top)]) * patch / self.side
        return points * scale + np.array([left, top])
