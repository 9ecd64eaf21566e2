"""Atomic file writes: a reader, also after a crash, finds the old file or the complete new one, never a part of it."""

import os
import uuid
from collections.abc import Callable
from pathlib import Path


def write_atomically(path: Path, write: Callable[[Path], None], shared: bool = False) -> None:
    """Call `write` on a temporary file beside `path`, flush it to the disk, then rename it to `path`.

    `shared` gives the temporary file a unique name, for a path that several processes may write at once. Raises OSError, and
    leaves `path` unchanged, if a step fails.
    """
    unique = f".{uuid.uuid4().hex}" if shared else ""
    temporary = path.with_name(f".{path.name}{unique}.tmp")
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


def write_text_atomically(path: Path, text: str) -> None:
    """Write a text in UTF-8 as `write_atomically` does; bytes that are not UTF-8 survive (common/text.py)."""
    write_atomically(path, lambda file: _write_text(file, text))


def _write_text(file: Path, text: str) -> None:
    file.write_text(text, encoding="utf-8", errors="surrogateescape")


def remove_temporary(folder: Path) -> None:
    """Remove the temporary files of interrupted writes from a folder."""
    for stale in folder.glob(".*.tmp"):
        stale.unlink(missing_ok=True)
