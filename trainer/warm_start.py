"""Warm start: the weights of MODEL.INIT that a new run starts from."""

from pathlib import Path

from yacs.config import CfgNode

from config import command_line
from data.build import Data
from engine.logging.log import Log
from engine.state import TrainState
from models.weights import fit, load_warm_start, load_weights


def load_initial_weights(cfg: CfgNode, state: TrainState, data: Data, log: Log, *, exact: bool) -> None:
    """Load MODEL.INIT into the model and its EMA.

    Takes the weights of MODEL.INIT_WEIGHTS, by default those of RECIPE.HEADLINE where the file holds both. `exact` refuses
    weights that do not fit, a classifier of other classes included. Raises ValueError for what the user can correct.
    """
    path = cfg.MODEL.INIT
    weights, metadata = load_weights(Path(path), cfg.MODEL.INIT_WEIGHTS or "raw")
    command_line.check_which(metadata, cfg.MODEL.INIT_WEIGHTS, path)
    if not cfg.MODEL.INIT_WEIGHTS and cfg.RECIPE.HEADLINE == "ema" and "ema" in metadata["holds"]:
        weights, metadata = load_weights(Path(path), "ema")
    if exact:
        fit(state.model, weights, path)
    also = [kind for kind in metadata["holds"] if kind != metadata["weights"]]
    other = f"; the file also holds {also[0]} weights, see MODEL.INIT_WEIGHTS" if also else ""
    log.info(f"{load_warm_start(state.model, weights, path)} ({metadata['weights']} weights{other})")
    for note in metadata.get("notes", ()):
        log.info(f"{path}: {note}")
    if len(metadata.get("classes", [])) == len(data.classes) and metadata["classes"] != data.classes:
        log.warning(f"{path} was trained on other classes of the same number: its classifier is kept")
    if state.ema:
        state.ema.set(state.model)
