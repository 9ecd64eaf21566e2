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
from safetensors.torch import save_file
from torch import Tensor

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
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise ValueError(f"checkpoint {path} does not exist") from error
    except Exception as error:
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ValueError(f"{path} cannot be read, it is damaged or no checkpoint ({first[:160]})") from error
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
