"""Identification of the variant that a file of weights belongs to, by names and shapes alone."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

import timm
import torch
from torch import Tensor

from .backbone import STRIDES, Backbone
from .published import COUNTER, find_rule
from .registry import retoken_models

ENOUGH = 0.5  # share of a variant's entries that identifies it
Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Found:
    """Variant nearest to some weights, which hold `share` of its entries in its shapes."""

    name: str
    share: float

    def __str__(self) -> str:
        if self.share == 1:
            return f"this is a {self.name}"
        return f"the nearest variant is {self.name}, of which it holds {100 * self.share:.1f}%"


def identify(weights: Mapping[str, Tensor]) -> Found | None:
    """Return the variant that weights under our or the published names belong to; None if they resemble none."""
    given = {(name, tuple(tensor.shape)) for name, tensor in weights.items()}

    def share(name: str) -> float:
        return max(len(given & entries.items()) / len(entries) for entries in _namings(name))

    best = max((Found(name, share(name)) for name in retoken_models()), key=lambda found: found.share)
    return best if best.share >= ENOUGH else None


def skeleton(name: str, weights: Mapping[str, Tensor], img_size: int | tuple[int, int] | None = None) -> Backbone:
    """Build a variant on the meta device, for the classes, channels and image size of the weights.

    `img_size` is for a position embedding whose number of positions is no square, and so does not tell its grid.
    """
    model = on_meta(name)

    def shape(ours: str) -> tuple[int, ...] | None:
        names = (ours, *find_rule(model.published, ours)[1])
        return next((tuple(weights[key].shape) for key in names if key in weights), None)

    arguments: dict[str, object] = {}
    head, conv = shape(f"{model.default_cfg['classifier']}.weight"), shape(f"{model.default_cfg['first_conv']}.weight")
    arguments["num_classes"] = head[0] if head else 0
    if conv and len(conv) == 4:
        arguments["in_chans"] = conv[1]
    for entry in model.resizable:  # position embeddings of the stem's grid
        if (positions := shape(entry)) and len(positions) == 3:
            side = math.isqrt(positions[1])
            arguments["img_size"] = STRIDES[0] * side if side * side == positions[1] else img_size
    return on_meta(name, **arguments)


def on_meta(name: str, **arguments: object) -> Backbone:
    """Build a variant on the meta device: names and shapes without values."""
    with torch.device("meta"):
        return timm.create_model(name, **arguments)


@cache
def _namings(name: str) -> tuple[Shapes, Shapes]:
    """Return a variant's entries, under our and under the published names, without those that depend on classes or image size."""
    model = on_meta(name)
    sized = (f"{model.default_cfg['classifier']}.", *model.resizable)
    ours: Shapes = {}
    theirs: Shapes = {}
    for entry, tensor in model.state_dict().items():
        if entry.endswith(COUNTER) or entry.startswith(sized):
            continue
        ours[entry] = tuple(tensor.shape)
        rule, names = find_rule(model.published, entry)
        theirs.update((key, tuple(t.shape)) for key, t in zip(names, rule.split(entry, tensor), strict=True))
    return ours, theirs
