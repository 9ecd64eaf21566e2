"""Asynchronous saving: a snapshot in host memory, which a background thread writes while training continues.

Order of a save: first the checkpoint, which records the best results and, at the update of a new best, holds its weights; then
the files of new best weights. After a kill in between, `restore_best_files` writes the missing files from the checkpoint.
Each file is tried whether or not the others could be written: best weights may fit on a disk that is too full for a checkpoint.
"""

import contextlib
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.checkpoint.disk_space import WriteFailure, describe_failure
from engine.checkpoint.files import (
    DamagedError,
    Reader,
    load_state,
    read_checksum,
    read_metadata,
    read_trusted,
    save_weights,
)
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
    prune: bool
    waited: float  # seconds that training was blocked
    evaluated: bool  # False if the evaluation due after this update is still to come
    seconds: float = 0.0  # duration of the write
    saved: bool = False  # the checkpoint is written
    failures: list[WriteFailure] = field(default_factory=list)  # of the checkpoint first, then of best weights
    written_best: list[str] = field(default_factory=list)  # files of best weights written


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
        self._job: SaveJob | None = None  # being written, or failed and kept for another try in `finish`
        self._failures: list[WriteFailure] = []  # of the last save that failed
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
        """Take a snapshot and write it in the background; called by all processes.

        Does nothing if the state is stored already and no weights are a new best. `best` maps the kinds of weights that are new
        best ones (raw, ema) to their metadata. Waits for the previous write. While updates are skipped no checkpoint is pruned:
        the run may have to go back to an older one.
        """
        if self.stored == (state.update, state.closed) and not best:
            return
        self.stored = (state.update, state.closed)
        started = time.perf_counter()
        self.wait()
        self._job = None  # a failed one is dropped before the next snapshot is taken, so that memory for one is enough
        stored = state.state_dict(processes)
        if not processes.main:
            return
        stored = snapshot(stored)
        stored["facts"] = {**metadata, "epoch": state.update / state.plan.updates_per_epoch}
        for which, more in best.items():
            self._pending_best[which] = stored[PARTS[which]], {**metadata, **more, "weights": which}
        self._job = SaveJob(
            update=state.update,
            state=stored,
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
        if not job.failures:
            self._job, self.failures, self._last_failed = None, 0, None
            before = "" if job.evaluated else " before its evaluation"
            self.log.info(
                f"saved update {job.update}{before} in {job.seconds:.1f} s, training waited {job.waited:.2f} s"
            )
            return
        self._failures = job.failures
        if job.update != self._last_failed:  # both saves of an epoch, before and after its evaluation, count once
            self.failures, self._last_failed = self.failures + 1, job.update
        self.log.warning(self._describe(job))

    def _describe(self, job: SaveJob) -> str:
        """Return the warning about a save that failed, wholly or in part."""
        count = f"{self.failures} of CHECKPOINT.MAX_FAILURES={self.max_failures} in a row"
        if job.saved:
            failed = ", ".join(f"{failure.file} ({failure})" for failure in job.failures)
            return f"update {job.update} was saved, but this failed: {failed}, {count}; it is tried again after the next checkpoint"
        checkpoint, *others = job.failures
        last = self.run.checkpoints.latest_update()
        before = "nothing is saved so far" if last is None else f"update {last} is the last one saved"
        best = "".join(f"; {name} was written" for name in job.written_best)
        best += "".join(f"; {failure.file} could not be written either ({failure})" for failure in others)
        return f"update {job.update} was not saved ({checkpoint}), {count}; {before}{best}"

    def finish(self) -> bool:
        """Wait until the last snapshot is written, retrying a failed one once; return True if it is written."""
        self.wait()
        if self._job is not None:
            self._start(self._job)
            self.wait()
        return self._job is None

    def continue_from(self, state: TrainState, save_again: bool = False) -> None:
        """Record that a state was loaded from this run's own checkpoint; it is saved once more only with `save_again`."""
        self.stored = None if save_again else (state.update, state.closed)

    def saving_error(self) -> SavingError:
        """Return the error to raise when the run cannot be saved."""
        if not self._failures:  # on the other processes
            return SavingError(
                f"checkpoints cannot be written to {self.run.path} (see the log of process 0); free some space or correct the "
                "permissions"
            )
        failed = "; ".join(f"{failure.file}: {failure}" for failure in self._failures)
        last = self.run.checkpoints.latest_update()
        if last is None:
            restart = "starts the run again, of which no checkpoint is saved"
        else:
            restart = f"continues from update {last}"
        return SavingError(
            f"checkpoints cannot be written to {self.run.path} ({failed}); free some space or correct the permissions, then the "
            f"same command {restart}{self._describe_best(last)}"
        )

    def _describe_best(self, last: int | None) -> str:
        """Return the best weights that lie in the run directory as text; `last` is the update of its newest checkpoint."""
        updates = {self.run.best(which).name: read_metadata(self.run.best(which)).get("update") for which in PARTS}
        newer = {name: update for name, update in updates.items() if update is not None and update > (last or 0)}
        if not newer:
            return ""
        found = " and ".join(f"{name} (of update {update})" for name, update in newer.items())
        return f". The best weights are there: {found}; copy them first, the next start may replace them"

    def restore_best_files(self, state: TrainState, stored: Mapping[str, Any], read: Reader = read_trusted) -> None:
        """Write the files of best weights that are missing or outdated, from the checkpoints that hold these weights.

        `stored` is the checkpoint that `state` was loaded from; `read` reads the others, as in `load_state`.
        """
        for which, entry in state.best.items():
            path = self.run.best(which)
            found = read_metadata(path).get("update")
            if found == entry["update"]:
                continue
            checkpoint = self.run.checkpoints.path_of(entry["update"])
            try:
                holder = stored if entry["update"] == state.update else load_state(checkpoint, read=read)
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
                failure = describe_failure(path.name, error, holder[PARTS[which]], self.run.path)
                self.log.warning(f"{path} cannot be written ({failure}); it is tried again after the next checkpoint")
                continue
            self.log.info(f"wrote {path} again, from the checkpoint of update {entry['update']}")
        if state.complete and not self._pending_best:  # after a kill between the last save and the end of the run
            with contextlib.suppress(OSError):
                self.run.checkpoints.prune()

    def _start(self, job: SaveJob) -> None:
        self._thread = threading.Thread(target=self._write, args=(job,), name="saver")
        self._thread.start()

    def _write(self, job: SaveJob) -> None:
        started = time.perf_counter()
        job.failures, job.written_best = [], []
        if not job.saved:
            checkpoints = self.run.checkpoints
            job.saved = self._try(
                job, "checkpoint", job.state, lambda: checkpoints.save(job.update, job.state, prune=False)
            )
        for which, (weights, metadata) in tuple(self._pending_best.items()):
            path = self.run.best(which)
            if self._try(job, path.name, weights, partial(save_weights, path, weights, metadata)):
                job.written_best.append(path.name)
                del self._pending_best[which]
        if job.prune and not job.failures:  # an older checkpoint may be the only file with the best weights
            self._try(job, "removal of old checkpoints", {}, self.run.checkpoints.prune)
        job.seconds = time.perf_counter() - started

    def _try(self, job: SaveJob, file: str, tensors: Mapping[str, Any], write: Callable[[], Any]) -> bool:
        """Call `write`; return True, or note its failure in the job and return False."""
        try:
            write()
        except Exception as error:  # of any kind: a failed write must not end training
            job.failures.append(describe_failure(file, error, tensors, self.run.path))
            return False
        return True


def load_on_all(
    path: Path, processes: Processes, stored: dict[str, Any] | None = None, read: Reader = read_trusted
) -> dict[str, Any]:
    """Load a checkpoint on all processes; return its content. `stored` is the content if the main process has read it already;
    `read` reads the file, as in `load_state`.

    Only the main process verifies the checksum against the content, so that a thousand processes do not read the file twice;
    the others wait until their file shows the same checksum. Raises ValueError on all processes if the main one cannot read
    it, DamagedError if it differs from what was written; ValueError on a process whose file stays missing or different.
    """
    loaded = [stored] if stored else []

    def load() -> str:
        if not loaded:
            loaded.append(load_state(path, read=read))
        return read_checksum(path).hex()

    checksum = processes.on_main(load, (DamagedError,))
    if processes.main:
        return loaded[0]
    deadline = time.monotonic() + VISIBLE_S
    while not (same := path.exists() and read_checksum(path).hex() == checksum) and time.monotonic() < deadline:
        time.sleep(0.2)
    try:
        state = load_state(path, verify=False, read=read)
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
