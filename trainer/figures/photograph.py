"""Photographs and the part of them that a model sees: coordinates of pixels, of tokens and of the model's input."""

from dataclasses import dataclass

import numpy as np
from PIL import Image

RESAMPLING = {True: Image.Resampling.BICUBIC, False: Image.Resampling.NEAREST}


@dataclass(frozen=True)
class Photograph:
    """Pixels of a photograph, and the square of it that is the model's input.

    `box` is its left, top, right and bottom in pixels of the photograph; it may exceed the photograph (evaluation in border
    mode). `side` is its size in pixels of the model's input.
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
        """Height and width."""
        return self.pixels.shape[0], self.pixels.shape[1]

    @property
    def seen(self) -> tuple[int, int, int, int]:
        """Left, top, right and bottom of the whole pixels that the model sees."""
        height, width = self.size
        left, top, right, bottom = (round(edge) for edge in self.box)
        return max(left, 0), max(top, 0), min(right, width), min(bottom, height)

    def window(self) -> tuple[slice, slice]:
        """Return the rows and columns that the model sees."""
        left, top, right, bottom = self.seen
        return slice(top, bottom), slice(left, right)

    def enlarge(self, values: np.ndarray, patch: int, smooth: bool = False) -> np.ndarray:
        """Enlarge a map (h, w), of tokens of patch × patch input pixels, to the pixels that the model sees.

        smooth: bicubic between the tokens' centres; else every pixel has its token's value. Returns float32, or int32 for a map
        of integers.
        """
        kind = np.int32 if values.dtype.kind == "i" else np.float32
        left, top, right, bottom = self.seen
        area = (*self.tokens(left, top, patch), *self.tokens(right, bottom, patch))
        height, width = values.shape
        area = (max(area[0], 0.0), max(area[1], 0.0), min(area[2], width), min(area[3], height))
        image = Image.fromarray(np.ascontiguousarray(values.astype(kind)))
        return np.asarray(image.resize((right - left, bottom - top), RESAMPLING[smooth], box=area))

    def tokens(self, x: float, y: float, patch: int) -> tuple[float, float]:
        """Convert pixel coordinates to tokens of the model's grid, from left and top."""
        left, top, right, bottom = self.box
        across, down = self.side / patch / (right - left), self.side / patch / (bottom - top)
        return (x - left) * across, (y - top) * down

    def fractions(self, x: float, y: float) -> tuple[float, float]:
        """Convert pixel coordinates to fractions of the model's input. Raises ValueError outside the part that the model sees."""
        left, top, right, bottom = self.seen
        if not (left <= x < right and top <= y < bottom):
            raise ValueError(
                f"{self.name}: the model does not see pixel {x:g},{y:g}; it sees x from {left} to {right - 1} and y from "
                f"{top} to {bottom - 1}"
            )
        a, b, c, d = self.box
        return (x - a) / (c - a), (y - b) / (d - b)

    def from_tokens(self, points: np.ndarray, patch: int) -> np.ndarray:
        """Convert points (..., 2), x and y in tokens, to pixels of the photograph."""
        left, top, right, bottom = self.box
        scale = np.array([(right - left), (bottom - top)]) * patch / self.side
        return points * scale + np.array([left, top])
