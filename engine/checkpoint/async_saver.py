"""Saving a run while it trains: a snapshot in host memory, then a thread that writes it.

The order of a save is: the checkpoint, which names the best results and at their own update holds their weights; then the
files of new best weights. A run killed in between finds in the checkpoint what the files lack (`mend_best`).
"""

import shutil
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.atomic_files import remove_temporary
from common.byte_size import format_bytes
from engine.checkpoint.files import load_state, read_metadata, read_seal, save_weights
from engine.checkpoint.run_directory import RunDirectory
from engine.distributed.processes import Processes
from engine.logging.log import Log
from engine.state import TrainState

APPEARS_S = 60.0  # until a node of a shared file system sees what another one has written
PARTS = {"raw": "model", "ema": "ema"}  # where a stored state keeps the weights


class SavingError(RuntimeError):
    """Checkpoints cannot be written; training on would lose more and more."""


@dataclass
class SaveJob:
    """A snapshot to write."""

    update: int
    state: dict[str, Any]
    best: dict[str, dict[str, Any]]  # facts of the weights in it that are new best ones, by raw and ema
    prune: bool
    waited: float  # seconds that training stood still for it
    evaluated: bool  # whether the evaluation that is due after it is in it, or none is
    seconds: float = 0.0  # that the writing took
    error: Exception | None = None


@dataclass
class AsyncSaver:
    """Writes a run's checkpoints and best weights in the background, one at a time, on the main process.

    A failure is said and leaves what was written before; training goes on until `max_failures` in a row.
    """

    run: RunDirectory
    log: Log
    max_failures: int
    failures: int = 0  # in a row
    stored: tuple[int, int] | None = None  # updates done and closed of the state last stored, or being so
    _failed: int | None = None  # update whose write failed last
    _good: int | None = None  # update of the last checkpoint that was written
    _job: SaveJob | None = None  # being written, or failed and kept to be tried again at the end
    _error: Exception | None = None  # of the last write that failed
    _thread: threading.Thread | None = None
    _owed: dict[str, tuple[dict[str, Tensor], dict[str, Any]]] = field(
        default_factory=dict
    )  # best weights not written yet

    @property
    def failed(self) -> bool:
        """Whether it is time to give up."""
        return self.failures >= self.max_failures

    def save(
        self,
        state: TrainState,
        processes: Processes,
        metadata: Mapping[str, Any],
        best: Mapping[str, Mapping[str, Any]],
    ) -> None:
        """Take a snapshot and write it while training goes on; called by all processes. Does nothing if it is stored already.

        `best` names the weights that beat all before them, with what to say of them. Waits for the write before. While
        updates are skipped older checkpoints stay: the run may have to go back to one.
        """
        if self.stored == (state.update, state.closed):
            return
        self.stored = (state.update, state.closed)
        started = time.perf_counter()
        self.wait()
        if self._job is not None and self._job.error is not None:
            self._error, self._job = (
                self._job.error,
                None,
            )  # before the next snapshot is taken: memory for one is enough
        stored = state.state_dict(processes)
        if not processes.main:
            return
        stored = snapshot(stored)
        new = {which: {**metadata, **more, "weights": which} for which, more in best.items()}
        epoch = state.update / state.plan.updates_per_epoch
        stored["facts"] = {**metadata, "epoch": epoch}
        self._job = SaveJob(
            state.update,
            stored,
            new,
            not int(stored["skips"][0]),
            time.perf_counter() - started,
            not state.between_epochs,
        )
        self._thread = threading.Thread(target=self._write, args=(self._job,), name="saver")
        self._thread.start()

    def poll(self) -> None:
        """Say how the write went if it has ended."""
        if self._thread is not None and not self._thread.is_alive():
            self.wait()

    def wait(self) -> None:
        """Wait for the write, if one is under way, and say how it went."""
        if self._thread is None or self._job is None:
            return
        self._thread.join()
        job, self._thread = self._job, None
        if job.error is None:
            self._job, self.failures, self._failed = None, 0, None
            before = "" if job.evaluated else " before its evaluation"
            self.log.info(
                f"saved update {job.update}{before} in {job.seconds:.1f} s, training waited {job.waited:.2f} s"
            )
            return
        if job.update != self._failed:  # an epoch is saved before and after its evaluation: that counts once
            self.failures, self._failed = self.failures + 1, job.update
        before = "nothing is saved so far" if self._good is None else f"update {self._good} is the last one saved"
        self.log.warning(
            f"update {job.update} was not saved ({_reason(job.error)}; {self._free()}), {self.failures} of "
            f"CHECKPOINT.MAX_FAILURES={self.max_failures} in a row; {before}"
        )

    def finish(self) -> bool:
        """Wait until the last snapshot is written, trying a failed one once more; return whether it is."""
        self.wait()
        if self._job is not None:
            self._thread = threading.Thread(target=self._write, args=(self._job,), name="saver")
            self._thread.start()
            self.wait()
        return self._job is None

    def give_up(self) -> None:
        """Count saving as failed from here on, so that all processes vote to fail."""
        self.failures = self.max_failures

    def continue_from(self, state: TrainState) -> None:
        """Take note that a state was read from this run's own checkpoint."""
        self.stored, self._good = (state.update, state.closed), state.update

    def complaint(self) -> SavingError:
        """Return the error of a run that cannot be saved."""
        error = (self._job.error if self._job else None) or self._error
        reason = _reason(error) if error else "as process 0 says"
        return SavingError(
            f"checkpoints cannot be written to {self.run.path} ({reason}); make room or mend the permissions, then the same "
            "command continues from the last one"
        )

    def mend_best(self, state: TrainState, stored: Mapping[str, Any]) -> None:
        """Bring the files of the best weights to what the state says of them, from the checkpoints that hold them."""
        for which, entry in state.best.items():
            path = self.run.best(which)
            found = read_metadata(path).get("update")
            if found == entry["update"]:
                continue
            source = self.run.checkpoints.of(entry["update"])
            try:
                holder = stored if entry["update"] == state.update else load_state(source)
            except ValueError:
                what = "is missing" if found is None else f"is of update {found}"
                self.log.warning(
                    f"{path} {what}, but the best {which} weights so far were those of update {entry['update']}"
                )
                continue
            metadata = {**holder["facts"], **entry, "weights": which}
            try:
                save_weights(path, holder[PARTS[which]], metadata)
            except OSError as error:
                self._owed[which] = holder[PARTS[which]], metadata
                self.log.warning(
                    f"{path} cannot be written ({error.strerror}); it is tried again after the next checkpoint"
                )
                continue
            self.log.info(f"wrote {path} again, from the checkpoint of update {entry['update']}")

    def _free(self) -> str:
        try:
            return f"{format_bytes(shutil.disk_usage(self.run.path).free)} are free there"
        except OSError as error:
            return f"{self.run.path}: {error.strerror}"

    def _write(self, job: SaveJob) -> None:
        started = time.perf_counter()
        job.error = None
        try:
            self._owed |= {which: (job.state[PARTS[which]], metadata) for which, metadata in job.best.items()}
            self.run.checkpoints.save(job.update, job.state, prune=False)
            self._good = job.update
            remove_temporary(self.run.path)
            for which, (weights, metadata) in tuple(self._owed.items()):
                save_weights(self.run.best(which), weights, metadata)
                del self._owed[which]
            if job.prune:  # now that no older checkpoint is the only file with weights that are owed
                self.run.checkpoints.prune()
        except Exception as error:  # whatever it is, training need not end with it
            job.error = error
        job.seconds = time.perf_counter() - started


def load_on_all(path: Path, processes: Processes, stored: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return what a checkpoint holds, on all processes; `stored` is that where the main process has read it already.

    Only the main process compares the checksum with the content, so that a thousand processes do not read the file twice; the
    others wait until theirs has the same one. Raises ValueError on all if it cannot be read, DamagedError if it is not what was
    written; ValueError where it stays missing or another one.
    """
    found = [stored] if stored else []

    def read() -> bytes:
        if not found:
            found.append(load_state(path))
        return read_seal(path)

    seal = processes.on_main(read)
    if processes.main:
        return found[0]
    deadline = time.monotonic() + APPEARS_S
    while not (same := path.exists() and read_seal(path) == seal) and time.monotonic() < deadline:
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
    """Return a copy of nested dicts and lists with every tensor in host memory; waits for the device once."""
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
    # Page-locked, so that the copies run at the bus's speed; torch keeps the memory for the next snapshot.
    return torch.empty_like(tree, device="cpu", pin_memory=True).copy_(tree.detach(), non_blocking=True)


def _reason(error: Exception) -> str:
    first = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {first[:200]}"
