"""Weights from files of Retoken, of timm and of the authors, read without unpickling code.

    layout      entries                                               written by
    retoken     safetensors, or format, model, ema, facts             train.py
    timm        state_dict, state_dict_ema, args (Namespace)          SG-Former's trainer
    swin        model, config (yacs CfgNode)                          GroupMixFormer's trainer
    deit        model, model_ema, args (Namespace)                    STViT's trainer
    plain       name: tensor, alone or under model                    anybody

Published names are turned into ours by the model itself (models/published.py), here and in any `load_state_dict`.
"""

from collections.abc import Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor, nn

from .backbone import Backbone
from .entries import check_finite, check_names, check_plain, clean, is_weights, rewrap, shared_prefix
from .file_kinds import find_weights, is_safetensors
from .metadata import own_metadata, parse_metadata
from .published import COUNTER, from_published, is_published, to_published
from .torch_files import MAX_DIMS, read_torch

EMA_ENTRIES = ("ema", "state_dict_ema", "model_ema")
RAW_ENTRIES = ("model", "state_dict", "model_state_dict", "module", "net")
SHOWN = 4  # names listed in an error
REMEDY = "check MODEL.NAME and the classes"


def load_weights(path: Path, which: str = "raw") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read (weights, metadata) from a file of any layout above, on the CPU, under the file's own names.

    `which` picks "raw" or "ema" weights where a file holds both. The metadata are those of a Retoken file (model, classes,
    ...) with `weights`, `layout`, and `holds`, the kinds of weights in it; and, if entries were left out or prefixes removed,
    `notes` that say so. Raises ValueError with the remedy for a file that is missing, damaged or of another kind, that holds no
    such weights or some that are not finite, or that only the unpickling of code could read.
    """
    path = find_weights(path)
    entries, metadata = _load_safetensors(path) if is_safetensors(path) else _load_torch(path, which)
    check_names(entries, str(path))
    weights, notes = clean(entries, unwrap="model" not in metadata)
    if not weights:
        raise ValueError(f"{path} holds no weights (entries: {_some(entries)}); name the file with the weights")
    check_plain(weights, str(path))
    check_finite(weights, str(path))
    _check_classes(metadata, weights, path)
    return weights, {**metadata, "notes": notes} if notes else metadata


def _load_torch(path: Path, which: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the entries and metadata of a torch file."""
    state = read_torch(path)
    if not isinstance(state, dict):
        raise ValueError(f"{path} holds a {type(state).__name__}, not weights")
    raw, ema = (next((key for key in keys if is_weights(state.get(key))), None) for keys in (RAW_ENTRIES, EMA_ENTRIES))
    if raw is None and ema is None:
        if not is_weights(state):
            raise ValueError(
                f"{path} holds no weights that are understood (entries: {_some(state)}); name the file with the weights"
            )
        return state, {"layout": "plain", "weights": "raw", "holds": ["raw"]}
    metadata = own_metadata(state.get("facts"), str(path))
    if "weights" in metadata:  # of a converted file: it has these only
        which, entry = metadata["weights"], raw
    else:
        entry = raw if which == "raw" else ema
    if entry is None:
        other = "EMA" if which == "ema" else "raw"
        raise ValueError(f"{path} holds no {other} weights (entries: {_some(state)}); ask for the other ones")
    holds = [which] if "weights" in metadata else [kind for kind, key in (("raw", raw), ("ema", ema)) if key]
    return state[entry], {**metadata, "layout": _layout(state), "weights": which, "holds": holds}


def fit(
    model: nn.Module,
    weights: Mapping[str, Tensor],
    origin: str,
    ignore: tuple[str, ...] = (),
    remedy: str = REMEDY,
) -> dict[str, Tensor]:
    """Return the weights under the model's names; raise ValueError naming the first names and shapes that do not match.

    `ignore` lists prefixes of the model's names that may differ and are left out (a classifier for other classes).
    """
    own, adapted = model.state_dict(), adapt(model, weights, origin, remedy)
    if ignore:
        own, adapted = ({k: v for k, v in d.items() if not k.startswith(ignore)} for d in (own, adapted))
    missing = [name for name in own if name not in adapted and not name.endswith(COUNTER)]
    unexpected = [name for name in adapted if name not in own]
    shapes = [
        f"{name} is {tuple(adapted[name].shape)} there, {tuple(tensor.shape)} here"
        for name, tensor in own.items()
        if name in adapted and adapted[name].shape != tensor.shape
    ]
    faults = [
        f"{len(found)} {kind}: {', '.join(found[:SHOWN])}{', ...' if len(found) > SHOWN else ''}"
        for kind, found in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("of another shape", shapes),
        )
        if found
    ]
    if faults:
        if prefix := shared_prefix(unexpected, share=0.5):
            remedy = f"most of its names begin with {prefix}, which only those of a wrapped model have; {remedy}"
        raise ValueError(f"{origin} does not fit {type(model).__name__}: {'; '.join(faults)}; {remedy}")
    return {name: adapted.get(name, tensor) for name, tensor in own.items()}


def adapt(model: nn.Module, weights: Mapping[str, Tensor], origin: str, remedy: str = REMEDY) -> dict[str, Tensor]:
    """Rename published entries to the model's names, and fit entries like position embeddings to its size."""
    if not isinstance(model, Backbone):
        return rewrap(weights, model.state_dict())
    try:
        if is_published(model, weights):
            return from_published(model, weights, strict=False)
        return {name: model.fit_entry(name, tensor) for name, tensor in weights.items()}
    except (ValueError, IndexError, RuntimeError) as error:  # the last two of tensors with too few dimensions
        raise ValueError(f"{origin} does not fit {type(model).__name__}: {str(error)[:400]}; {remedy}") from error


def load_warm_start(model: nn.Module, weights: Mapping[str, Tensor], origin: str) -> str:
    """Load weights to start a new run from; the classifier stays fresh if it is for another number of classes.

    Returns a sentence about the loaded entries. Raises ValueError for anything else that does not fit.
    """
    own, adapted = model.state_dict(), adapt(model, weights, origin)
    heads = tuple(f"{name}." for name in classifier_names(model))
    other = [n for n, w in adapted.items() if heads and n.startswith(heads) and n in own and own[n].shape != w.shape]
    changed = []
    if isinstance(model, Backbone):
        changed = [name for name in model.resizable if _resized(model, name, adapted, weights)]
    resized = [f"; {name} was resized to {tuple(adapted[name].shape)}" for name in changed]
    if not other:
        model.load_state_dict(fit(model, weights, origin))
        return f"started from all {len(weights)} tensors of {origin}, the classifier included{''.join(resized)}"
    model.load_state_dict(fit(model, weights, origin, heads), strict=False)
    return (
        f"started from {origin}; the classifier stays freshly initialised: "
        f"it has {row_count(adapted[other[0]])} classes there, {own[other[0]].shape[0]} here{''.join(resized)}"
    )


def _resized(model: Backbone, name: str, adapted: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> bool:
    """Return True if an entry has another size in the file."""
    if name not in adapted:
        return False
    there = name if name in weights else next(iter(to_published(model, {name: adapted[name]})))
    return there in weights and weights[there].shape != adapted[name].shape


def row_count(tensor: Tensor) -> int:
    """Return the number of rows of a classifier's weight or bias; 0 for a tensor without dimensions."""
    return tensor.shape[0] if tensor.ndim else 0


def classifier_names(model: nn.Module) -> tuple[str, ...]:
    """Return the module names of a timm model's classifier."""
    names = getattr(model, "default_cfg", {}).get("classifier") or ()
    return (names,) if isinstance(names, str) else tuple(names)


def _load_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    weights: dict[str, Tensor] = {}
    try:
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                if len(shape := file.get_slice(name).get_shape()) > MAX_DIMS:
                    raise ValueError(f"a tensor has {len(shape)} dimensions")
                weights[name] = file.get_tensor(name)
            header = file.metadata() or {}
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}); is the file yours, and the disk there?") from error
    except Exception as error:  # SafetensorError, and torch's for types and shapes that it lacks
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ValueError(
            f"{path} is damaged or not a safetensors file ({first[:160]}); use another checkpoint"
        ) from error
    metadata = {"weights": "raw", **parse_metadata(header.get("retoken", "{}"), str(path))}
    return weights, {**metadata, "layout": "safetensors", "holds": [metadata["weights"]]}


def _check_classes(metadata: Mapping[str, Any], weights: Mapping[str, Tensor], path: Path) -> None:
    """Raise ValueError for a number of classes that no tensor has rows for: a model of that size would be built."""
    count = metadata.get("num_classes") or 0
    if count and not any(tensor.ndim and tensor.shape[0] == count and tensor.numel() for tensor in weights.values()):
        raise ValueError(
            f"{path} is damaged: its metadata state {count:,} classes, for which none of its tensors has rows; use another file"
        )


def _some(names: Iterable[Any]) -> str:
    """Return the first names of a file's entries, shortened."""
    shown = [ascii(name)[1:-1][:40] if isinstance(name, str) else type(name).__name__ for name in islice(names, 8)]
    return ", ".join(shown)


def _layout(state: Mapping[str, Any]) -> str:
    if "format" in state:
        return "retoken"
    if "state_dict" in state or "state_dict_ema" in state:
        return "timm"
    if "config" in state:
        return "swin"
    return "deit" if "args" in state or "model_ema" in state else "plain"
