"""Resuming: whether a run directory fits the config, and the start of a run from a checkpoint, weights or nothing."""

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

import yaml
from yacs.config import CfgNode

import config
from config.lookup import config_differences
from data.build import Data
from engine.checkpoint.async_saver import AsyncSaver
from engine.checkpoint.run_directory import RunDirectory
from engine.distributed.processes import Processes
from engine.logging.log import Log
from engine.state import TrainState
from models.file_kinds import find_weights, is_safetensors
from trainer.restore import Contents, continue_saving, find_checkpoint, restore_state
from trainer.warm_start import load_initial_weights

# Keys and sections that may differ between two starts of one run: they change no number, or only its rounding.
CHANGEABLE_KEYS = (
    "OUTPUT",
    "NAME",
    "TAG",
    "DEVICE",
    "RECIPE.HEADLINE",
    "TRAIN.BENCHMARK",
    "MODEL.NORM_BACKEND",
    "TRAIN.CHECKPOINT_BLOCKS",
    "TRAIN.COMPILE",
    "OPTIM.BACKEND",
    "DATA.CLASS_INDEX",  # the resulting order of the classes is compared instead
    "DATA.PATH",
    "DATA.VAL_LABELS",
    "DATA.WORKERS",
    "DATA.PREFETCH",
    "DATA.MAX_BAD_SHARE",
    "EVAL.BATCH",
    "TRAIN.MAX_SKIPPED",
    "CHECKPOINT",
    "DIST.START_TIMEOUT",
    "DIST.TIMEOUT",
    "DIST.BUCKET_MB",
    "DIST.STATIC_GRAPH",
    "LOG",
    "MODEL.INIT",
    "MODEL.MODULE",  # the file may move; the manifest records its digest
    "MODEL.INIT_WEIGHTS",
    "MODEL.KERNELS",
    "DISTILL.TEACHER_WEIGHTS",  # the digest of the weights is compared instead
    "TRAIN.MICRO_BATCH",  # with a warning
)
DECODING_KEYS = ("DATA.LOADER", "DATA.DALI_DEVICE")  # the loaders decode the same images with different rounding


def check_same_run(cfg: CfgNode, run: RunDirectory, log: Log) -> None:
    """Raise ValueError if the run directory holds checkpoints of a run with another recipe."""
    if not (run.config.is_file() and run.checkpoints.latest()):
        return
    old, new = (yaml.safe_load(config.dump(c)) for c in (config.load(str(run.config), run_code=False), cfg))
    decoding_keys = () if "synthetic" in (old["DATA"]["LOADER"], cfg.DATA.LOADER) else DECODING_KEYS
    changed = config_differences(old, new, (*CHANGEABLE_KEYS, *decoding_keys))
    if changed:
        raise ValueError(
            f"{run.path} holds a run with other settings: {'; '.join(change[:200] for change in changed[:40])}. Set them back to continue it, or start "
            "another run with --tag NAME"
        )
    if old["TRAIN"]["MICRO_BATCH"] != cfg.TRAIN.MICRO_BATCH:
        micro = f"{old['TRAIN']['MICRO_BATCH']} -> {cfg.TRAIN.MICRO_BATCH}"
        log.warning(f"TRAIN.MICRO_BATCH: {micro}: mixing, drop path and BatchNorm differ from here on")
    if decoding := [change for change in config_differences(old, new, ()) if change.startswith(DECODING_KEYS)]:
        log.warning(
            f"{'; '.join(decoding)}: the same images in the same order, with pixels that differ by part of a level"
        )


@dataclass(frozen=True)
class Start:
    """Start of a run: from a checkpoint, from the weights of MODEL.INIT, or from random weights."""

    checkpoint: Path | None = None
    contents: Contents | None = None  # of the checkpoint, on the main process, if it has read them already
    own: bool = False  # the checkpoint is one of the run's own
    initial_weights: bool = False


def restore(
    cfg: CfgNode,
    args: argparse.Namespace,
    state: TrainState,
    data: Data,
    processes: Processes,
    *,
    run: RunDirectory,
    log: Log,
    saver: AsyncSaver,
) -> None:
    """Choose the start of the run and bring the state to it."""
    start = choose_start(cfg, args, processes, run=run, log=log)
    if start.checkpoint:
        restore_checkpoint(start, cfg, args, state, data, processes, log=log, saver=saver)
    elif start.initial_weights:
        load_initial_weights(cfg, state, data, log, exact=args.eval)


def choose_start(cfg: CfgNode, args: argparse.Namespace, processes: Processes, *, run: RunDirectory, log: Log) -> Start:
    """Return the run's newest intact checkpoint, else that of --resume, else MODEL.INIT's weights, else random weights.

    With --eval a file that is named precedes the run's own, and random weights are refused with ValueError.
    """
    if not (args.eval and (args.resume or cfg.MODEL.INIT)):
        newest, contents = find_checkpoint(run, log, processes, rename=not (args.eval or args.dry_run))
        if newest:
            return Start(newest, contents, own=True)
    if args.resume:
        return Start(check_resumable(Path(args.resume)))
    if args.eval and not cfg.MODEL.INIT:
        raise ValueError(f"--eval: {run.path} holds no checkpoint; name one with --resume or --init, or use eval.py")
    return Start(initial_weights=bool(cfg.MODEL.INIT))


def check_resumable(given: Path) -> Path:
    """Return the path of the file of --resume. Raises ValueError for one that is missing or, by its first bytes, no checkpoint."""
    path = find_weights(given)
    if is_safetensors(path):
        raise ValueError(f"{path} holds weights only, not a run to continue; start from them with --init")
    return path


def restore_checkpoint(
    start: Start,
    cfg: CfgNode,
    args: argparse.Namespace,
    state: TrainState,
    data: Data,
    processes: Processes,
    *,
    log: Log,
    saver: AsyncSaver,
) -> None:
    """Restore the state from the checkpoint of a start. Raises ValueError if that run is complete, or its data differ."""
    path = start.checkpoint
    assert path is not None
    check = partial(check_same_data, data=data, path=path)
    contents = restore_state(path, start.contents, state, processes, check)
    position = "complete" if state.complete else f"in epoch {state.epoch + 1}"
    log.info(f"continuing {path} at update {state.update} of {state.plan.updates} ({position})")
    if start.own:
        continue_saving(state, contents, saver, processes, write=not (args.eval or args.dry_run))
    else:
        state.best = {}  # the files of the best weights lie in the other run's directory
        if state.complete and not args.eval:
            raise ValueError(
                f"{path} is at the end of TRAIN.EPOCHS={state.plan.epochs}; raise it, or start with --init"
            )
    if start.own and args.resume:
        log.info(f"--resume {args.resume} is not read: the run has gone further")
    if cfg.MODEL.INIT:
        log.info(f"MODEL.INIT {cfg.MODEL.INIT} is not read: the run has gone further")


def check_same_data(metadata: Mapping[str, Any], data: Data, path: Path) -> None:
    """Raise ValueError if a checkpoint's classes or data fingerprint are not those of the run's data."""
    classes, stored = metadata.get("classes", []), metadata.get("data", {})
    if classes != data.classes:
        pairs = [f"{str(a)[:80]} -> {str(b)[:80]}" for a, b in zip_longest(classes, data.classes) if a != b]
        raise ValueError(f"{path} was trained on other classes: {', '.join(pairs[:3])}; use its data, or --init")
    changed = [
        f"{key}: {str(stored.get(key))[:80]} -> {value}"
        for key, value in data.fingerprint.items()
        if stored.get(key) != value
    ]
    if changed:
        raise ValueError(
            f"the data set has changed since {path}: {', '.join(changed)}; put it back, or start with --init"
        )
