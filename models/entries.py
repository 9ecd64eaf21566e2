"""Entries of a file of weights: found among the rest, freed of wrappers' prefixes and counters, checked to be finite."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

# First parts of names by wrappers of a model: DistributedDataParallel and AveragedModel, torch.compile, Lightning, others.
PREFIXES = ("module.", "_orig_mod.", "model.", "backbone.", "net.", "network.", "encoder.")
# Last parts of names of what tools add to a model: thop's counts and AveragedModel's number of averages.
COUNTS = ("total_ops", "total_params", "n_averaged")
MAX_NAME = 400  # characters
PLAIN = (int, float, complex, str, bytes, type(None))
SHOWN = 4  # names listed in an error


def is_weights(value: Any) -> bool:
    """Return True for a dictionary of tensors, among which plain values (an epoch, a name) may lie."""
    if not (isinstance(value, Mapping) and value and all(isinstance(name, str) for name in value)):
        return False
    return any(isinstance(v, Tensor) for v in value.values()) and all(
        isinstance(v, (Tensor, *PLAIN)) for v in value.values()
    )


def check_names(names: Iterable[Any], origin: str) -> None:
    """Raise ValueError for names that no module has: too long, or with characters that cannot be printed."""
    for name in names:
        if not isinstance(name, str) or len(name) > MAX_NAME or not name.isprintable():
            shown = ascii(name)[1:41] if isinstance(name, str) else type(name).__name__
            raise ValueError(f"{origin} is damaged: {shown} is no name of a tensor; use another file")


def clean(entries: Mapping[str, Any], unwrap: bool = True) -> tuple[dict[str, Tensor], list[str]]:
    """Return the tensors of `is_weights` entries, without counts, under names without prefixes; and notes on the changes.

    With `unwrap` a prefix that all names share is removed; without it only those of DistributedDataParallel and torch.compile.
    """
    notes = []
    others = [name for name, value in entries.items() if not isinstance(value, Tensor)]
    counts = [name for name in entries if name.rpartition(".")[2] in COUNTS and name not in others]
    for names, what in ((others, "that are no tensors"), (counts, "that tools have added")):
        if names:
            notes.append(f"left out {len(names)} entries {what}: {_some(names)}")
    left_out = {*others, *counts}
    weights = {name: value for name, value in entries.items() if name not in left_out}
    removed = ""
    while prefix := shared_prefix(weights, PREFIXES if unwrap else PREFIXES[:2]):
        weights = {name.removeprefix(prefix): value for name, value in weights.items()}
        removed += prefix
    if removed:
        notes.append(f"removed the prefix {removed} of all names")
    return weights, notes


def shared_prefix(names: Iterable[str], prefixes: Iterable[str] = PREFIXES, share: float = 1.0) -> str:
    """Return the prefix that at least a share of the names begin with, "" if there is none."""
    names = list(names)
    for prefix in prefixes:
        count = sum(name.startswith(prefix) and name != prefix for name in names)
        if names and count >= share * len(names):
            return prefix
    return ""


def rewrap(weights: Mapping[str, Tensor], own: Mapping[str, Any]) -> dict[str, Tensor]:
    """Put a prefix back that the model's own names have, as those of a custom model with one module may."""
    prefix = ""
    while inner := shared_prefix(name.removeprefix(prefix) for name in own):
        prefix += inner
        if all(name not in own for name in weights) and any(prefix + name in own for name in weights):
            return {prefix + name: tensor for name, tensor in weights.items()}
    return dict(weights)


def check_finite(weights: Mapping[str, Any], origin: str, remedy: str = "use an earlier or another checkpoint") -> None:
    """Raise ValueError, naming the first tensors and their counts, if values are nan or inf."""
    found = [(name, tensor, count) for name, tensor in weights.items() if (count := count_not_finite(tensor))]
    if found:
        shown = [f"{name} ({count} of {tensor.numel()} values)" for name, tensor, count in found]
        raise ValueError(
            f"{origin} holds values that are not finite (nan or inf) in {len(found)} of {len(weights)} tensors: "
            f"{_some(shown)}; the run that wrote it has diverged, or the file is damaged: {remedy}"
        )


def check_plain(weights: Mapping[str, Tensor], origin: str) -> None:
    """Raise ValueError, naming the first tensors, if some are quantised, sparse, complex or without values (meta)."""
    found = [(name, kind) for name, tensor in weights.items() if (kind := _odd_kind(tensor))]
    if found:
        raise ValueError(
            f"{origin} holds tensors of a kind that is not read: {_some([f'{name} ({kind})' for name, kind in found])}; save "
            "them again as plain tensors of real numbers"
        )


def _odd_kind(tensor: Tensor) -> str:
    kinds = {
        "without values": tensor.is_meta,
        "quantised": tensor.is_quantized,
        "complex": tensor.is_complex(),
        "sparse or nested": tensor.layout != torch.strided,
    }
    return next((kind for kind, holds in kinds.items() if holds), "")


def count_not_finite(tensor: Any) -> int:
    """Return the number of values that are nan or inf; 0 for integers and for what is no tensor."""
    if not isinstance(tensor, Tensor) or not (tensor.is_floating_point() or tensor.is_complex()):
        return 0
    if tensor.is_meta or not tensor.numel():
        return 0
    if tensor.element_size() == 1:  # float8, for which torch has no test
        tensor = tensor.float()
    finite = torch.isfinite(tensor)
    return 0 if bool(finite.all()) else int((~finite).sum())


def _some(names: list[str]) -> str:
    return f"{', '.join(names[:SHOWN])}{', ...' if len(names) > SHOWN else ''}"
