"""Rollback of a diverged run: a record of the updates that were not finite, and one return to the last good checkpoint."""

from pathlib import Path
from typing import Any

from data.loaders.sampler import Sampler
from engine.checkpoint.async_saver import AsyncSaver, SavingError
from engine.checkpoint.run_directory import RunDirectory
from engine.distributed.processes import Processes
from engine.logging.log import Log
from engine.loop import Loop
from engine.optim.skipped_updates import DivergedError, is_rollback_target, json_number, tensor_norms
from engine.result_files import write_json
from engine.state import TrainState
from trainer.restore import Contents, continue_saving, find_checkpoint, restore_state


def roll_back(
    error: DivergedError,
    state: TrainState,
    loop: Loop,
    sampler: Sampler,
    processes: Processes,
    *,
    run: RunDirectory,
    log: Log,
    saver: AsyncSaver,
) -> None:
    """Write diverged.json and restore the last good checkpoint; the caller saves the state at once. Called by all processes.

    Raises DivergedError if there is no good checkpoint, or if the run has rolled back before.
    """
    saver.finish()
    path, contents = (None, None) if state.rollbacks else find_good(run, log, processes)
    record = describe_divergence(error, state, loop, sampler, processes)
    if processes.main:
        try:
            write_json(run.diverged, {"error": str(error), "went_back_to": path and path.name, **record})
        except OSError as failure:  # the run matters more than its record
            log.warning(f"{run.diverged} cannot be written ({failure.strerror})")
    if path is None:
        why = "the run went back once before" if state.rollbacks else "there is no good checkpoint to go back to"
        raise DivergedError(
            f"{error}; {why}. {run.diverged} lists the images, losses and norms; start another run from a good checkpoint "
            "with a milder recipe: --tag NEW --resume FILE --opts OPTIM.LR ..."
        ) from error
    contents = restore_state(path, contents, state, processes)
    remove_later(path, run, processes)
    state.rollbacks += 1
    log.warning(f"{error}; going back to {path}, once. {run.diverged} lists the images, losses and norms")
    continue_saving(state, contents, saver, processes, save_again=True)  # the file lacks the count of rollbacks


def find_good(run: RunDirectory, log: Log, processes: Processes) -> tuple[Path | None, Contents | None]:
    """Return the newest checkpoint with sound weights as `find_checkpoint` does, none if all are damaged or unreadable."""
    try:
        return find_checkpoint(run, log, processes, accept=is_rollback_target)
    except ValueError as error:
        log.warning(str(error))
        return None, None


def remove_later(path: Path, run: RunDirectory, processes: Processes) -> None:
    """Remove the checkpoints after `path`. Raises SavingError if one remains: the next start would continue from it."""

    def remove() -> None:
        try:
            run.checkpoints.remove_after(path)
        except OSError as error:
            raise ValueError(f"the checkpoints after {path} cannot be removed ({error.strerror})") from error

    try:
        processes.on_main(remove)
    except ValueError as error:
        raise SavingError(f"{error}; remove them by hand, then the same command goes back to it") from error


def describe_divergence(
    error: DivergedError, state: TrainState, loop: Loop, sampler: Sampler, processes: Processes
) -> dict[str, Any]:
    """Return images and losses of the skipped updates by micro-batch, and norms of the weights. Called by all processes."""
    assert loop.losses is not None
    losses = processes.sum(loop.losses.clone()).tolist()
    updates: list[dict[str, Any]] = []
    for update in range(max(error.last_update - min(error.consecutive, len(losses)), 0), error.last_update):
        epoch, number = divmod(update, state.plan.updates_per_epoch)
        micro_batches = [
            {"loss": json_number(loss), "indices": sampler.micro_batch(epoch, number, j)[1].tolist()}
            for j, loss in enumerate(losses[update % len(losses)])
        ]
        updates.append({"update": update + 1, "epoch": epoch + 1, "micro_batches": micro_batches})
    norms = {which: tensor_norms(model.state_dict()) for which, model in state.weights().items()}
    return {
        "update": error.last_update,
        "skipped_in_a_row": error.consecutive,
        "lr": max(group["lr"] for group in state.optimizer.param_groups),
        "updates": updates,
        "norms": norms,
    }
