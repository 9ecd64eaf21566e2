"""The run directory: what it holds, whether a config may continue it, and the manifest of how it was made.

output/<name>/
    config.yaml                      the resolved config
    manifest.json                    commit, packages, hardware, data, classes; one entry a start
    log.txt  metrics.jsonl  tensorboard/  pictures/
    checkpoints/update-<number>.pt   everything needed to continue; the newest are kept
    best_raw.safetensors  best_ema.safetensors
    diverged.json                    if updates were not finite too often: images, losses, norms
    preempted                        while it waits for its next start after a signal
    done                             once it is complete
    .lock                            while a process trains in it
    logs/  requeues                  of the batch scripts: what the nodes say; times a job came back without progress
"""

import contextlib
import errno
import fcntl
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from common.atomic_files import remove_temporary, write_atomically
from engine.checkpoint.files import CheckpointFolder

PACKAGES = ("torch", "torchvision", "timm", "numpy", "pillow", "yacs", "safetensors", "nvidia-dali-cuda130")
LOCK_ATTEMPTS = 10  # one a second
NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)


class OccupiedError(ValueError):
    """Another process trains in the run directory, or one that was killed is not gone yet."""


class RunDirectory:
    """A run's folder and the paths in it."""

    def __init__(self, path: Path, keep: int):
        self.path = path
        self.config, self.manifest = path / "config.yaml", path / "manifest.json"
        self.diverged, self.preempted, self.done = (path / name for name in ("diverged.json", "preempted", "done"))
        self.checkpoints = CheckpointFolder(path / "checkpoints", keep)
        self._lock = path / ".lock"
        self._locked: int | None = None  # its file descriptor

    def best(self, which: str) -> Path:
        """Return the file of the best raw or EMA weights."""
        return self.path / f"best_{which}.safetensors"

    def mark(self, mark: Path, text: str) -> None:
        """Leave the file `preempted` or `done` for whoever started the run."""
        write_atomically(mark, lambda file: _write(file, f"{time.strftime('%Y-%m-%dT%H:%M:%S%z')} {text}\n"))

    def lock(self) -> str:
        """Make the folder, and keep other starts out of it until `unlock` or the end of this process.

        Return what to warn of: nothing, or that the file system knows no locks. Raises OccupiedError if another process is in
        it; one that was just killed may take some seconds to go. ValueError if the folder cannot be written.
        """
        for attempt in range(LOCK_ATTEMPTS):
            try:
                self.path.mkdir(parents=True, exist_ok=True)
                self._locked = os.open(self._lock, os.O_RDWR | os.O_CREAT, 0o666)  # NFS locks only what may be written
                fcntl.flock(self._locked, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.path.samestat(self._lock.stat(), os.fstat(self._locked)):
                    return ""
            except BlockingIOError:
                if attempt < LOCK_ATTEMPTS - 1:
                    time.sleep(1)
            except FileNotFoundError:
                pass  # as below
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    self._close()  # it is not ours to remove
                    raise self.cannot_write(error) from error
                return f"{self.path} cannot be locked ({error.strerror}): see to it that no second job trains in it at the same time"
            self._close()  # and try again: another one has it, or has just removed it
        raise OccupiedError(
            f"another process trains in {self.path}; wait for it, stop it, or start another run with --tag NAME"
        )

    def unlock(self) -> None:
        """Let other starts in; take the folder away if nothing was written into it."""
        if self._locked is not None:
            with contextlib.suppress(OSError):
                self._lock.unlink()
            self._close()  # before the folder goes: on NFS an open file keeps a name in it
            with contextlib.suppress(OSError):
                self.path.rmdir()

    def occupied(self) -> bool:
        """Say whether a process trains in the folder; no, where the file system knows no locks."""
        try:
            handle = os.open(self._lock, os.O_RDONLY)
        except OSError:
            return False
        try:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:
            return False
        finally:
            os.close(handle)
        return False

    def _close(self) -> None:
        if self._locked is not None:
            os.close(self._locked)
            self._locked = None

    def create(self, config: str) -> None:
        """Write the config, take off the marks of the start before. Raises ValueError if the folder cannot be written."""
        try:
            for mark in (self.preempted, self.done):
                mark.unlink(missing_ok=True)
            remove_temporary(self.path)
            write_atomically(self.config, lambda file: _write(file, config))
        except OSError as error:
            raise self.cannot_write(error) from error

    def cannot_write(self, error: OSError) -> ValueError:
        """Return the error of a run whose files cannot be made."""
        return ValueError(
            f"run directory {self.path} cannot be written ({error.strerror}); choose another with --output"
        )

    def check_place(self) -> None:
        """Raise ValueError if the folder cannot be made or written, as far as that can be told without writing."""
        places = self.path, *self.path.absolute().parents
        place = next(path for path in places if os.path.exists(path))  # noqa: PTH110  Path raises where it may not look
        if not place.is_dir():
            raise self.cannot_write(OSError(errno.ENOTDIR, f"{place} is a file"))
        if not os.access(place, os.W_OK | os.X_OK):
            raise self.cannot_write(OSError(errno.EACCES, f"no permission to write in {place}"))

    def read_manifest(self) -> dict[str, Any]:
        """Return the manifest, nothing if there is none yet. Raises ValueError if it is damaged."""
        if not self.manifest.is_file():
            return {}
        try:
            found = json.loads(self.manifest.read_text())
            if not isinstance(found, dict) or not isinstance(found.get("starts", []), list):
                raise ValueError("it holds something else")
        except ValueError as error:
            raise ValueError(
                f"{self.manifest} is damaged ({error}); mend it, or move it away: the run continues without it, and only the "
                "record of its earlier starts is lost"
            ) from error
        return found

    def record_start(self, metadata: Mapping[str, Any], start: Mapping[str, Any]) -> None:
        """Write the manifest: facts of the run, and one more entry to the list of its starts."""
        starts = self.read_manifest().get("starts", [])
        text = json.dumps({**metadata, "starts": [*starts, dict(start)]}, indent=2) + "\n"
        write_atomically(self.manifest, lambda file: _write(file, text))


def this_start(world: int, update: int, device: torch.device) -> dict[str, Any]:
    """Return the facts of one start of a run: time, command, commit, packages, machine."""
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "update": update,
        "processes": world,
        **_commit(),
        "python": platform.python_version(),
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
        "system": platform.platform(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "cuda": torch.version.cuda if device.type == "cuda" else None,
    }


def differences(old: Mapping[str, Any], new: Mapping[str, Any], free: Sequence[str], prefix: str = "") -> list[str]:
    """List the keys of two config trees that differ, as "KEY: old -> new"; keys or sections named in `free` may."""
    found: list[str] = []
    for key in {**old, **new}:
        name = prefix + key
        a, b = old.get(key), new.get(key)
        if name in free or a == b:
            continue
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found += differences(a, b, free, f"{name}.")
        else:
            found.append(f"{name}: {a!r} -> {b!r}")
    return found


def _write(file: Path, text: str) -> None:
    file.write_text(text)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> dict[str, Any]:
    here = Path(__file__).resolve().parents[2]
    try:
        head = subprocess.run(["git", "-C", str(here), "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
        dirty = subprocess.run(
            ["git", "-C", str(here), "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return {"commit": None}
    return {"commit": head.stdout.strip(), "changed_files": len(dirty.stdout.splitlines())}
