"""A run whose updates are not finite any more: what is known of it, and the way back to the last good checkpoint, once."""

import contextlib
from pathlib import Path
from typing import Any

from data.loaders.sampler import Sampler
from engine.checkpoint.async_saver import AsyncSaver, SavingError, load_on_all
from engine.checkpoint.run_directory import RunDirectory
from engine.distributed.processes import Processes
from engine.loop import Loop
from engine.optim.skipped_updates import DivergedError, is_rollback_target, json_number, tensor_norms
from engine.result_files import write_json
from engine.state import TrainState


def roll_back(
    error: DivergedError, state: TrainState, loop: Loop, sampler: Sampler, saver: AsyncSaver, processes: Processes
) -> None:
    """Note what diverged; bring the state to the last good checkpoint, to be saved at once. Called by all processes.

    Raises DivergedError if there is none, or if the run has gone back before.
    """
    run = saver.run
    saver.finish()
    path, stored = (None, None) if state.rollbacks else find_good(saver, processes)
    record = describe_divergence(error, state, loop, sampler, processes)
    if processes.main:
        try:
            write_json(run.diverged, {"error": str(error), "went_back_to": path and path.name, **record})
        except OSError as failure:  # what it would tell is less than the run
            saver.log.warning(f"{run.diverged} cannot be written ({failure.strerror})")
    if path is None:
        why = "the run went back once before" if state.rollbacks else "there is no good checkpoint to go back to"
        raise DivergedError(
            f"{error}; {why}. {run.diverged} lists the images, losses and norms; start another run from a good checkpoint "
            "with a milder recipe: --tag NEW --resume FILE --opts OPTIM.LR ..."
        ) from error
    stored = load_on_all(path, processes, stored)
    remove_later(path, run, processes)
    state.load_state_dict(stored, str(path))
    state.rollbacks += 1
    saver.continue_from(state)
    saver.stored = None  # the file does not say yet that the run has gone back
    saver.log.warning(f"{error}; going back to {path}, once. {run.diverged} lists the images, losses and norms")
    if processes.main:
        saver.restore_best_files(state, stored)


def find_good(saver: AsyncSaver, processes: Processes) -> tuple[Path | None, dict[str, Any] | None]:
    """Return the newest checkpoint of the run to which going back is of use, the same on all processes, and on the main one
    what it holds.
    """
    found: Path | None = None
    stored = None
    if processes.main:
        with contextlib.suppress(ValueError, OSError):
            found, stored, _ = saver.run.checkpoints.newest_good(is_rollback_target)
    agreed = processes.from_main(found)
    return (Path(str(agreed)) if agreed else None), stored


def remove_later(path: Path, run: RunDirectory, processes: Processes) -> None:
    """Remove the checkpoints after one that the run goes back to. Raises SavingError: a start would take one of them."""

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
    """Return what tells why the last updates were skipped: images and losses by micro-batch, norms. By all processes."""
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
    weights = {which: tensor_norms(model.state_dict()) for which, model in state.weights().items()}
    rate = max(group["lr"] for group in state.optimizer.param_groups)
    return {
        "update": error.last_update,
        "skipped_in_a_row": error.consecutive,
        "lr": rate,
        "updates": updates,
        "norms": weights,
    }
