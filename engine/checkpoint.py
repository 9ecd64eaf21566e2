"""Checkpoints: written whole or not at all, read without unpickling code.

A run directory keeps `checkpoints/update-<number>.pt` (everything needed to continue) and `best_raw.safetensors`,
`best_ema.safetensors` (weights only, with their accuracy in the header).
"""

import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

FORMAT = 1  # raised when a checkpoint of the new form cannot be read by the old code
_NAME = re.compile(r"update-(\d{8,})\.pt")


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary file beside `path`, flush it to the disk, then put it in place in one step."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        write(temporary)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    finally:
        temporary.unlink(missing_ok=True)


def save_state(path: Path, state: Mapping[str, Any]) -> None:
    """Write a run's whole state (tensors and plain values)."""
    write_atomically(path, lambda file: torch.save({"format": FORMAT, **state}, file))


def load_state(path: Path) -> dict[str, Any]:
    """Read a state that `save_state` wrote, on the CPU. Raises ValueError for a missing, foreign, damaged or newer file."""
    state = _read_torch(path)
    if not isinstance(state, dict) or "format" not in state or "model" not in state:
        raise ValueError(f"{path} is not a checkpoint of a run; to start from its weights use --init")
    if state["format"] > FORMAT:
        raise ValueError(f"{path} has format {state['format']}, this version reads up to {FORMAT}; update Retoken")
    return state


def save_weights(path: Path, weights: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Write weights as safetensors, with facts (JSON values) in the header."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    header = {"retoken": json.dumps({"format": FORMAT, **facts})}
    write_atomically(path, lambda file: save_file(tensors, file, header))


def load_weights(path: Path, which: str = "raw") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read (weights, facts) from a .safetensors file or a run's checkpoint, on the CPU.

    `which` picks raw or EMA weights where a file holds both. Raises ValueError with the remedy for any file that is missing,
    damaged or holds no such weights.
    """
    if not path.is_file():
        raise ValueError(f"checkpoint {path} does not exist{_nearby(path)}")
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, "pt") as file:
                weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                header = file.metadata() or {}
        except SafetensorError as error:
            raise ValueError(
                f"{path} is damaged or not a safetensors file ({error}); use another checkpoint"
            ) from error
        return weights, json.loads(header.get("retoken", "{}"))
    state = _read_torch(path)
    if isinstance(state, dict) and "format" in state and "model" in state:
        state = load_state(path)
        weights = state["model" if which == "raw" else "ema"]
        if weights is None:
            raise ValueError(f"{path} holds no EMA weights (EMA.DECAY was 0); ask for raw weights")
        return weights, {**state["facts"], "weights": which}
    if isinstance(state, dict) and state and all(isinstance(value, Tensor) for value in state.values()):
        return state, {}
    found = ", ".join(map(str, list(state)[:8])) if isinstance(state, dict) else type(state).__name__
    raise ValueError(f"{path} holds no weights that are understood (found: {found})")


def _read_torch(path: Path) -> Any:
    if not path.is_file():
        raise ValueError(f"checkpoint {path} does not exist{_nearby(path)}")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"{path} cannot be read: it is damaged, or holds objects that only unpickling could make ({first[:200]})"
        ) from error


def _nearby(path: Path) -> str:
    folder = next((p for p in path.parents if p.is_dir()), Path())
    found = sorted([*folder.glob("*.safetensors"), *folder.glob("**/update-*.pt")])[:4]
    return (
        f"; {folder} holds {', '.join(str(p.relative_to(folder)) for p in found)}"
        if found
        else f"; {folder} holds no checkpoint"
    )


def fit(
    model: nn.Module, weights: Mapping[str, Tensor], source: str, ignore: tuple[str, ...] = ()
) -> dict[str, Tensor]:
    """Return the weights the model can load; raise ValueError naming the first names and shapes that do not match.

    `ignore` lists name prefixes left as the model has them (a classifier for other classes).
    """
    own = (
        {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(ignore)}
        if ignore
        else model.state_dict()
    )
    kept = {name: tensor for name, tensor in weights.items() if not (ignore and name.startswith(ignore))}
    missing = [name for name in own if name not in kept]
    unexpected = [name for name in kept if name not in own]
    shapes = [
        f"{name} is {tuple(kept[name].shape)} there, {tuple(tensor.shape)} here"
        for name, tensor in own.items()
        if name in kept and kept[name].shape != tensor.shape
    ]
    faults = [
        f"{len(found)} {kind}: {', '.join(found[:4])}{', ...' if len(found) > 4 else ''}"
        for kind, found in (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
        if found
    ]
    if faults:
        raise ValueError(
            f"{source} does not fit {type(model).__name__}: {'; '.join(faults)}; check MODEL.NAME and the class count"
        )
    return kept


def load_initial(model: nn.Module, weights: Mapping[str, Tensor], source: str) -> str:
    """Load weights to start a new run from; the classifier stays fresh if it is for another number of classes.

    Returns a sentence that says what was loaded. Raises ValueError for anything else that does not fit.
    """
    own = model.state_dict()
    heads = tuple(f"{name}." for name in classifier_names(model))
    other = [n for n, w in weights.items() if heads and n.startswith(heads) and n in own and own[n].shape != w.shape]
    if not other:
        model.load_state_dict(fit(model, weights, source))
        return f"started from all {len(weights)} tensors of {source}"
    model.load_state_dict(fit(model, weights, source, heads), strict=False)
    return (
        f"started from {source}; the classifier stays freshly initialised: it has {weights[other[0]].shape[0]} classes there, "
        f"{own[other[0]].shape[0]} here"
    )


def classifier_names(model: nn.Module) -> tuple[str, ...]:
    """Return the module names of a timm model's classifier."""
    names = getattr(model, "default_cfg", {}).get("classifier") or ()
    return (names,) if isinstance(names, str) else tuple(names)


class CheckpointFolder:
    """The numbered checkpoints of a run."""

    def __init__(self, path: Path, keep: int):
        self.path, self.keep = path, keep

    def latest(self) -> Path | None:
        """Return the checkpoint of the highest update, or None."""
        found = self.numbered()
        return found[-1] if found else None

    def numbered(self) -> list[Path]:
        """Return all checkpoints, oldest first."""
        if not self.path.is_dir():
            return []
        named = [(int(match[1]), path) for path in self.path.iterdir() if (match := _NAME.fullmatch(path.name))]
        return [path for _, path in sorted(named)]

    def save(self, update: int, state: Mapping[str, Any]) -> Path:
        """Write the state after `update` updates, then remove what is older than the last `keep`."""
        self.path.mkdir(parents=True, exist_ok=True)
        for stale in self.path.glob(".*.tmp"):
            stale.unlink(missing_ok=True)
        path = self.path / f"update-{update:08d}.pt"
        save_state(path, state)
        for old in self.numbered()[: -self.keep]:
            old.unlink(missing_ok=True)
        return path
