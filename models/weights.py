"""Weights from files of Retoken, of timm and of the authors, read without unpickling code.

    layout      entries                                               written by
    retoken     safetensors, or format, model, ema, facts             train.py
    timm        state_dict, state_dict_ema, args (Namespace)          SG-Former's trainer
    swin        model, config (yacs CfgNode)                          GroupMixFormer's trainer
    deit        model, model_ema, args (Namespace)                    STViT's trainer
    plain       name: tensor, alone or under model                    anybody

Published names are turned into ours by the model itself (models/published.py), here and in any `load_state_dict`.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from .backbone import Backbone
from .entries import check_finite, check_plain, clean, is_weights, rewrap, shared_prefix
from .file_kinds import find_weights, is_safetensors
from .published import COUNTER, from_published, is_published, to_published
from .unpickling import read_torch

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
    weights, notes = clean(entries, unwrap="model" not in metadata)
    if not weights:
        raise ValueError(f"{path} holds no weights (entries: {', '.join(list(entries)[:8])})")
    check_plain(weights, str(path))
    check_finite(weights, str(path))
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
                f"{path} holds no weights that are understood (entries: {', '.join(map(str, list(state)[:8]))})"
            )
        return state, {"layout": "plain", "weights": "raw", "holds": ["raw"]}
    metadata = _metadata(state.get("facts"))
    if "weights" in metadata:  # of a converted file: it has these only
        which, entry = metadata["weights"], raw
    else:
        entry = raw if which == "raw" else ema
    if entry is None:
        other = "EMA" if which == "ema" else "raw"
        raise ValueError(
            f"{path} holds no {other} weights (entries: {', '.join(map(str, state))}); ask for the other ones"
        )
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
        for kind, found in (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
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
    except ValueError as error:
        raise ValueError(f"{origin} does not fit {type(model).__name__}: {error}; {remedy}") from error


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
        f"it has {adapted[other[0]].shape[0]} classes there, {own[other[0]].shape[0]} here{''.join(resized)}"
    )


def _resized(model: Backbone, name: str, adapted: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> bool:
    """Return True if an entry has another size in the file."""
    if name not in adapted:
        return False
    there = name if name in weights else next(iter(to_published(model, {name: adapted[name]})))
    return there in weights and weights[there].shape != adapted[name].shape


def classifier_names(model: nn.Module) -> tuple[str, ...]:
    """Return the module names of a timm model's classifier."""
    names = getattr(model, "default_cfg", {}).get("classifier") or ()
    return (names,) if isinstance(names, str) else tuple(names)


def _load_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        with safe_open(path, "pt") as file:
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            header = file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or not a safetensors file ({error}); use another checkpoint") from error
    try:
        stored = json.loads(header.get("retoken", "{}"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: its header is no JSON ({error}); use another checkpoint") from error
    metadata = {"weights": "raw", **_metadata(stored)}
    return weights, {**metadata, "layout": "safetensors", "holds": [metadata["weights"]]}


def _metadata(stored: Any) -> dict[str, Any]:
    """Return the metadata of a Retoken file; none for what another program has stored under their name."""
    if not isinstance(stored, dict) or stored.get("weights", "raw") not in ("raw", "ema"):
        return {}
    return stored


def _layout(state: Mapping[str, Any]) -> str:
    if "format" in state:
        return "retoken"
    if "state_dict" in state or "state_dict_ema" in state:
        return "timm"
    if "config" in state:
        return "swin"
    return "deit" if "args" in state or "model_ema" in state else "plain"
