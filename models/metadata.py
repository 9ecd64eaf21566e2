"""Metadata of a file of weights, checked: plain values of bounded size, and the entries that are used, by their types."""

import json
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

MAX_DEPTH, MAX_SIZE = 16, 8 << 20  # nested containers; values and characters in all
MAX_TEXT, MAX_SIDE = 200, 4096  # characters of a name that is no class; pixels of an image's side
RESERVED = ("layout", "holds", "notes")  # entries that the reader adds
KINDS = ("raw", "ema")
REMEDY = "use another file"


def own_metadata(stored: Any, origin: str) -> dict[str, Any]:
    """Return checked metadata of a Retoken file; none for what another program has stored under their name."""
    if not isinstance(stored, dict) or stored.get("weights", "raw") not in list(KINDS):
        return {}
    return check_metadata(stored, origin)


def check_metadata(metadata: Any, origin: str) -> dict[str, Any]:
    """Return a file's metadata without the entries that a reader adds. Raises ValueError for what no run has written."""
    check_plain(metadata, origin)
    if not isinstance(metadata, dict) or not all(isinstance(key, str) for key in metadata):
        raise ValueError(f"{origin} is damaged: its metadata are no dictionary; {REMEDY}")
    for key, (fits, what) in ENTRIES.items():
        if key in metadata and not fits(metadata[key]):
            raise ValueError(
                f"{origin} is damaged: its metadata state {key} {_short(metadata[key])}, which is not {what}; {REMEDY}"
            )
    classes, count = metadata.get("classes"), metadata.get("num_classes")
    if classes and count is not None and count != len(classes):
        raise ValueError(f"{origin} is damaged: its metadata state {count} classes and name {len(classes)}; {REMEDY}")
    return {key: value for key, value in metadata.items() if key not in RESERVED}


def parse_metadata(text: str, origin: str) -> dict[str, Any]:
    """Return the metadata of a safetensors header's text, as `own_metadata` does."""
    try:
        metadata = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{origin} is damaged: its header is no JSON ({str(error)[:80]}); {REMEDY}") from error
    return own_metadata(metadata, origin)


def check_plain(value: Any, origin: str, others: tuple[type, ...] = ()) -> None:
    """Raise ValueError for values other than those of JSON and the `others`, for too many, and for too deeply nested ones."""
    size, left = 0, [(value, 0)]
    while left:
        item, depth = left.pop()
        size += 1
        if isinstance(item, Mapping):
            left += [(inner, depth + 1) for pair in item.items() for inner in pair]
        elif isinstance(item, list | tuple):
            left += [(inner, depth + 1) for inner in item]
        elif isinstance(item, str):
            size += len(item)
        elif not isinstance(item, (int, float, type(None), *others)):
            raise ValueError(f"{origin} is damaged: it holds a {type(item).__name__} among its values; {REMEDY}")
        if depth > MAX_DEPTH or size + len(left) > MAX_SIZE:
            raise ValueError(f"{origin} is damaged: its values are too many or nested too deeply; {REMEDY}")


def _is_whole(low: int, high: int) -> Callable[[Any], bool]:
    return lambda value: type(value) is int and low <= value <= high


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and abs(value) < 1e300 and math.isfinite(value)


def _are_numbers(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) == 3 and all(map(_is_number, value))


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= MAX_TEXT and value.isprintable()


def _is_evaluation(value: Any) -> bool:
    """Return True for an evaluation crop, whose choices are checked where it is used."""
    known = {"crop": _is_side, "resize": _is_resize, "interpolation": _is_name, "mode": _is_name, "fill": _are_levels}
    return isinstance(value, dict) and "crop" in value and all(k in known and known[k](v) for k, v in value.items())


def _are_levels(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) == 3 and all(map(_is_whole(0, 255), value))


def _is_size(value: Any) -> bool:
    return _is_side(value) or (isinstance(value, list | tuple) and len(value) == 2 and all(map(_is_side, value)))


def _are_texts(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(text, str) for text in value)


def _short(value: Any) -> str:
    text = ascii(value) if isinstance(value, str | int | float | bool) else f"a {type(value).__name__}"
    return re.sub(r"(.{60}).+", r"\1...", text)


_is_side, _is_resize = _is_whole(1, MAX_SIDE), _is_whole(0, 4 * MAX_SIDE)
_POSITION = (_is_whole(0, 1 << 50), "a whole number")
# Entries that are used, each with its test and a description of what it must be.
ENTRIES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "weights": (lambda value: isinstance(value, str) and value in KINDS, "raw or ema"),
    "model": (_is_name, "the name of a model"),
    "classes": (_are_texts, "a list of names"),
    "num_classes": (_is_whole(0, 1 << 31), "a number of classes"),
    "mean": (_are_numbers, "three numbers"),
    "std": (lambda value: _are_numbers(value) and all(v > 0 for v in value), "three positive numbers"),
    "img_size": (_is_size, f"a side of 1 to {MAX_SIDE} pixels, or height and width"),
    "evaluation": (_is_evaluation, "an evaluation crop"),
    "data": (lambda value: isinstance(value, dict), "a dictionary"),
    "top1": (_is_number, "a number"),
    "epoch": (_is_number, "a number"),
    "update": _POSITION,
    "format": _POSITION,
}
