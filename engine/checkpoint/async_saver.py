"""Asynchronous saving: a snapshot in host memory, which a background thread writes while training continues.

Order of a save: first the checkpoint, which records the best results and, at the update of a new best, holds its weights; then
the files of new best weights. After a kill in between, `restore_best_files` writes the missing files from the checkpoint.
"""

import shutil
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.atomic_files import remove_temporary
from common.byte_size import format_bytes
from engine.checkpoint.files import load_state, read_checksum, read_metadata, save_weights
from engine.checkpoint.run_directory import RunDirectory
from engine.distributed.processes import Processes
from engine.logging.log import Log
from engine.optim.skipped_updates import SkipCounts
from engine.state import TrainState

VISIBLE_S = 60.0  # until a new file on a shared file system is visible to the other nodes
PARTS = {"raw": "model", "ema": "ema"}  # keys of the weights in a stored state


class SavingError(RuntimeError):
    """Raised when checkpoints cannot be written; further training could be lost."""


@dataclass
class SaveJob:
    """Snapshot to write, and the result of writing it."""

    update: int
    state: dict[str, Any]
    best: dict[str, dict[str, Any]]  # metadata of those weights in the state that are new best ones, by raw and ema
    prune: bool
    waited: float  # seconds that training was blocked
    evaluated: bool  # False if the evaluation due after this update is still to come
    seconds: float = 0.0  # duration of the write
    error: Exception | None = None


class AsyncSaver:
    """Background writer of a run's checkpoints and best weights, one at a time, on the main process.

    A failed write is logged and leaves the files of earlier saves intact; training continues until `max_failures` consecutive
    updates could not be saved.
    """

    def __init__(self, run: RunDirectory, log: Log, max_failures: int):
        self.run, self.log, self.max_failures = run, log, max_failures
        self.failures = 0  # consecutive
        self.stored: tuple[int, int] | None = (
            None  # (update, closed) of the last state that was saved or is being saved
        )
        self._last_failed: int | None = None  # update of the last write that failed
        self._last_saved: int | None = None  # update of the last checkpoint written
        self._job: SaveJob | None = None  # being written, or failed and kept for another try in `finish`
        self._error: Exception | None = None  # of the last failed write
        self._thread: threading.Thread | None = None
        self._pending_best: dict[str, tuple[dict[str, Tensor], dict[str, Any]]] = {}  # best weights not written yet

    @property
    def failed(self) -> bool:
        """Return True after `max_failures` consecutive failures, or after `give_up`."""
        return self.failures >= self.max_failures

    def give_up(self) -> None:
        """Count as failed from now on, so that all processes vote to fail."""
        self.failures = self.max_failures

    def save(
        self,
        state: TrainState,
        processes: Processes,
        metadata: Mapping[str, Any],
        best: Mapping[str, Mapping[str, Any]],
    ) -> None:
        """Take a snapshot and write it in the background; called by all processes. Does nothing if it is stored already.

        `best` maps the kinds of weights that are new best ones (raw, ema) to their metadata. Waits for the previous write. While
        updates are skipped no checkpoint is pruned: the run may have to go back to an older one.
        """
        if self.stored == (state.update, state.closed):
            return
        self.stored = (state.update, state.closed)
        started = time.perf_counter()
        self.wait()
        if self._job is not None and self._job.error is not None:
            # Dropped before the next snapshot is taken, so that memory for one is enough.
            self._error, self._job = self._job.error, None
        stored = state.state_dict(processes)
        if not processes.main:
            return
        stored = snapshot(stored)
        stored["facts"] = {**metadata, "epoch": state.update / state.plan.updates_per_epoch}
        self._job = SaveJob(
            update=state.update,
            state=stored,
            best={which: {**metadata, **more, "weights": which} for which, more in best.items()},
            prune=not int(SkipCounts(stored["skips"]).consecutive),
            waited=time.perf_counter() - started,
            evaluated=not state.between_epochs,
        )
        self._start(self._job)

    def poll(self) -> None:
        """Log the result of the write if it has ended."""
        if self._thread is not None and not self._thread.is_alive():
            self.wait()

    def wait(self) -> None:
        """Wait for the write under way, if there is one, and log its result."""
        if self._thread is None or self._job is None:
            return
        self._thread.join()
        job, self._thread = self._job, None
        if job.error is None:
            self._job, self.failures, self._last_failed = None, 0, None
            before = "" if job.evaluated else " before its evaluation"
            self.log.info(
                f"saved update {job.update}{before} in {job.seconds:.1f} s, training waited {job.waited:.2f} s"
            )
            return
        if job.update != self._last_failed:  # both saves of an epoch, before and after its evaluation, count once
            self.failures, self._last_failed = self.failures + 1, job.update
        last = self._last_saved
        before = "nothing is saved so far" if last is None else f"update {last} is the last one saved"
        self.log.warning(
            f"update {job.update} was not saved ({_reason(job.error)}; {self._free_space()}), {self.failures} of "
            f"CHECKPOINT.MAX_FAILURES={self.max_failures} in a row; {before}"
        )

    def finish(self) -> bool:
        """Wait until the last snapshot is written, retrying a failed one once; return True if it is written."""
        self.wait()
        if self._job is not None:
            self._start(self._job)
            self.wait()
        return self._job is None

    def continue_from(self, state: TrainState, save_again: bool = False) -> None:
        """Record that a state was loaded from this run's own checkpoint; it is saved once more only with `save_again`."""
        self.stored, self._last_saved = (None if save_again else (state.update, state.closed)), state.update

    def saving_error(self) -> SavingError:
        """Return the error to raise when the run cannot be saved."""
        error = (self._job.error if self._job else None) or self._error
        reason = _reason(error) if error else "see the log of process 0"
        return SavingError(
            f"checkpoints cannot be written to {self.run.path} ({reason}); free some space or correct the permissions, then the "
            "same command continues from the last one"
        )

    def restore_best_files(self, state: TrainState, stored: Mapping[str, Any]) -> None:
        """Write the files of best weights that are missing or outdated, from the checkpoints that hold these weights.

        `stored` is the checkpoint that `state` was loaded from.
        """
        for which, entry in state.best.items():
            path = self.run.best(which)
            found = read_metadata(path).get("update")
            if found == entry["update"]:
                continue
            checkpoint = self.run.checkpoints.path_of(entry["update"])
            try:
                holder = stored if entry["update"] == state.update else load_state(checkpoint)
            except ValueError:
                problem = "is missing" if found is None else f"is of update {found}"
                self.log.warning(
                    f"{path} {problem}, but the best {which} weights so far were those of update {entry['update']}"
                )
                continue
            metadata = {**holder["facts"], **entry, "weights": which}
            try:
                save_weights(path, holder[PARTS[which]], metadata)
            except OSError as error:
                self._pending_best[which] = holder[PARTS[which]], metadata
                self.log.warning(
                    f"{path} cannot be written ({error.strerror}); it is tried again after the next checkpoint"
                )
                continue
            self.log.info(f"wrote {path} again, from the checkpoint of update {entry['update']}")

    def _free_space(self) -> str:
        try:
            return f"{format_bytes(shutil.disk_usage(self.run.path).free)} are free there"
        except OSError as error:
            return f"{self.run.path}: {error.strerror}"

    def _start(self, job: SaveJob) -> None:
        self._thread = threading.Thread(target=self._write, args=(job,), name="saver")
        self._thread.start()

    def _write(self, job: SaveJob) -> None:
        started = time.perf_counter()
        job.error = None
        try:
            self._pending_best |= {which: (job.state[PARTS[which]], metadata) for which, metadata in job.best.items()}
            self.run.checkpoints.save(job.update, job.state, prune=False)
            self._last_saved = job.update
            remove_temporary(self.run.path)
            for which, (weights, metadata) in tuple(self._pending_best.items()):
                save_weights(self.run.best(which), weights, metadata)
                del self._pending_best[which]
            if job.prune:  # after the best files: an older checkpoint may have been the only file with those weights
                self.run.checkpoints.prune()
        except Exception as error:  # of any kind: a failed write must not end training
            job.error = error
        job.seconds = time.perf_counter() - started


def load_on_all(path: Path, processes: Processes, stored: dict[str, Any] | None = None) -> dict[str, Any]:
    """Load a checkpoint on all processes; return its content. `stored` is the content if the main process has read it already.

    Only the main process verifies the checksum against the content, so that a thousand processes do not read the file twice;
    the others wait until their file shows the same checksum. Raises ValueError on all processes if the main one cannot read
    it, DamagedError if it differs from what was written; ValueError on a process whose file stays missing or different.
    """
    loaded = [stored] if stored else []

    def read() -> bytes:
        if not loaded:
            loaded.append(load_state(path))
        return read_checksum(path)

    checksum = processes.on_main(read)
    if processes.main:
        return loaded[0]
    deadline = time.monotonic() + VISIBLE_S
    while not (same := path.exists() and read_checksum(path) == checksum) and time.monotonic() < deadline:
        time.sleep(0.2)
    try:
        state = load_state(path, verify=False)
        if not same:
            raise ValueError(f"{path} has another checksum here")
        return state
    except ValueError as error:
        raise ValueError(
            f"{error}; process 0 has read it: its folder must lie on a file system that all nodes share"
        ) from error


def snapshot(tree: Any) -> Any:
    """Copy nested dicts and lists with every tensor in host memory; synchronises each device once."""
    devices: set[torch.device] = set()
    copied = _copy(tree, devices)
    for device in devices:
        torch.cuda.synchronize(device)
    return copied


def _copy(tree: Any, devices: set[torch.device]) -> Any:
    if isinstance(tree, Mapping):
        return {key: _copy(value, devices) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(_copy(value, devices) for value in tree)
    if not isinstance(tree, Tensor):
        return tree
    if not tree.is_cuda:
        return tree.detach().clone()
    devices.add(tree.device)
    # Page-locked memory, so that the copies run at the speed of the bus; torch reuses it for the next snapshot.
    return torch.empty_like(tree, device="cpu", pin_memory=True).copy_(tree.detach(), non_blocking=True)


def _reason(error: Exception) -> str:
    first_line = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {first_line[:200]}"
