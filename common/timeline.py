"""A value over the epochs of a run, written as one line of text.

0:0.4, 260:0.6        0.4, and 0.6 from epoch 260 on
0:128 -> 200:224      from 128 linearly to 224 at epoch 200, and so on from there
"""

import re
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

_POINT = re.compile(r"\s*(\d+)\s*:\s*(-?[\d.]+(?:e-?\d+)?)\s*", re.IGNORECASE)


class Point(NamedTuple):
    """A value that holds from an epoch on, or that a line leads on from to the next point."""

    epoch: float
    value: float
    ramp: bool


@dataclass(frozen=True)
class Timeline:
    """Points of rising epochs, the first at 0. Inside a ramp, values are rounded to a `multiple` (0: not)."""

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
        """The values at the points; all others lie between two of them."""
        return tuple(point.value for point in self.points)

    @property
    def end(self) -> float:
        """The epoch from which on nothing changes."""
        return self.points[-1].epoch

    def __str__(self) -> str:
        text = ""
        for point in self.points:
            text += f"{point.epoch:g}:{point.value:g}{' -> ' if point.ramp else ', '}"
        return text.removesuffix(", ")


def constant(value: float) -> Timeline:
    """Return the timeline of a value that does not change."""
    return Timeline((Point(0.0, value, False),))


def parse_optional(text: str, key: str, multiple: int = 0) -> Timeline | None:
    """Return `parse`'s timeline, None for an empty line."""
    return parse(text, key, multiple) if text else None


def parse(text: str, key: str, multiple: int = 0) -> Timeline:
    """Read a line of EPOCH:VALUE points joined by "," (steps) or "->" (linear). ValueError names the key."""
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
                f"{key}={text!r}: {piece.strip()!r} is not EPOCH:VALUE with a whole epoch; write e.g. '0:0.4, 260:0.6', or '0:0.1 -> 100:0.4' "
                "for a line"
            ) from None
    if points[0].epoch != 0:
        raise ValueError(f"{key}={text!r} must begin with epoch 0")
    if points[-1].ramp:
        raise ValueError(f"{key}={text!r} ends in '->'; say where it leads")
    for a, b in pairwise(points):
        if b.epoch <= a.epoch:
            raise ValueError(f"{key}={text!r}: epoch {b.epoch:g} does not come after {a.epoch:g}")
    return Timeline(tuple(points), multiple)
