"""Labels of class folders: their names among a model's class names, in ImageNet-1k's list, or as class numbers.

ImageNet-V2 numbers its folders 0 .. 999, ImageNet-A and -R hold 200 of the 1000 WordNet ids, -Sketch all of them.
"""

import difflib
import functools
import re
from collections.abc import Mapping, Sequence

from timm.data import ImageNetInfo

from common.text import shorten
from data.stores.folder import ClassIndexError, read_class_index
from data.stores.names import look

IMAGENET = 1000
WORDNET_ID = re.compile(r"n\d{8}")
NAMED = 3  # unknown folders listed in an error


@functools.cache
def imagenet_wnids() -> tuple[str, ...]:
    """Return the WordNet ids of ImageNet-1k's classes in their standard order."""
    return tuple(ImageNetInfo().label_names())


@functools.cache
def _descriptions() -> dict[str, str]:
    """Return the descriptions of the classes of ImageNet-22k and ImageNet-1k, by WordNet id."""
    return {
        name: info.label_name_to_description(name)
        for info in (ImageNetInfo("imagenet-22k"), ImageNetInfo())
        for name in info.label_names()
    }


def readable_names(names: Sequence[str]) -> list[str]:
    """Return the names, with WordNet ids replaced by the first English word or phrase of their description."""
    return [_descriptions().get(name, name).split(",")[0] if WORDNET_ID.fullmatch(name) else name for name in names]


def class_names(known: Sequence[str], class_index: str, num_classes: int) -> dict[str, list[str]]:
    """Return the lists of a model's class names in label order, keyed by a description of each list for messages.

    `known` are the names in the checkpoint, `class_index` the file DATA.CLASS_INDEX. Without both, the names of a model
    of 1000 classes (or of an unknown number: 0) are ImageNet-1k's, of any other one numbers. ValueError for a list whose
    length is not `num_classes`.
    """
    lists: dict[str, list[str]] = {}
    index_list = f"DATA.CLASS_INDEX={class_index}"
    if known:
        lists["the checkpoint"] = list(known)
    if class_index:
        lists[index_list] = read_class_index(class_index)
    if not lists and num_classes in (0, IMAGENET):
        lists["ImageNet-1k's list"] = list(imagenet_wnids())
    elif not lists:
        lists["the checkpoint, which has no names but numbers,"] = [str(label) for label in range(num_classes)]
    wanted = num_classes or len(next(iter(lists.values())))
    for title, names in lists.items():
        if len(names) != wanted:
            problem = f"names {len(names)} classes, the model has {wanted}; give the list it was trained with"
            raise ClassIndexError(class_index, problem) if title == index_list else ValueError(f"{title} {problem}")
    return lists


def label_folders(folders: Sequence[str], lists: Mapping[str, list[str]], path: str) -> tuple[dict[str, int], str]:
    """Return the label of each folder, and a phrase on how it was found; `lists` are those of `class_names`.

    The first list that holds all names is used. Else names that are all integers are class numbers, in any order.
    ValueError for names in no list, with the nearest ones, and for integers that are not the number of a class.
    """
    for title, names in lists.items():
        labels = {name: label for label, name in enumerate(names)}
        if set(folders) <= set(labels):
            return {name: labels[name] for name in folders}, f"named by {title.rstrip(',')}"
    if all(name.isascii() and name.isdecimal() for name in folders):
        return _by_number(folders, len(next(iter(lists.values()))), path), "read as class numbers"
    title, names = max(lists.items(), key=lambda item: len(set(folders) & set(item[1])))
    unknown = [name for name in folders if name not in set(names)]
    if "val" in unknown:
        remedy = f"did you mean {path}/val?"
    else:
        remedy = (
            "rename them, or give the names of the model's classes in DATA.CLASS_INDEX; move what is no class elsewhere"
        )
    shown = (_with_nearest(name, names) for name in unknown[:NAMED])
    more = f" and {len(unknown) - NAMED} more" if len(unknown) > NAMED else ""
    raise ValueError(
        f"--val-path {path} has {len(unknown)} class folders of {len(folders)} that {title} does not know: "
        f"{', '.join(shown)}{more}; {remedy}"
    )


def _with_nearest(name: str, names: Sequence[str]) -> str:
    """Return a name with the nearest of `names`, for a message; escaped if one of these looks the same."""
    alike = [other for other in names if look(other) == look(name)]
    nearest = alike or difflib.get_close_matches(name, names, n=3, cutoff=0.0)
    return f"{name!a} (nearest: {', '.join(map(ascii if alike else str, nearest))})"


def _by_number(folders: Sequence[str], num_classes: int, path: str) -> dict[str, int]:
    labels = {name: int(name) for name in folders}
    outside = [name for name, label in labels.items() if label >= num_classes]
    if outside:
        raise ValueError(
            f"--val-path {path}: folder {shorten(outside[0])} is no class number of a model with {num_classes} classes, which go "
            f"from 0 to {num_classes - 1}; rename folders that count from 1, or evaluate a model of these classes"
        )
    if len(set(labels.values())) < len(labels):
        name = next(name for name, label in labels.items() if str(label) != name and str(label) in labels)
        raise ValueError(
            f"--val-path {path}: folders {shorten(name)} and {labels[name]} are the same class; merge them"
        )
    return labels
