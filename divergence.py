"""A run whose updates are not finite any more: what is known of it, and the way back to the last good checkpoint, once."""

import contextlib
from pathlib import Path
from typing import Any

from data.stream import IndexStream
from engine.checkpoint import load_state
from engine.distributed import Processes
from engine.loop import Loop
from engine.safety import DivergedError, is_good, norms, plain
from engine.saver import Saver
from engine.state import TrainState
from engine.tables import write_json


def go_back(
    error: DivergedError, state: TrainState, loop: Loop, stream: IndexStream, saver: Saver, processes: Processes
) -> None:
    """Note what diverged; bring the state to the last good checkpoint, to be saved at once. Called by all processes.

    Raises DivergedError if there is none, or if the run has gone back before.
    """
    run = saver.run
    saver.finish()
    path = find_good(saver, processes) if not state.rollbacks else None
    record = describe_divergence(state, loop, stream, processes)
    if processes.main:
        write_json(run.diverged, {"error": str(error), "went_back_to": path and path.name, **record})
    if path is None:
        why = "the run went back once before" if state.rollbacks else "there is no good checkpoint to go back to"
        raise DivergedError(
            f"{error}; {why}. {run.diverged} lists the images, losses and norms; start another run from a good checkpoint "
            "with a milder recipe: --tag NEW --resume FILE --opts OPTIM.LR ..."
        ) from error
    stored = load_state(path)
    state.load_state_dict(stored, str(path))
    state.rollbacks += 1
    saver.continue_from(state)
    saver.stored = None  # the file does not say yet that the run has gone back
    saver.log.warn(f"{error}; going back to {path}, once. {run.diverged} lists the images, losses and norms")
    if processes.main:
        run.checkpoints.remove_after(state.update)
        saver.mend_best(state, stored)


def find_good(saver: Saver, processes: Processes) -> Path | None:
    """Return the newest checkpoint of the run to which going back is of use, the same on all processes."""
    found: Path | None = None
    if processes.main:
        with contextlib.suppress(ValueError):
            found, _, _ = saver.run.checkpoints.newest_good(is_good)
    agreed = processes.from_main(found)
    return Path(str(agreed)) if agreed else None


def describe_divergence(state: TrainState, loop: Loop, stream: IndexStream, processes: Processes) -> dict[str, Any]:
    """Return what tells why the last updates were skipped: images and losses by micro-batch, norms. By all processes."""
    assert loop.losses is not None
    losses = processes.sum(loop.losses.clone()).tolist()
    row = min(int(state.skips[0]), state.update)
    updates: list[dict[str, Any]] = []
    for update in range(max(state.update - min(row, loop.max_skipped), 0), state.update):
        epoch, number = divmod(update, state.plan.updates_per_epoch)
        micro_batches = [
            {"loss": plain(loss), "indices": stream.micro_batch(epoch, number, j)[1].tolist()}
            for j, loss in enumerate(losses[update % loop.max_skipped])
        ]
        updates.append({"update": update + 1, "epoch": epoch + 1, "micro_batches": micro_batches})
    weights = {which: norms(model.state_dict()) for which, model in state.weights().items()}
    rate = max(group["lr"] for group in state.optimizer.param_groups)
    return {"update": state.update, "skipped_in_a_row": row, "lr": rate, "updates": updates, "norms": weights}
