"""Restoring the training state from a checkpoint, shared by the start of a run (resume.py) and its rollback (rollback.py)."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from engine.checkpoint.async_saver import AsyncSaver, load_on_all
from engine.distributed.processes import Processes
from engine.state import TrainState
from models.entries import check_finite

Contents = dict[str, Any]  # of a checkpoint file


def restore_state(
    path: Path,
    contents: Contents | None,
    state: TrainState,
    processes: Processes,
    check: Callable[[Mapping[str, Any]], None] | None = None,
) -> Contents:
    """Load a checkpoint into the state, on all processes; return its contents.

    `contents` holds them where the main process has read the file already. `check` is called with the metadata before the
    state is changed, and may raise ValueError. Raises ValueError if the file cannot be read, does not fit the run or holds weights
    that are not finite.
    """
    contents = load_on_all(path, processes, contents)
    for entry in ("model", "ema"):
        check_finite(
            contents[entry] or {}, str(path), "continue from an earlier checkpoint, with --tag NEW --resume FILE"
        )
    if check is not None:
        check(contents["facts"])
    state.load_state_dict(contents, str(path))
    return contents


def continue_saving(
    state: TrainState, contents: Contents, saver: AsyncSaver, processes: Processes, write: bool = True
) -> None:
    """Let the saver continue from a restored checkpoint of this run; `write` missing files of best weights anew."""
    saver.continue_from(state)
    if processes.main and write:
        saver.restore_best_files(state, contents)
