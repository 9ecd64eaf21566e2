"""Train a model, or continue a run: the table of contents.

    python train.py --cfg configs/groupmixformer/mobile_64.yaml --data-path DIR
    torchrun --nproc_per_node 8 train.py --cfg configs/groupmixformer/tiny_224.yaml --data-path DIR

The run lies in <output>/<name>; the same command continues it where it stopped.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import yaml
from yacs.config import CfgNode

import arguments
import config
from data.build import Data, build_data
from engine import distributed
from engine.build import build_loop, build_plan, build_state, prepare_model, wrap_model
from engine.checkpoint import load_initial, load_state, load_weights, save_weights
from engine.distributed import Processes
from engine.evaluate import Accuracy, evaluate
from engine.log import Log
from engine.plan import accumulation
from engine.precision import Precision
from engine.randomness import seed_process
from engine.run import RunDirectory, differences, this_start
from engine.state import TrainState
from models.build import build_model

# What may differ between two starts of one run: it changes no number, or only how they round.
FREE = (
    "BASE",
    "OUTPUT",
    "DEVICE",
    "DATA.PATH",
    "DATA.WORKERS",
    "DATA.PREFETCH",
    "EVAL.BATCH",
    "CHECKPOINT",
    "LOG",
    "MODEL.INIT",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = arguments.train_parser()
    args = parser.parse_args(argv)
    try:
        cfg = arguments.resolve(args, arguments.TRAIN_FLAGS)
        processes = distributed.start(cfg.DEVICE)
    except ValueError as error:
        parser.fail(error)
    log = Log(processes.main)
    try:
        train(cfg, args, processes, log)
    except ValueError as error:
        if processes.main:
            log.close()
            parser.fail(error)
        return 2
    except KeyboardInterrupt:
        log.warn("interrupted; the same command continues from the last checkpoint")
        return 130
    finally:
        log.close()
        distributed.stop()
    return 0


def train(cfg: CfgNode, args: argparse.Namespace, processes: Processes, log: Log) -> None:
    """Build everything, continue where the run stands, train the epochs that are left."""
    torch.backends.cudnn.benchmark = cfg.TRAIN.BENCHMARK
    accumulation(cfg.TRAIN.GLOBAL_BATCH, cfg.TRAIN.MICRO_BATCH, processes.world)
    run = RunDirectory(Path(cfg.OUTPUT) / config.run_name(cfg), cfg.CHECKPOINT.KEEP)
    check_same_run(cfg, run, log)
    data = build_data(cfg, processes.rank, processes.world, processes.device)
    plan = build_plan(cfg, processes, data.train.updates_per_epoch)
    precision = Precision(cfg.TRAIN.AMP, processes.device)
    seed_process(cfg.TRAIN.SEED)
    model = prepare_model(cfg, build_model(cfg, len(data.classes)), processes)
    state = build_state(cfg, model, plan, precision)
    restore(cfg, args.resume, run, state, processes, log)
    if args.eval:
        for which, result in evaluate_all(state, data, precision, processes, log).items():
            log.say(f"{which:<3}  {result}")
        return
    if state.complete:
        log.say(
            f"{run.path} is complete: {plan.epochs} epochs, best {describe_best(state)}; train longer under another --tag"
        )
        return
    if processes.main:
        run.create(config.dump(cfg))
        run.record_start(facts_of(cfg, data, state.model), this_start(processes.world, state.update, processes.device))
        log.open(run.path, state.update, cfg.LOG.TENSORBOARD)
    announce(cfg, run, data, state, processes, log)
    loop = build_loop(cfg, wrap_model(model, processes), data.stage.train, precision, processes)

    def save() -> None:
        stored = state.state_dict(processes)
        if processes.main:
            facts = facts_of(cfg, data, state.model) | {"epoch": state.update / plan.updates_per_epoch}
            run.checkpoints.save(state.update, {**stored, "facts": facts})

    def after_update() -> None:
        log.advance()
        every = cfg.CHECKPOINT.EVERY_UPDATES
        if every and state.update % every == 0 and state.update_in_epoch:
            save()

    while not state.complete:
        epoch = state.epoch
        log.begin_epoch(epoch, plan.epochs, state.update_in_epoch, plan.updates_per_epoch)
        batches = data.train.epoch(epoch, state.update_in_epoch)
        loop.train_epoch(state, batches, lambda step: log.step(step, plan.epochs, plan.updates_per_epoch), after_update)
        log.end_epoch()
        if (epoch + 1) % cfg.EVAL.EVERY == 0 or state.complete:
            results = evaluate_all(state, data, precision, processes, log)
            keep_best(cfg, run, data, state, results, epoch, processes, log)
        save()
    log.say(f"done: best {describe_best(state)}; the run lies in {run.path}")


def check_same_run(cfg: CfgNode, run: RunDirectory, log: Log) -> None:
    """Raise ValueError if the run directory holds checkpoints of a run with another recipe."""
    if not (run.config.is_file() and run.checkpoints.latest()):
        return
    old, new = yaml.safe_load(run.config.read_text()), yaml.safe_load(config.dump(cfg))
    changed = differences(old, new, (*FREE, "TRAIN.MICRO_BATCH"))
    if changed:
        raise ValueError(
            f"{run.path} holds a run with other settings: {'; '.join(changed)}. Set them back to continue it, or start another "
            "run with --tag NAME"
        )
    if old["TRAIN"]["MICRO_BATCH"] != cfg.TRAIN.MICRO_BATCH:
        micro = f"{old['TRAIN']['MICRO_BATCH']} -> {cfg.TRAIN.MICRO_BATCH}"
        log.warn(f"TRAIN.MICRO_BATCH: {micro}: mixing, drop path and BatchNorm are drawn otherwise from here on")


def restore(
    cfg: CfgNode, resume: str | None, run: RunDirectory, state: TrainState, processes: Processes, log: Log
) -> None:
    """Bring the state to the run's latest checkpoint, else to --resume's, else to MODEL.INIT's weights, else leave it."""
    latest = processes.from_main(run.checkpoints.latest())
    source = Path(str(latest)) if latest else Path(resume) if resume else None
    if source:
        state.load_state_dict(load_state(source), str(source))
        log.say(f"continuing {source} at update {state.update} of {state.plan.updates} (epoch {state.epoch + 1})")
        for flag, value in (("--resume", resume if latest else None), ("MODEL.INIT", cfg.MODEL.INIT)):
            if value:
                log.say(f"{flag} {value} is not read: the run has gone further")
    elif cfg.MODEL.INIT:
        weights, _ = load_weights(Path(cfg.MODEL.INIT), cfg.MODEL.INIT_WEIGHTS)
        log.say(load_initial(state.model, weights, cfg.MODEL.INIT))
        if state.ema:
            state.ema.set(state.model)


def evaluate_all(
    state: TrainState, data: Data, precision: Precision, processes: Processes, log: Log
) -> dict[str, Accuracy]:
    """Evaluate the raw and, if kept, the EMA weights on every validation image."""
    results: dict[str, Accuracy] = {}
    for which, model in state.weights().items():
        batches = log.track(data.val, len(data.val), f"evaluate {which}")
        results[which] = evaluate(model, batches, data.stage.evaluate, precision, processes, data.val.num_images)
    return results


def keep_best(
    cfg: CfgNode,
    run: RunDirectory,
    data: Data,
    state: TrainState,
    results: dict[str, Accuracy],
    epoch: int,
    processes: Processes,
    log: Log,
) -> None:
    """Log the results of an epoch and keep the weights that beat all before them."""
    for which, result in results.items():
        counts = {key: value for key, value in asdict(result).items() if key != "seconds"}
        entry = {"top1": result.top1, "top5": result.top5, **counts, "epoch": epoch + 1, "update": state.update}
        best = state.note_result(which, entry)
        log.result(which, result, epoch, state.update, best)
        if best and processes.main:
            facts = facts_of(cfg, data, state.model) | {"weights": which, **entry}
            save_weights(run.best(which), state.weights()[which].state_dict(), facts)


def facts_of(cfg: CfgNode, data: Data, model: torch.nn.Module) -> dict[str, Any]:
    """Return what a reader of a checkpoint wants to know about it."""
    return {
        "model": cfg.MODEL.NAME,
        "num_classes": len(data.classes),
        "classes": data.classes,
        "img_size": cfg.DATA.IMG_SIZE,
        "parameters": sum(p.numel() for p in model.parameters()),
        "seed": cfg.TRAIN.SEED,
        "data": data.fingerprint,
    }


def describe_best(state: TrainState) -> str:
    """Return the best results in a few words."""
    return (
        ", ".join(f"{which} top-1 {best['top1']:.3f} (epoch {best['epoch']})" for which, best in state.best.items())
        or "none yet"
    )


def announce(cfg: CfgNode, run: RunDirectory, data: Data, state: TrainState, processes: Processes, log: Log) -> None:
    """Say what is about to happen, derived values included."""
    plan, groups = state.plan, state.optimizer.param_groups
    parameters = sum(p.numel() for p in state.model.parameters())
    counts = ", ".join(f"{sum(p.numel() for p in g['params']):,} at weight decay {g['weight_decay']:g}" for g in groups)
    peak = groups[-1]["initial_lr"]
    log.say(f"run        {run.path}")
    log.say(f"processes  {processes.world} ({processes.launcher}), device {processes.device.type}, amp {cfg.TRAIN.AMP}")
    log.say(
        f"data       {data.fingerprint['train']} training and {data.val.num_images} validation images, {len(data.classes)} classes"
    )
    log.say(f"model      {cfg.MODEL.NAME}, {parameters:,} parameters ({counts})")
    for note in data.notes:
        log.warn(note)
    log.say(
        f"batch      {plan.global_batch} = {plan.micro_batch} images x {plan.world} processes x {plan.accumulation} accumulation; "
        f"{plan.updates_per_epoch} updates an epoch, {plan.epochs} epochs, {plan.updates * plan.global_batch:,} images"
    )
    log.say(f"schedule   learning rate {peak:.3e} after {cfg.SCHEDULE.WARMUP_EPOCHS:g} epochs of warmup, then cosine")


if __name__ == "__main__":
    sys.exit(main())
