"""Checkpoint files: written atomically, with a checksum, read without unpickling code.

A run directory keeps `checkpoints/update-<number>.pt` (everything needed to continue) and `best_raw.safetensors`,
`best_ema.safetensors` (weights only, with their accuracy in the header). A checkpoint is what torch.save writes: a zip
archive; its comment, at the end of the file, holds the SHA-256 of all bytes before it.
"""

import hashlib
import io
import json
import os
import re
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from common.atomic_files import remove_temporary, write_atomically
from common.regular_files import check_kind
from engine.checkpoint.contents import find_fault

FORMAT = 2  # increased when old code cannot read a new checkpoint; format 1 had no checksum
_NAME = re.compile(r"update-(\d{8,})\.pt")
_PREFIX = b"retoken sha256 "  # of the checksum, followed by 64 hexadecimal digits
_CHECKSUM_LENGTH = len(_PREFIX) + 64
MAX_HEADER = 16 << 20  # bytes of a safetensors header
_NO_COMMENT = bytes(2)  # a zip archive ends with the length of its comment, and the comment


Reader = Callable[[Path], Any]  # of a torch file; trainer/restore.py passes that of models/torch_files.py


class DamagedError(ValueError):
    """Raised for a checkpoint whose content differs from what was written."""


def save_state(path: Path, state: Mapping[str, Any]) -> None:
    """Write a run's whole state (tensors and plain values). Raises OSError, also where torch wraps one in a RuntimeError."""

    def write(file: Path) -> None:
        try:
            with file.open("wb") as raw:
                writer = ChecksumWriter(raw)
                torch.save({"format": FORMAT, **state}, cast("IO[bytes]", writer))
                writer.finish()
        except RuntimeError as error:  # "unexpected pos 704 vs 598": the OSError is its context
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise

    write_atomically(path, write)


def read_trusted(path: Path) -> Any:
    """Read a torch file that this program has written, by torch's own restricted reader."""
    return torch.load(path, map_location="cpu", weights_only=True)


def load_state(path: Path, verify: bool = True, read: Reader = read_trusted) -> dict[str, Any]:
    """Read a state written by `save_state`, on the CPU; `verify` compares its checksum, which reads the file once more.

    Where the file may come from somebody else, `read` must be a reader that bounds memory and builds nothing but tensors and
    plain values. Raises DamagedError for a file that differs from what was written, is no checkpoint at all or holds other
    values than one; ValueError for a missing, unreadable, foreign or newer one.
    """
    has_checksum = False
    try:
        has_checksum = _has_checksum(path, verify)
        state = read(path)
    except FileNotFoundError as error:
        raise ValueError(f"checkpoint {path} does not exist") from error
    except DamagedError:
        raise
    except OSError as error:
        raise ValueError(
            f"{path} cannot be read ({error.strerror}); is the disk still there, and the file yours?"
        ) from error
    except Exception as error:
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)
        if has_checksum or isinstance(error, MemoryError):
            raise ValueError(
                f"{path} is intact but cannot be read here ({first[:160]}): it is of a newer Retoken, or there is too little memory"
            ) from error
        raise DamagedError(f"{path} cannot be read, it is damaged or no checkpoint ({first[:160]})") from error
    if not isinstance(state, dict) or "format" not in state or "model" not in state:
        raise ValueError(f"{path} is not a checkpoint of a run; to start from its weights use --init")
    if fault := find_fault(state):
        raise DamagedError(f"{path} is damaged or no checkpoint: {fault}")
    if state["format"] > FORMAT:
        raise ValueError(f"{path} has format {state['format']}, this version reads up to {FORMAT}; update Retoken")
    if state["format"] > 1 and not has_checksum:
        raise DamagedError(f"{path} is damaged: its checksum is missing")
    return state


def save_weights(path: Path, weights: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Write weights as safetensors, with metadata (JSON values) in the header."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    header = {"retoken": json.dumps({"format": FORMAT, **metadata})}
    # Not save_file, whose own temporary file would remain after a kill.
    content = save(tensors, header)
    write_atomically(path, lambda file: _write(file, content))


def _write(file: Path, content: bytes) -> None:
    file.write_bytes(content)


def read_metadata(path: Path) -> dict[str, Any]:
    """Return the metadata in the header of a file of `save_weights`; empty for a missing or damaged file."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
        if length > MAX_HEADER:
            return {}
        with safe_open(path, "pt") as file:
            metadata = json.loads((file.metadata() or {}).get("retoken", "{}"))
    except (OSError, ValueError, SafetensorError, RecursionError):
        return {}
    known = isinstance(metadata, dict) and isinstance(metadata.get("update", 0), int)
    return metadata if known else {}


class CheckpointFolder:
    """Folder of the numbered checkpoints of a run; `keep` of them are kept."""

    def __init__(self, path: Path, keep: int):
        self.path, self.keep = path, keep

    def latest(self) -> Path | None:
        """Return the checkpoint of the highest update, or None."""
        found = self.numbered()
        return found[-1] if found else None

    def latest_update(self) -> int | None:
        """Return the number of the newest checkpoint's update; None if there is none or the folder cannot be read."""
        try:
            found = self.latest()
        except (OSError, ValueError):
            return None
        match = _NAME.fullmatch(found.name) if found else None
        return int(match[1]) if match else None

    def numbered(self) -> list[Path]:
        """Return all checkpoints, oldest first."""
        if not check_kind(self.path, stat.S_IFDIR):  # not a link: what lies elsewhere is neither read nor pruned
            return []
        named = [(int(match[1]), path) for path in self.path.iterdir() if (match := _NAME.fullmatch(path.name))]
        return [path for _, path in sorted(named)]

    def path_of(self, update: int) -> Path:
        """Return the path of the checkpoint after `update` updates."""
        return self.path / f"update-{update:08d}.pt"

    def newest_good(
        self, accept: Callable[[dict[str, Any]], bool] = lambda state: True, read: Reader = read_trusted
    ) -> tuple[Path | None, dict[str, Any], list[DamagedError]]:
        """Return the newest intact checkpoint whose state is accepted, its state, and the errors of damaged newer ones.

        Raises ValueError if there are checkpoints and all are damaged.
        """
        damaged: list[DamagedError] = []
        found = self.numbered()
        for path in reversed(found):
            try:
                state = load_state(path, read=read)
            except DamagedError as error:
                damaged.append(error)
                continue
            if accept(state):
                return path, state, damaged
        if found and len(damaged) == len(found):
            raise ValueError(
                f"no checkpoint in {self.path} is intact: {damaged[0]}; move the folder away to start again"
            )
        return None, {}, damaged

    def set_aside(self, damaged: list[DamagedError], newer_than: Path) -> list[Path]:
        """Rename all checkpoints newer than a good one if any of them is damaged; return the new paths."""
        if not damaged:
            return []
        newer = [path for path in self.numbered() if path.name > newer_than.name]
        return [path.replace(path.with_name(f"{path.name}.damaged")) for path in newer]

    def save(self, update: int, state: Mapping[str, Any], prune: bool = True) -> Path:
        """Write the state after `update` updates; then, with `prune`, remove all but the newest `keep` checkpoints."""
        if not check_kind(self.path, stat.S_IFDIR):
            self.path.mkdir(parents=True, exist_ok=True)
        remove_temporary(self.path)
        path = self.path_of(update)
        save_state(path, state)
        if prune:
            self.prune()
        return path

    def prune(self) -> None:
        """Remove all but the newest `keep` checkpoints."""
        for old in self.numbered()[: -self.keep]:
            old.unlink(missing_ok=True)

    def remove_after(self, last: Path) -> None:
        """Remove the checkpoints of later updates than `last`."""
        for path in self.numbered():
            if path.name > last.name:
                path.unlink(missing_ok=True)


class ChecksumWriter(io.RawIOBase):
    """Sequential writer of a zip archive to a file; `finish` stores the checksum in the archive's comment.

    The checksum is computed from the bytes passed to `write`, not from the file, so that it detects errors of the disk.
    """

    def __init__(self, file: IO[bytes]):
        self.file, self.digest = file, hashlib.sha256()
        self.last = b""  # the last two bytes, held back: at the end of the archive the length of its comment

    def writable(self) -> bool:
        """Return True: torch.save asks for it."""
        return True

    def write(self, data: Any) -> int:
        """Write all bytes but the last two; return the number of bytes passed."""
        view = memoryview(data).cast("B")
        if len(view) < len(_NO_COMMENT):
            held = self.last + bytes(view)
            self._put(held[: -len(_NO_COMMENT)])
            self.last = held[-len(_NO_COMMENT) :]
        else:
            self._put(self.last)
            self._put(view[: -len(_NO_COMMENT)])
            self.last = bytes(view[-len(_NO_COMMENT) :])
        return len(view)

    def finish(self) -> None:
        """Write the comment with the checksum. The file stays open."""
        if self.last != _NO_COMMENT:
            raise RuntimeError("torch.save has ended a file in an unknown way")
        self._put(_CHECKSUM_LENGTH.to_bytes(2, "little"))
        self.file.write(_PREFIX + self.digest.hexdigest().encode())

    def _put(self, data: bytes | memoryview) -> None:
        self.digest.update(data)
        self.file.write(data)


def read_checksum(path: Path) -> bytes:
    """Return the checksum stored in a checkpoint; empty for format 1, a missing or an unreadable file."""
    try:
        with path.open("rb") as file:
            return _stored_checksum(file)
    except OSError:
        return b""


def _has_checksum(path: Path, verify: bool) -> bool:
    """Return True if a file has a checksum; raise DamagedError if `verify` is set and it does not match the content."""
    with path.open("rb") as file:
        checksum = _stored_checksum(file)
        if checksum and verify and checksum != _compute_checksum(file, file.tell() - _CHECKSUM_LENGTH):
            raise DamagedError(f"{path} is damaged: its checksum is not that of what was written")
    return bool(checksum)


def _stored_checksum(file: IO[bytes]) -> bytes:
    """Return the checksum at the end of a file, or nothing; leaves the file position at the end."""
    file.seek(max(file.seek(0, os.SEEK_END) - _CHECKSUM_LENGTH, 0))
    checksum = file.read()
    return checksum if len(checksum) == _CHECKSUM_LENGTH and checksum.startswith(_PREFIX) else b""


def _compute_checksum(file: IO[bytes], size: int) -> bytes:
    """Return the checksum of the first `size` bytes; leaves the file position after them."""
    digest, buffer = hashlib.sha256(), memoryview(bytearray(1 << 22))
    file.seek(0)
    while size > 0:
        count = file.readinto(buffer[: min(size, len(buffer))])  # type: ignore[attr-defined]
        if not count:
            raise EOFError("the file has shrunk while it was read")
        digest.update(buffer[:count])
        size -= count
    return _PREFIX + digest.hexdigest().encode()
