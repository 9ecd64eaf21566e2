"""Disk space of a run directory: the bytes that its checkpoints and best weights take, and the bytes that are free."""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from common.byte_size import format_bytes


@dataclass(frozen=True)
class SpaceNeed:
    """Sizes and numbers of the files of a run: `keep` checkpoints and the best weights of each kind, raw and EMA."""

    checkpoint: int  # bytes
    weights: int  # bytes of one file of best weights
    keep: int
    kinds: int

    @property
    def total(self) -> int:
        """Return the bytes at most: a new file of either kind is complete before an old one is removed."""
        return (self.keep + 1) * self.checkpoint + (self.kinds + 1) * self.weights

    def still_needed(self, stored: int) -> int:
        """Return the bytes that must be free in a run directory whose files take `stored` bytes already."""
        return max(self.total - stored, self.checkpoint + self.weights)

    def describe(self) -> str:
        """Return the sizes as text."""
        files = f"{self.kinds} files" if self.kinds > 1 else "1 file"
        return (
            f"{format_bytes(self.total)} for CHECKPOINT.KEEP + 1 = {self.keep + 1} checkpoints of {format_bytes(self.checkpoint)} "
            f"and {files} of best weights of {format_bytes(self.weights)}, plus one being written"
        )


@dataclass(frozen=True)
class WriteFailure:
    """Failed write of a checkpoint or of best weights: the bytes of the file, and those free after the attempt."""

    file: str
    reason: str  # not the error itself, whose traceback would keep the snapshot in memory
    need: int
    free: int | None

    def __str__(self) -> str:
        """Return reason, need and room as text."""
        room = "free space unknown" if self.free is None else f"{format_bytes(self.free)} free"
        return f"{self.reason}; {format_bytes(self.need)} needed, {room}"


def describe_failure(file: str, error: Exception, tensors: Any, folder: Path) -> WriteFailure:
    """Return the failure of writing `tensors` to a file in a folder."""
    first_line = next(iter(str(error).strip().splitlines()), "")
    return WriteFailure(file, f"{type(error).__name__}: {first_line[:200]}", size_of(tensors), free_bytes(folder))


def free_bytes(path: Path) -> int | None:
    """Return the bytes that this user may still write to a folder, or to its first ancestor that exists; None if unknown."""
    for folder in (path, *path.absolute().parents):
        try:
            usage = shutil.disk_usage(folder)
        except FileNotFoundError:
            continue
        except OSError:
            return None
        return usage.free if usage.total else None  # some network file systems report zeros
    return None


def size_of(tree: Any) -> int:
    """Return the bytes of the tensors in nested dicts and lists, each storage counted once, as torch.save writes them."""
    storages: dict[int, int] = {}

    def visit(node: Any) -> None:
        if isinstance(node, Tensor):
            storage = node.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        elif isinstance(node, Mapping):
            for value in node.values():
                visit(value)
        elif isinstance(node, list | tuple):
            for value in node:
                visit(value)

    visit(tree)
    return sum(storages.values())
