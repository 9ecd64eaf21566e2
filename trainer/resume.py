"""Where a run stands when it starts: its own newest checkpoint, another run's, initial weights, and the teacher."""

import argparse
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import yaml
from yacs.config import CfgNode

import config
from config import command_line
from data.build import Data
from engine.build import wrap_teacher
from engine.checkpoint.async_saver import AsyncSaver, load_on_all
from engine.checkpoint.run_directory import RunDirectory, config_differences
from engine.distributed.processes import Processes
from engine.logging.log import Log
from engine.loss import Teacher
from engine.state import TrainState
from models.build import build_teacher
from models.weights import fit, load_warm_start, load_weights

DECODING = ("DATA.LOADER", "DATA.DALI_DEVICE")  # the ways to decode give the same images, rounded differently


def check_same_run(cfg: CfgNode, run: RunDirectory, log: Log, free: Sequence[str]) -> None:
    """Raise ValueError if the run directory holds checkpoints of a run with another recipe; keys in `free` may differ."""
    if not (run.config.is_file() and run.checkpoints.latest()):
        return
    old, new = (yaml.safe_load(config.dump(c)) for c in (config.load(str(run.config)), cfg))
    decoded = () if "synthetic" in (old["DATA"]["LOADER"], cfg.DATA.LOADER) else DECODING
    changed = config_differences(old, new, (*free, "TRAIN.MICRO_BATCH", *decoded))
    if changed:
        raise ValueError(
            f"{run.path} holds a run with other settings: {'; '.join(changed)}. Set them back to continue it, or start "
            "another run with --tag NAME"
        )
    if old["TRAIN"]["MICRO_BATCH"] != cfg.TRAIN.MICRO_BATCH:
        micro = f"{old['TRAIN']['MICRO_BATCH']} -> {cfg.TRAIN.MICRO_BATCH}"
        log.warning(f"TRAIN.MICRO_BATCH: {micro}: mixing, drop path and BatchNorm go other ways from here on")
    if decoding := [change for change in config_differences(old, new, ()) if change.startswith(DECODING)]:
        log.warning(
            f"{'; '.join(decoding)}: the same images in the same order, with pixels that differ by part of a level"
        )


def restore(
    cfg: CfgNode, args: argparse.Namespace, saver: AsyncSaver, state: TrainState, data: Data, processes: Processes
) -> None:
    """Bring the state to the run's newest whole checkpoint, else to --resume's, else to MODEL.INIT's weights, else leave it.

    With --eval, a file that is named comes before the run's own.
    """
    log, run = saver.log, saver.run
    named = args.eval and (args.resume or cfg.MODEL.INIT)
    latest, stored = None, None
    if not named:
        latest, stored = find_latest(saver, processes, may_write=not (args.eval or args.dry_run))
    source = latest or (Path(args.resume) if args.resume else None)
    if source:
        stored = load_on_all(source, processes, stored)
        check_same_data(stored["facts"], data, source)
        state.load_state_dict(stored, str(source))
        where = "complete" if state.complete else f"in epoch {state.epoch + 1}"
        log.info(f"continuing {source} at update {state.update} of {state.plan.updates} ({where})")
        if source != latest:
            state.best = {}  # whose files lie in the other run
            if state.complete and not args.eval:
                raise ValueError(
                    f"{source} is at the end of TRAIN.EPOCHS={state.plan.epochs}; raise it, or start with --init"
                )
        else:
            saver.continue_from(state)
            if processes.main and not (args.eval or args.dry_run):
                saver.restore_best_files(state, stored)
        for flag, value in (("--resume", args.resume if source == latest else None), ("MODEL.INIT", cfg.MODEL.INIT)):
            if value:
                log.info(f"{flag} {value} is not read: the run has gone further")
    elif cfg.MODEL.INIT:
        weights, metadata = load_weights(Path(cfg.MODEL.INIT), cfg.MODEL.INIT_WEIGHTS or "raw")
        command_line.check_which(metadata, cfg.MODEL.INIT_WEIGHTS, cfg.MODEL.INIT)
        if not cfg.MODEL.INIT_WEIGHTS and cfg.RECIPE.HEADLINE == "ema" and "ema" in metadata["holds"]:
            weights, metadata = load_weights(Path(cfg.MODEL.INIT), "ema")
        if args.eval:
            fit(state.model, weights, cfg.MODEL.INIT)  # refuses what would evaluate a fresh classifier
        also = [kind for kind in metadata["holds"] if kind != metadata["weights"]]
        other = f"; the file also holds {also[0]} weights, see MODEL.INIT_WEIGHTS" if also else ""
        log.info(f"{load_warm_start(state.model, weights, cfg.MODEL.INIT)} ({metadata['weights']} weights{other})")
        if len(metadata.get("classes", [])) == len(data.classes) and metadata["classes"] != data.classes:
            log.warning(f"{cfg.MODEL.INIT} was trained on other classes of the same number: its classifier is kept")
        if state.ema:
            state.ema.set(state.model)
    elif args.eval:
        raise ValueError(f"--eval: {run.path} holds no checkpoint; name one with --resume or --init, or use eval.py")


def find_latest(saver: AsyncSaver, processes: Processes, may_write: bool) -> tuple[Path | None, dict[str, Any] | None]:
    """Return the run's newest whole checkpoint, the same on all processes, and on the main one what it holds.

    Damaged ones that are newer are said and, if it `may_write`, renamed. ValueError if none is whole or one is too new.
    """
    held: list[dict[str, Any]] = []

    def find() -> Path | None:
        folder = saver.run.checkpoints
        try:
            found, state, damaged = folder.newest_good()
            held.append(state)
            for complaint in damaged:
                saver.log.warning(f"{complaint}; going back to {found}")
            for path in folder.set_aside(damaged, found) if may_write and found else ():
                saver.log.warning(f"set aside {path}")
        except OSError as error:
            raise ValueError(
                f"{folder.path} cannot be read or changed ({error.strerror}); are the disk there and the files yours?"
            ) from error
        return found

    found = processes.on_main(find)
    return found, (held[0] if found and held else None)


def find_teacher(
    cfg: CfgNode, run: RunDirectory, state: TrainState, data: Data, processes: Processes, log: Log
) -> Teacher | None:
    """Return the model to distil from, if one is asked for. Raises ValueError if it is not the one the run began with."""
    if cfg.DISTILL.TYPE == "none":
        return None
    model, said = build_teacher(cfg, data.classes)
    teacher = wrap_teacher(cfg, model, processes)
    if state.update:
        before = run.read_manifest().get("teacher", {}).get("digest", teacher.digest)
        if before != teacher.digest:
            raise ValueError(
                f"DISTILL.TEACHER_WEIGHTS={cfg.DISTILL.TEACHER_WEIGHTS} has changed since {run.path} began (digest {before} -> "
                f"{teacher.digest}); put the file back, or start another run with --tag NAME"
            )
    log.info(f"distilling ({cfg.DISTILL.TYPE}) from {said}; {teacher.describe()}")
    if not cfg.DISTILL.ALPHA:
        log.warning("DISTILL.ALPHA=0: the teacher is asked, but what it says counts for nothing")
    return teacher


def check_same_data(metadata: dict[str, Any], data: Data, source: Path) -> None:
    """Raise ValueError if a checkpoint's position is one in another data set."""
    if metadata["classes"] != data.classes:
        pairs = [f"{a} -> {b}" for a, b in zip_longest(metadata["classes"], data.classes) if a != b]
        raise ValueError(f"{source} was trained on other classes: {', '.join(pairs[:3])}; use its data, or --init")
    changed = [
        f"{key}: {metadata['data'].get(key)} -> {value}"
        for key, value in data.fingerprint.items()
        if metadata["data"].get(key) != value
    ]
    if changed:
        raise ValueError(
            f"the data set has changed since {source}: {', '.join(changed)}; put it back, or start with --init"
        )
