"""Timelines: values over the epochs of a run, written as one line of text.

0:0.4, 260:0.6        0.4, and 0.6 from epoch 260 on
0:128 -> 200:224      linear from 128 to 224 at epoch 200, then 224
"""

import re
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from common.text import shorten

_POINT = re.compile(r"\s*(\d+)\s*:\s*(-?[\d.]+(?:e-?\d+)?)\s*", re.IGNORECASE)


class Point(NamedTuple):
    """A value from an epoch on: constant until the next point, or with `ramp` linear to it."""

    epoch: float
    value: float
    ramp: bool


@dataclass(frozen=True)
class Timeline:
    """Points in ascending order of epochs, the first at 0. Inside a ramp, values are rounded to a `multiple` (0: not rounded)."""

    points: tuple[Point, ...]
    multiple: int = 0

    def at(self, epoch: float) -> float:
        """Return the value in an epoch, counted from 0."""
        held = max(i for i, point in enumerate(self.points) if point.epoch <= epoch)
        point = self.points[held]
        if not point.ramp or epoch == point.epoch:
            return point.value
        after = self.points[held + 1]
        value = point.value + (after.value - point.value) * (epoch - point.epoch) / (after.epoch - point.epoch)
        return round(value / self.multiple) * self.multiple if self.multiple else value

    @property
    def values(self) -> tuple[float, ...]:
        """Return the values at the points; all others lie between two of them."""
        return tuple(point.value for point in self.points)

    @property
    def end(self) -> float:
        """Return the epoch after which the value is constant."""
        return self.points[-1].epoch

    def __str__(self) -> str:
        text = ""
        for point in self.points:
            text += f"{point.epoch:g}:{point.value:g}{' -> ' if point.ramp else ', '}"
        return text.removesuffix(", ")


def constant(value: float) -> Timeline:
    """Return the timeline of a constant value."""
    return Timeline((Point(0.0, value, False),))


def parse_optional(text: str, key: str, multiple: int = 0) -> Timeline | None:
    """Parse a timeline; return None for an empty text."""
    return parse(text, key, multiple) if text else None


def parse(text: str, key: str, multiple: int = 0) -> Timeline:
    """Parse EPOCH:VALUE points joined by "," (constant until the next point) or "->" (linear). ValueError names the key."""
    pieces = re.split(r"(,|->)", text)
    points: list[Point] = []
    for piece, joint in zip(pieces[::2], [*pieces[1::2], ","], strict=True):
        match = _POINT.fullmatch(piece)
        try:
            if match is None:
                raise ValueError
            points.append(Point(float(match[1]), float(match[2]), joint == "->"))
        except ValueError:
            raise ValueError(
                f"{key}={shorten(text)}: {shorten(piece.strip())} is not EPOCH:VALUE with a whole epoch; write e.g. '0:0.4, 260:0.6', or '0:0.1 -> 100:0.4' "
                "for a line"
            ) from None
    if points[0].epoch != 0:
        raise ValueError(f"{key}={shorten(text)} must begin with epoch 0")
    if points[-1].ramp:
        raise ValueError(f"{key}={shorten(text)} ends in '->'; add the point it leads to")
    for a, b in pairwise(points):
        if b.epoch <= a.epoch:
            raise ValueError(f"{key}={shorten(text)}: epoch {b.epoch:g} does not come after {a.epoch:g}")
    return Timeline(tuple(points), multiple)
