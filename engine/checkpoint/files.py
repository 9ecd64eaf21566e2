"""Checkpoints: written whole or not at all, sealed with a checksum, read without unpickling code.

A run directory keeps `checkpoints/update-<number>.pt` (everything needed to continue) and `best_raw.safetensors`,
`best_ema.safetensors` (weights only, with their accuracy in the header). A checkpoint is what torch.save writes: a zip
archive, whose comment, at the end of the file, holds the SHA-256 of all that precedes it.
"""

import hashlib
import io
import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from common.atomic_files import remove_temporary, write_atomically

FORMAT = 2  # raised when a checkpoint of the new form cannot be read by the old code; 1 had no seal
_NAME = re.compile(r"update-(\d{8,})\.pt")
_SEAL = b"retoken sha256 "  # followed by 64 hexadecimal digits
_SEAL_LENGTH = len(_SEAL) + 64
_NO_COMMENT = bytes(2)  # a zip archive ends with the length of its comment, and the comment


class DamagedError(ValueError):
    """A checkpoint is not what was written."""


def save_state(path: Path, state: Mapping[str, Any]) -> None:
    """Write a run's whole state (tensors and plain values). Raises OSError, also for what torch makes of one."""

    def write(file: Path) -> None:
        try:
            with file.open("wb") as stream:
                sealing = Sealing(stream)
                torch.save({"format": FORMAT, **state}, cast("IO[bytes]", sealing))
                sealing.finish()
        except RuntimeError as error:  # "unexpected pos 704 vs 598": the disk's own words stand behind it
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise

    write_atomically(path, write)


def load_state(path: Path, verify: bool = True) -> dict[str, Any]:
    """Read a state that `save_state` wrote, on the CPU; `verify` its checksum, for which all of it is read once more.

    Raises DamagedError for a file that is not as it was written or no checkpoint at all; ValueError for a missing, unreadable,
    foreign or newer one.
    """
    sealed = False
    try:
        sealed = _is_sealed(path, verify)
        state = torch.load(path, map_location="cpu", weights_only=True)
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
        if sealed or isinstance(error, MemoryError):
            raise ValueError(
                f"{path} is whole but cannot be read here ({first[:160]}): it is of a newer Retoken, or there is too little memory"
            ) from error
        raise DamagedError(f"{path} cannot be read, it is damaged or no checkpoint ({first[:160]})") from error
    if not isinstance(state, dict) or "format" not in state or "model" not in state:
        raise ValueError(f"{path} is not a checkpoint of a run; to start from its weights use --init")
    if state["format"] > FORMAT:
        raise ValueError(f"{path} has format {state['format']}, this version reads up to {FORMAT}; update Retoken")
    if state["format"] > 1 and not sealed:
        raise DamagedError(f"{path} is damaged: its checksum is missing")
    return state


def save_weights(path: Path, weights: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Write weights as safetensors, with facts (JSON values) in the header."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    header = {"retoken": json.dumps({"format": FORMAT, **metadata})}
    written = save(tensors, header)  # save_file makes a temporary file of its own, which a kill would leave for ever
    write_atomically(path, lambda file: _write(file, written))


def _write(file: Path, content: bytes) -> None:
    file.write_bytes(content)


def read_metadata(path: Path) -> dict[str, Any]:
    """Return the facts in the header of weights that `save_weights` wrote; none for a missing or damaged file."""
    try:
        with safe_open(path, "pt") as file:
            metadata = json.loads((file.metadata() or {}).get("retoken", "{}"))
    except (OSError, ValueError, SafetensorError):
        return {}
    return metadata if isinstance(metadata, dict) else {}


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

    def of(self, update: int) -> Path:
        """Return the file of the state after `update` updates."""
        return self.path / f"update-{update:08d}.pt"

    def newest_good(
        self, wanted: Callable[[dict[str, Any]], bool] = lambda state: True
    ) -> tuple[Path | None, dict[str, Any], list[DamagedError]]:
        """Return the newest checkpoint that is whole and wanted, its state, and what is wrong with newer ones.

        Raises ValueError if there are checkpoints and all are damaged.
        """
        damaged: list[DamagedError] = []
        found = self.numbered()
        for path in reversed(found):
            try:
                state = load_state(path)
            except DamagedError as error:
                damaged.append(error)
                continue
            if wanted(state):
                return path, state, damaged
        if found and len(damaged) == len(found):
            raise ValueError(
                f"no checkpoint in {self.path} is whole: {damaged[0]}; move the folder away to start afresh"
            )
        return None, {}, damaged

    def set_aside(self, damaged: list[DamagedError], newer_than: Path) -> list[Path]:
        """Rename the checkpoints newer than a good one, if any was found damaged; return the new names."""
        if not damaged:
            return []
        newer = [path for path in self.numbered() if path.name > newer_than.name]
        return [path.replace(path.with_name(f"{path.name}.damaged")) for path in newer]

    def save(self, update: int, state: Mapping[str, Any], prune: bool = True) -> Path:
        """Write the state after `update` updates, then remove what is older than the last `keep`, unless told not to."""
        self.path.mkdir(parents=True, exist_ok=True)
        remove_temporary(self.path)
        path = self.of(update)
        save_state(path, state)
        if prune:
            self.prune()
        return path

    def prune(self) -> None:
        """Remove what is older than the last `keep`."""
        for old in self.numbered()[: -self.keep]:
            old.unlink(missing_ok=True)

    def remove_after(self, last: Path) -> None:
        """Remove the checkpoints of later updates than a checkpoint's."""
        for path in self.numbered():
            if path.name > last.name:
                path.unlink(missing_ok=True)


class Sealing(io.RawIOBase):
    """A file to write a zip archive to from its first byte to its last; `finish` puts the checksum into its comment.

    The checksum is of what was handed over, not of what is read back: the disk may have made something else of it.
    """

    def __init__(self, file: IO[bytes]):
        self.file, self.digest = file, hashlib.sha256()
        self.last = b""  # two bytes, held back: in the archive's the length of the comment

    def writable(self) -> bool:
        """Return True."""
        return True

    def write(self, data: Any) -> int:
        """Take bytes, all of them."""
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
        """Write the comment. The file stays open."""
        if self.last != _NO_COMMENT:
            raise RuntimeError("torch.save has ended a file in an unknown way")
        self._put(_SEAL_LENGTH.to_bytes(2, "little"))
        self.file.write(_SEAL + self.digest.hexdigest().encode())

    def _put(self, data: bytes | memoryview) -> None:
        self.digest.update(data)
        self.file.write(data)


def read_seal(path: Path) -> bytes:
    """Return the checksum that a checkpoint says it has; nothing for one of format 1, a missing or an unreadable one."""
    try:
        with path.open("rb") as file:
            return _end_of(file)
    except OSError:
        return b""


def _is_sealed(path: Path, verify: bool) -> bool:
    """Return whether a file has a seal; if asked to `verify` it, raise DamagedError if it is not the file's."""
    with path.open("rb") as file:
        seal = _end_of(file)
        if seal and verify and seal != _seal_of(file, file.tell() - _SEAL_LENGTH):
            raise DamagedError(f"{path} is damaged: its checksum is not that of what was written")
    return bool(seal)


def _end_of(file: IO[bytes]) -> bytes:
    """Return the seal at the end of a file, or nothing; the file is left at its end."""
    file.seek(max(file.seek(0, os.SEEK_END) - _SEAL_LENGTH, 0))
    seal = file.read()
    return seal if len(seal) == _SEAL_LENGTH and seal.startswith(_SEAL) else b""


def _seal_of(file: IO[bytes], size: int) -> bytes:
    """Return the seal of the first `size` bytes; the file is left behind them."""
    digest, buffer = hashlib.sha256(), memoryview(bytearray(1 << 22))
    file.seek(0)
    while size > 0:
        count = file.readinto(buffer[: min(size, len(buffer))])  # type: ignore[attr-defined]
        if not count:
            raise EOFError("the file has shrunk while it was read")
        digest.update(buffer[:count])
        size -= count
    return _SEAL + digest.hexdigest().encode()
