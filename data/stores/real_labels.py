"""ReaL, the reassessed labels of ImageNet's validation images (Beyer et al., Are we done with ImageNet?, 2020).

The file is a JSON list: entry i holds the correct class numbers of ILSVRC2012_val_<i+1>.JPEG, none if the annotators found
no class. A prediction is correct if it is among them; images without labels do not count.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.text import shorten
from data.stores.class_labels import IMAGENET, imagenet_wnids
from data.stores.names import parse_json, read_text

_NUMBER = re.compile(r"ILSVRC2012_val_(\d{8})\.\w+")


@dataclass(frozen=True)
class RealLabels:
    """Correct labels of every image of a data set by index, in the model's numbering; an empty set for unlabelled images."""

    right: list[frozenset[int]]

    def count(self, ranked: np.ndarray) -> tuple[int, int, int]:
        """Count ranked predictions, int64 (n, k), best first, k at most 5, row i of image i.

        Returns the images whose first answer, and of which any answer, is right, and all images that have labels.
        """
        rows = [(labels, row) for labels, row in zip(self.right, ranked.tolist(), strict=True) if labels]
        correct1 = sum(row[0] in labels for labels, row in rows)
        correct5 = sum(not labels.isdisjoint(row) for labels, row in rows)
        return correct1, correct5, len(rows)


def read_real_labels(path: str, files: Sequence[str], classes: Sequence[str]) -> RealLabels:
    """Read the labels of the images named `files`; `classes` are the model's class names in label order.

    WordNet ids as class names give the labels of a model with its own order; other names are accepted for a model of 1000
    classes only. ValueError for a file of another format, other image names, or classes that are not ImageNet's.
    """
    table = _read(path)
    to_model = _to_model(path, classes)
    right = []
    for file in files:
        match = _NUMBER.fullmatch(Path(file).name)
        if not match or not 0 < int(match[1]) <= len(table):
            raise ValueError(
                f"--real-labels {path} holds the labels of ILSVRC2012_val_00000001.JPEG to _{len(table):08d}.JPEG; {shorten(file)} is "
                "none of them; evaluate ImageNet's validation images under their original names, or leave the flag out"
            )
        right.append(frozenset(to_model[n] for n in table[int(match[1]) - 1] if n in to_model))
    if not any(right):
        raise ValueError(
            f"--real-labels {path} holds no label of a class of the model for any of the {len(files)} images"
        )
    return RealLabels(right)


def _read(path: str) -> list[list[int]]:
    file = Path(path).expanduser()
    if not file.is_file():
        raise ValueError(f"--real-labels {shorten(path)} is not a file; give the path of real.json")
    try:
        table = parse_json(read_text(file))
    except ValueError as error:
        raise ValueError(f"--real-labels {shorten(path)} is not JSON ({error}); give the path of real.json") from error
    if not isinstance(table, list) or not all(isinstance(entry, list) for entry in table):
        raise ValueError(f"--real-labels {shorten(path)} must be a list of lists of class numbers, one for each image")
    wrong = [n for entry in table for n in entry if type(n) is not int or not 0 <= n < IMAGENET]
    if wrong:
        raise ValueError(
            f"--real-labels {shorten(path)} holds {shorten(wrong[0])}, which is no class number between 0 and {IMAGENET - 1}"
        )
    return table


def _to_model(path: str, classes: Sequence[str]) -> dict[int, int]:
    """Return the mapping from ImageNet-1k's class numbers to the model's labels, for the classes of the model."""
    standard = {wnid: number for number, wnid in enumerate(imagenet_wnids())}
    if set(classes) <= set(standard):
        return {standard[name]: label for label, name in enumerate(classes)}
    if len(classes) == IMAGENET:
        return {number: number for number in range(IMAGENET)}
    raise ValueError(
        f"--real-labels {path} numbers ImageNet-1k's classes; the model's {len(classes)} classes ({', '.join(classes[:3])}, "
        "...) are none of its WordNet ids; leave the flag out, or name them in DATA.CLASS_INDEX"
    )
