"""Restoring the training state from a checkpoint, shared by the start of a run (resume.py) and its rollback (rollback.py)."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from engine.checkpoint.async_saver import AsyncSaver, load_on_all
from engine.checkpoint.run_directory import RunDirectory
from engine.distributed.processes import Processes
from engine.logging.log import Log
from engine.optim.skipped_updates import moments
from engine.state import TrainState
from models.entries import check_finite
from models.metadata import check_metadata
from models.torch_files import parse_torch

Contents = dict[str, Any]  # of a checkpoint file


def find_checkpoint(
    run: RunDirectory,
    log: Log,
    processes: Processes,
    *,
    accept: Callable[[Contents], bool] = lambda contents: True,
    rename: bool = False,
) -> tuple[Path | None, Contents | None]:
    """Return the newest intact checkpoint of a run that is accepted, the same on all processes, and on the main one its contents.

    Warns of newer ones that are damaged and, with `rename`, sets them aside. Raises ValueError on all processes if none is
    intact, if one has a format that is too new, or if the folder cannot be read.
    """
    held: list[Contents] = []

    def find() -> str | None:
        folder = run.checkpoints
        try:
            found, contents, damaged = folder.newest_good(accept, parse_torch)
            held.append(contents)
            for error in damaged:
                log.warning(f"{error}; going back to {found}")
            for path in folder.set_aside(damaged, found) if rename and found else ():
                log.warning(f"set aside {path}")
        except OSError as error:
            raise ValueError(
                f"{folder.path} cannot be read or changed ({error.strerror}); are the disk there and the files yours?"
            ) from error
        return str(found) if found else None

    found = processes.on_main(find)
    return (Path(found) if found else None), (held[0] if found and held else None)


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
    or moments of the optimiser that are not finite.
    """
    contents = load_on_all(path, processes, contents, parse_torch)
    check_metadata(contents.get("facts", {}), str(path))
    for tensors in (contents["model"], contents.get("ema") or {}, moments(contents.get("optimizer", {"state": {}}))):
        check_finite(tensors, str(path), "continue from an earlier checkpoint, with --tag NEW --resume FILE")
    if check is not None:
        check(contents.get("facts", {}))
    state.load_state_dict(contents, str(path))
    return contents


def continue_saving(
    state: TrainState,
    contents: Contents,
    saver: AsyncSaver,
    processes: Processes,
    *,
    write: bool = True,
    save_again: bool = False,
) -> None:
    """Let the saver continue from a restored checkpoint of this run; `write` missing files of best weights anew.

    `save_again` has the same update saved once more, for a state that was changed after it was restored.
    """
    saver.continue_from(state, save_again)
    if processes.main and write:
        saver.restore_best_files(state, contents, parse_torch)
