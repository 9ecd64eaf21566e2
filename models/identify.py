"""Which of our variants a file of weights belongs to, told by names and shapes alone."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

import timm
import torch
from torch import Tensor

from .backbone import Backbone
from .build import retoken_models
from .published import COUNTER, find_rule

ENOUGH = 0.5  # of a variant's entries; a file with fewer of them is not taken for that variant
SIZED = ("head.", "stem.pos_embed")  # entries whose shape depends on classes and image size
Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Found:
    """The variant nearest to some weights; `share` of its entries are there, in its shapes."""

    name: str
    share: float

    def __str__(self) -> str:
        if self.share == 1:
            return f"this is a {self.name}"
        return f"the nearest variant is {self.name}, of which it holds {100 * self.share:.1f}%"


def identify(weights: Mapping[str, Tensor]) -> Found | None:
    """Find the variant that weights under our or the published names belong to; None if they resemble none."""
    given = {(name, tuple(tensor.shape)) for name, tensor in weights.items()}

    def share(name: str) -> float:
        return max(len(given & entries.items()) / len(entries) for entries in _namings(name))

    best = max((Found(name, share(name)) for name in retoken_models()), key=lambda found: found.share)
    return best if best.share >= ENOUGH else None


def skeleton(name: str, weights: Mapping[str, Tensor], img_size: int | tuple[int, int] | None = None) -> Backbone:
    """Build a variant without memory for its values, for the classes, channels and image size that the weights have.

    `img_size` is for a position embedding whose number of positions is no square, and so does not tell its grid.
    """
    model = on_meta(name)

    def shape(ours: str) -> tuple[int, ...] | None:
        names = (ours, *find_rule(model.published, ours)[1])
        return next((tuple(weights[key].shape) for key in names if key in weights), None)

    arguments: dict[str, object] = {}
    head, conv = shape("head.weight"), shape("stem.conv1.weight")
    arguments["num_classes"] = head[0] if head else 0
    if conv and len(conv) == 4:
        arguments["in_chans"] = conv[1]
    if "stem.pos_embed" in model.state_dict() and (positions := shape("stem.pos_embed")) and len(positions) == 3:
        side = math.isqrt(positions[1])
        arguments["img_size"] = 4 * side if side * side == positions[1] else img_size
    return on_meta(name, **arguments)


def on_meta(name: str, **arguments: object) -> Backbone:
    """Build a variant of which only names and shapes exist."""
    with torch.device("meta"):
        return timm.create_model(name, **arguments)


@cache
def _namings(name: str) -> tuple[Shapes, Shapes]:
    """Give a variant's entries, under our names and under the published ones, but for those of any size."""
    model = on_meta(name)
    ours: Shapes = {}
    theirs: Shapes = {}
    for entry, tensor in model.state_dict().items():
        if entry.endswith(COUNTER) or entry.startswith(SIZED):
            continue
        ours[entry] = tuple(tensor.shape)
        rule, names = find_rule(model.published, entry)
        theirs.update((key, tuple(t.shape)) for key, t in zip(names, rule.split(entry, tensor), strict=True))
    return ours, theirs
