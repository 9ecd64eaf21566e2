"""Doubles for the tests of data/: generated image folders, and timm's random modules fed from a keyed generator."""

from pathlib import Path

import numpy as np
from PIL import Image


class TimmRandom:
    """Stand-in for the `random` and `numpy.random` of timm, which draws from a given generator."""

    def __init__(self, rng):
        self.rng = rng
        self.random = self.rand = rng.random_sample
        self.uniform, self.gauss, self.beta = rng.uniform, rng.normal, rng.beta

    def randint(self, low, high, size=None):  # as of `random`, including `high`
        return int(self.rng.randint(low, high + 1))

    def choice(self, options, count=None, replace=True, p=None):
        if count is None:
            return options[self.rng.randint(len(options))]
        assert replace
        assert p is None
        return [options[i] for i in self.rng.randint(len(options), size=count)]


def picture(rng: np.random.RandomState, width: int, height: int) -> Image.Image:
    """Return smooth random colours with some grain."""
    coarse = Image.fromarray(rng.randint(0, 256, size=(6, 7, 3), dtype=np.uint8)).resize(
        (width, height), Image.Resampling.BICUBIC
    )
    grain = rng.randint(-12, 13, size=(height, width, 3))
    return Image.fromarray((np.asarray(coarse).astype(int) + grain).clip(0, 255).astype(np.uint8))


def write_folder(root: Path, **splits: dict[str, int]) -> Path:
    """Write ROOT/<split>/<class>/<n>.jpg with that many pictures of 40..80 pixels per class."""
    for split, classes in splits.items():
        for name, count in classes.items():
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                rng = np.random.RandomState([ord(c) for c in split + name] + [i])
                picture(rng, *rng.randint(40, 81, size=2)).save(root / split / name / f"{i:03d}.jpg")
    return root
