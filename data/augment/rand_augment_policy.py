"""RandAugment's policy string, operations and draws, as in timm; rand_augment.py applies what is drawn.

"RandAugment: Practical automated data augmentation with a reduced search space", Cubuk et al. 2019, in timm's version
(timm/data/auto_augment.py). `draw_ops` takes a random generator and returns operations with their arguments, so that a loader
can apply them on another device. It draws in timm's order: from the same random numbers timm gives the same pixels.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from common.text import shorten

LEVEL_MAX = 10.0  # timm's scale: level 10 is full strength
UNIFORM_ABOVE = 100.0  # timm: mstd above this draws the level uniformly from 0 .. magnitude

# Operation -> argument at a level; `signed` ones are negated with probability 1/2, before 1 is added for the factors.
_PLAIN = ("AutoContrast", "Equalize", "Invert")
_SIGNED: dict[str, Callable[[float], float]] = {
    "Rotate": lambda level: level / LEVEL_MAX * 30.0,
    "ShearX": lambda level: level / LEVEL_MAX * 0.3,
    "ShearY": lambda level: level / LEVEL_MAX * 0.3,
    "TranslateXRel": lambda level: level / LEVEL_MAX * 0.45,
    "TranslateYRel": lambda level: level / LEVEL_MAX * 0.45,
}
_UNSIGNED: dict[str, Callable[[float], float]] = {
    "Posterize": lambda level: int(level / LEVEL_MAX * 4),
    "PosterizeIncreasing": lambda level: 4 - int(level / LEVEL_MAX * 4),
    "Solarize": lambda level: min(256, int(level / LEVEL_MAX * 256)),
    "SolarizeIncreasing": lambda level: 256 - min(256, int(level / LEVEL_MAX * 256)),
    "SolarizeAdd": lambda level: min(128, int(level / LEVEL_MAX * 110)),
}
_FACTORS = ("Color", "Contrast", "Brightness", "Sharpness")
_UNSIGNED.update({name: lambda level: level / LEVEL_MAX * 1.8 + 0.1 for name in _FACTORS})
_SIGNED.update({f"{name}Increasing": lambda level: level / LEVEL_MAX * 0.9 for name in _FACTORS})

_AFFINE = ("Rotate", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel")
# timm's two tables, in timm's order: strength rising with the level in all operations ("inc1"), or as first published.
INCREASING_OPS = (
    *_PLAIN, "Rotate", "PosterizeIncreasing", "SolarizeIncreasing", "SolarizeAdd",
    *(f"{name}Increasing" for name in _FACTORS), *_AFFINE[1:],
)  # fmt: skip
PUBLISHED_OPS = (*_PLAIN, "Rotate", "Posterize", "Solarize", "SolarizeAdd", *_FACTORS, *_AFFINE[1:])

_PARTS = "m (magnitude), n (operations), p (probability), mstd (noise), mmax (largest level), inc (0 or 1)"


class Op(NamedTuple):
    """An operation with its drawn argument."""

    name: str  # timm's
    argument: float | None  # degrees, fraction of the size, bits, threshold or factor; None if the operation takes none
    resample: str  # bilinear or bicubic; affine operations use it


@dataclass(frozen=True)
class Policy:
    """A parsed policy string."""

    magnitude: float = 10
    layers: int = 2
    prob: float = 0.5
    std: float = 0.0
    level_max: float = LEVEL_MAX
    increasing: bool = False

    @property
    def ops(self) -> tuple[str, ...]:
        """Return the names of the operations to choose from."""
        return INCREASING_OPS if self.increasing else PUBLISHED_OPS


def parse_policy(text: str) -> Policy:
    """Parse timm's string, such as "rand-m9-mstd0.5-inc1"; ValueError for an unknown part."""
    head, *parts = text.split("-")
    if head != "rand":
        raise ValueError(
            f"AUG.RAND_AUGMENT={shorten(text)} must start with 'rand', e.g. rand-m9-mstd0.5-inc1, or be ''"
        )
    values: dict[str, float] = {}
    for part in parts:
        match = re.fullmatch(r"(mstd|mmax|inc|m|n|p)(\d+(?:\.\d+)?)", part)
        if match is None or match[1] in values:
            wrong = "appears twice" if match else "is not one of its parts"
            raise ValueError(f"AUG.RAND_AUGMENT={shorten(text)}: {shorten(part)} {wrong}; give each once: {_PARTS}")
        if match[1] in ("m", "n", "mmax", "inc") and "." in match[2]:
            raise ValueError(f"AUG.RAND_AUGMENT={shorten(text)}: {shorten(part)} must hold a whole number")
        values[match[1]] = float(match[2])
    if values.get("inc", 0) > 1 or values.get("p", 0) > 1:
        raise ValueError(f"AUG.RAND_AUGMENT={shorten(text)}: inc is 0 or 1, p lies in 0 .. 1")
    return Policy(
        magnitude=int(values.get("m", 10)),
        layers=int(values.get("n", 2)),
        prob=values.get("p", 0.5),
        std=values.get("mstd", 0.0),
        level_max=values.get("mmax", 0.0) or LEVEL_MAX,
        increasing=bool(values.get("inc", 0)),
    )


def argument(name: str, level: float, negate: bool = False) -> float | None:
    """Return an operation's argument at a level."""
    if name in _PLAIN:
        return None
    if name in _UNSIGNED:
        return _UNSIGNED[name](level)
    value = -_SIGNED[name](level) if negate else _SIGNED[name](level)
    return value if name in _AFFINE else max(0.1, 1.0 + value)


def draw_ops(policy: Policy, rng: np.random.RandomState, interpolation: str) -> tuple[Op, ...]:
    """Draw the operations for one image; `interpolation` is bilinear, bicubic, or random (drawn per operation)."""
    chosen = [policy.ops[i] for i in rng.randint(len(policy.ops), size=policy.layers)]
    drawn = []
    for name in chosen:
        if policy.prob < 1.0 and rng.random_sample() > policy.prob:
            continue
        level = float(policy.magnitude)
        if policy.std > UNIFORM_ABOVE:
            level = rng.uniform(0, level)
        elif policy.std > 0:
            level = rng.normal(level, policy.std)
        level = max(0.0, min(level, policy.level_max))
        negate = name in _SIGNED and rng.random_sample() > 0.5
        resample = interpolation
        if interpolation == "random":
            resample = ("bilinear", "bicubic")[rng.randint(2)] if name in _AFFINE else "bicubic"
        drawn.append(Op(name, argument(name, level, negate), resample))
    return tuple(drawn)
