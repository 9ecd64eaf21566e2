"""Run directory: its paths, lock and marker files; manifest.py writes its manifest.

output/<name>/
    config.yaml                      the resolved config
    manifest.json                    commit, packages, hardware, data, classes; one entry for each start
    log.txt  metrics.jsonl  tensorboard/  pictures/
    checkpoints/update-<number>.pt   everything needed to continue; the newest CHECKPOINT.KEEP are kept
    best_raw.safetensors  best_ema.safetensors
    diverged.json                    after too many updates that were not finite: images, losses, norms
    preempted                        after a signal, until the next start
    done                             after the last epoch
    .lock                            while a process trains in it
    logs/  requeues                  of the batch scripts: output of each node; number of requeues without a newer checkpoint

The directory itself may be a link to another disk; nothing in it may be one (run_files.py).
"""

import contextlib
import errno
import fcntl
import os
import time
from pathlib import Path

from common.atomic_files import remove_temporary, write_text_atomically
from common.regular_files import regular
from engine.checkpoint.files import CheckpointFolder
from engine.checkpoint.run_files import TREES, check_run_files

LOCK_ATTEMPTS = 10  # one per second
UNSUPPORTED = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)


class RunLockedError(ValueError):
    """Raised if another process trains in the run directory, or one that was killed has not ended yet."""


class RunDirectory:
    """Folder of a run: its paths, lock and marker files."""

    def __init__(self, path: Path, keep: int):
        self.path = path
        self.config, self.manifest = path / "config.yaml", path / "manifest.json"
        self.diverged, self.preempted, self.done = (path / name for name in ("diverged.json", "preempted", "done"))
        self.checkpoints = CheckpointFolder(path / "checkpoints", keep)
        self._lock = path / ".lock"
        self._descriptor: int | None = None  # of the lock file, while it is open

    def best(self, which: str) -> Path:
        """Return the path of the best raw or EMA weights."""
        return self.path / f"best_{which}.safetensors"

    def check_files(self) -> None:
        """Raise ValueError for links and other kinds of files where the run has its own."""
        check_run_files(self.path)

    def stored_bytes(self) -> int:
        """Return the size of the checkpoints and best weights that lie in the folder."""
        files = *self.checkpoints.numbered(), *(self.best(which) for which in ("raw", "ema"))
        return sum(path.stat().st_size for path in files if path.is_file())

    def write_marker(self, marker: Path, text: str) -> None:
        """Write the marker file `preempted` or `done`, which launch scripts check: the time and a text."""
        self._remove_temporary()
        write_text_atomically(marker, f"{time.strftime('%Y-%m-%dT%H:%M:%S%z')} {text}\n")

    def lock(self) -> str:
        """Create the folder and lock it against other starts until `unlock` or the end of this process.

        Returns a warning if the file system does not support locks, else an empty string. Raises RunLockedError if another
        process holds the lock, after some seconds, which a process that was just killed may need to end; ValueError if the
        folder cannot be written.
        """
        for attempt in range(LOCK_ATTEMPTS):
            try:
                self.path.mkdir(parents=True, exist_ok=True)
                # For writing: NFS locks no other files.
                self._descriptor = regular(self._lock, os.O_RDWR | os.O_CREAT)
                fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.path.samestat(self._lock.stat(), os.fstat(self._descriptor)):
                    return ""
            except BlockingIOError:
                if attempt < LOCK_ATTEMPTS - 1:
                    time.sleep(1)
            except FileNotFoundError:
                pass  # try again, as below
            except OSError as error:
                if error.errno not in UNSUPPORTED:
                    self._close()  # so that `unlock` does not remove a lock file that this process does not hold
                    raise self.write_error(error) from error
                return f"{self.path} cannot be locked ({error.strerror}): make sure that no second job trains in it at the same time"
            self._close()  # and try again: another process holds the lock, or has just removed its file
        raise RunLockedError(
            f"another process trains in {self.path}; wait for it, stop it, or start another run with --tag NAME"
        )

    def unlock(self) -> None:
        """Release the lock; remove the folder if nothing was written into it."""
        if self._descriptor is not None:
            with contextlib.suppress(OSError):
                self._lock.unlink()
            self._close()  # before the folder is removed: on NFS an open file would remain in it under another name
            with contextlib.suppress(OSError):
                self.path.rmdir()

    def is_locked(self) -> bool:
        """Return True if a process trains in the folder; always False where the file system does not support locks."""
        try:
            handle = regular(self._lock)
        except (OSError, ValueError):
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
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def write_config(self, config: str) -> None:
        """Write the config; remove the marker and temporary files of earlier starts. Raises ValueError if that fails."""
        try:
            for marker in (self.preempted, self.done):
                marker.unlink(missing_ok=True)
            self._remove_temporary()
            write_text_atomically(self.config, config)
        except OSError as error:
            raise self.write_error(error) from error

    def _remove_temporary(self) -> None:
        for folder in (self.path, *(self.path / name for name in TREES)):
            remove_temporary(folder)

    def write_error(self, error: OSError) -> ValueError:
        """Return the error to raise when files of the run cannot be written."""
        return ValueError(
            f"run directory {self.path} cannot be written ({error.strerror}); choose another with --output"
        )

    def check_writable(self) -> None:
        """Raise ValueError if the folder cannot be created or written, as far as can be checked without writing."""
        ancestors = self.path, *self.path.absolute().parents
        folder = next(path for path in ancestors if os.path.exists(path))  # noqa: PTH110  Path raises without permission
        if not folder.is_dir():
            raise self.write_error(OSError(errno.ENOTDIR, f"{folder} is a file"))
        if not os.access(folder, os.W_OK | os.X_OK):
            raise self.write_error(OSError(errno.EACCES, f"no permission to write in {folder}"))
