"""Contents of a checkpoint, checked by type before they are used: a file may come from somebody else."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

MAX_DEPTH, MAX_VALUES = 16, 8 << 20  # nested containers; values and characters in all
MAX_NAME = 400  # characters of a tensor's name
MAX_COUNT = 1 << 50  # of updates
RESULT = ("correct1", "top1", "epoch", "update")  # entries of a best result that are used later


def find_fault(contents: Any) -> str:
    """Return the first fault of a checkpoint's contents as text, "" if there is none. Entries may be missing."""
    if not isinstance(contents, Mapping):
        return f"it holds a {type(contents).__name__}"
    if fault := _find_foreign(contents):
        return fault
    wrong = [name for name, fits in ENTRIES.items() if name in contents and not fits(contents[name])]
    return f"its entry {wrong[0]} is none of a checkpoint" if wrong else ""


def _find_foreign(contents: Any) -> str:
    """Return a text on values that are neither plain nor tensors, on too many, and on too deeply nested ones."""
    size, left = 0, [(contents, 0)]
    while left:
        item, depth = left.pop()
        size += 1
        if isinstance(item, Mapping):
            left += [(inner, depth + 1) for pair in item.items() for inner in pair]
        elif isinstance(item, list | tuple):
            left += [(inner, depth + 1) for inner in item]
        elif isinstance(item, str):
            size += len(item)
        elif not isinstance(item, int | float | Tensor | type(None)):
            return f"it holds a {type(item).__name__}"
        if depth > MAX_DEPTH or size + len(left) > MAX_VALUES:
            return "its values are too many or nested too deeply"
    return ""


def _are_tensors(value: Any) -> bool:
    return isinstance(value, Mapping) and all(_is_name(k) and isinstance(v, Tensor) for k, v in value.items())


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= MAX_NAME and value.isprintable()


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < MAX_COUNT


def _are_results(value: Any) -> bool:
    return isinstance(value, dict) and all(
        which in ("raw", "ema")
        and isinstance(result, dict)
        and all(isinstance(key, str) for key in result)
        and all(isinstance(result.get(key, 0), int | float) for key in RESULT)
        for which, result in value.items()
    )


def _is_optimizer(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and isinstance(value.get("state", {}), dict)
        and all(
            type(key) is int and isinstance(e, dict) and all(map(_is_name, e))
            for key, e in value.get("state", {}).items()
        )
        and isinstance(value.get("param_groups", []), list)
        and all(isinstance(group, dict) and _are_whole(group.get("params")) for group in value.get("param_groups", []))
    )


def _are_whole(value: Any) -> bool:
    return isinstance(value, list) and all(type(number) is int for number in value)


def _is_facts(value: Any) -> bool:
    classes = value.get("classes", []) if isinstance(value, dict) else None
    return isinstance(classes, list) and all(isinstance(name, str) for name in classes) and _is_data(value.get("data"))


def _is_data(value: Any) -> bool:
    return value is None or (isinstance(value, dict) and all(isinstance(key, str) for key in value))


ENTRIES: dict[str, Callable[[Any], bool]] = {
    "format": lambda value: type(value) is int and value > 0,
    "model": _are_tensors,
    "ema": lambda value: value is None or _are_tensors(value),
    "optimizer": _is_optimizer,
    "optimizer_name": lambda value: isinstance(value, str),
    "scaler": lambda value: isinstance(value, dict) and all(isinstance(v, int | float) for v in value.values()),
    **dict.fromkeys(("update", "closed", "samples", "global_batch", "updates_per_epoch", "rollbacks"), _is_count),
    "best": _are_results,
    "sums": lambda value: isinstance(value, Tensor) and value.shape in ((2, 4), (2, 6)) and value.is_floating_point(),
    "skips": lambda value: isinstance(value, Tensor) and value.shape == (3,) and bool(value.isfinite().all()),
    "facts": _is_facts,
}
