"""Atomic file writes: a reader, also after a crash, finds the old file or the complete new one, never a part of it."""

import os
import secrets
from collections.abc import Callable
from glob import escape
from pathlib import Path

from common.regular_files import regular


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Call `write` on a new, empty file beside `path`, flush it to the disk, then rename it to `path`.

    The name of the file is random, and its permissions follow the umask. A link at `path` is replaced, not followed. Raises
    OSError, and leaves `path` unchanged, if a step fails.
    """
    temporary = path.with_name(f".{path.name[:40]}.{secrets.token_hex(8)}.tmp")
    os.close(regular(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL))
    try:
        write(temporary)
        _flush(regular(temporary, os.O_RDWR))
        temporary.replace(path)
        _flush(os.open(path.parent, os.O_RDONLY))
    finally:
        temporary.unlink(missing_ok=True)


def _flush(file: int) -> None:
    try:
        os.fsync(file)
    finally:
        os.close(file)


def write_text_atomically(path: Path, text: str) -> None:
    """Write a text in UTF-8 as `write_atomically` does; bytes that are not UTF-8 survive (common/text.py)."""
    write_atomically(path, lambda file: file.write_bytes(text.encode("utf-8", "surrogateescape")))


def remove_temporary(folder: Path, name: str = "") -> None:
    """Remove the temporary files of interrupted writes from a folder: those of a file of that name, or all."""
    for stale in folder.glob(f".{escape(name[:40])}*.tmp"):
        if stale.is_symlink() or not stale.is_dir():
            stale.unlink(missing_ok=True)
