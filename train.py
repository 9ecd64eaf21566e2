"""Train a model, or continue a run: the table of contents.

    python train.py --cfg configs/groupmixformer/mobile_64.yaml --data-path DIR
    torchrun --nproc_per_node 8 train.py --cfg configs/groupmixformer/tiny_224.yaml --data-path DIR

The run lies in <output>/<name>; the same command continues it where it stopped.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: threads that spin steal the loader's cores

from engine.interruption import PREEMPTED, Interruption, PreemptedError

INTERRUPTION = Interruption()
if __name__ == "__main__":
    INTERRUPTION.listen()  # before torch too, whose import takes seconds

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
import yaml
from yacs.config import CfgNode

import arguments
import config
from data.build import Data, build_data
from data.decode import UnreadableImageError
from engine import distributed
from engine.agreement import Agreement, Wish
from engine.build import build_loop, build_plan, build_state, prepare_model, wrap_model, wrap_teacher
from engine.checkpoint import load_state, save_weights
from engine.distill import Teacher
from engine.distributed import Processes
from engine.evaluate import Accuracy, evaluate
from engine.log import Log
from engine.loop import DivergedError, Loop, check_finite
from engine.plan import accumulation
from engine.precision import Precision
from engine.randomness import seed_process
from engine.run import RunDirectory, differences, this_start
from engine.state import TrainState
from models.build import build_model, build_teacher
from models.weights import fit, load_initial, load_weights
from report import estimate_memory, report

# What may differ between two starts of one run: it changes no number, or only how they round.
FREE = (
    "OUTPUT",
    "DEVICE",
    "DATA.PATH",
    "DATA.WORKERS",
    "DATA.PREFETCH",
    "EVAL.BATCH",
    "CHECKPOINT",
    "LOG",
    "MODEL.INIT",
    "DISTILL.TEACHER_WEIGHTS",  # what is in the file must be the same
)
IMAGENET = 1_281_167, 50_000, 1000  # training images, validation images, classes


@dataclass
class Session:
    """One start of a run: what train.py builds before it trains."""

    cfg: CfgNode
    processes: Processes
    log: Log
    run: RunDirectory
    data: Data
    precision: Precision
    state: TrainState
    loop: Loop
    teacher: Teacher | None
    agreement: Agreement

    def check(self, wish: Wish) -> None:
        """Raise what ends the run if the processes agreed on it."""
        if wish == Wish.STOP:
            raise PreemptedError

    def facts(self) -> dict[str, Any]:
        """Return what a reader of a checkpoint wants to know about it."""
        return {
            "model": self.cfg.MODEL.NAME,
            "num_classes": len(self.data.classes),
            "classes": self.data.classes,
            "img_size": self.cfg.DATA.IMG_SIZE,
            "mean": list(self.cfg.DATA.MEAN),
            "std": list(self.cfg.DATA.STD),
            "parameters": sum(p.numel() for p in self.state.model.parameters()),
            "seed": self.cfg.TRAIN.SEED,
            "data": self.data.fingerprint,
            **({"teacher": {"model": self.cfg.DISTILL.TEACHER, "digest": self.teacher.digest}} if self.teacher else {}),
        }


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = arguments.train_parser()
    args = parser.parse_args(argv)
    try:
        cfg = arguments.resolve(args, arguments.TRAIN_FLAGS)
        processes = distributed.start(cfg.DEVICE)
    except ValueError as error:
        parser.fail(error)
    status, log, run = (
        0,
        Log(processes.main),
        RunDirectory(Path(cfg.OUTPUT) / config.run_name(cfg), cfg.CHECKPOINT.KEEP),
    )
    try:
        session = build_or_fail(parser, cfg, args, processes, log, run)
        if args.dry_run:
            announce(session, with_memory=True)
        elif args.eval:
            evaluate_only(session)
        else:
            status = train(session)
    except (DivergedError, UnreadableImageError) as error:
        parser.stop(error, processes.name)
    except KeyboardInterrupt:
        log.warn("interrupted; the same command continues from the last checkpoint")
        return 130
    except PreemptedError:
        log.warn("interrupted")
        status = PREEMPTED
    finally:
        log.close()
        run.unlock()
    distributed.stop()
    return status


def build_or_fail(
    parser: arguments.Parser,
    cfg: CfgNode,
    args: argparse.Namespace,
    processes: Processes,
    log: Log,
    run: RunDirectory,
) -> Session:
    """Build the session; end the process with the message of what the user can mend."""
    try:
        return build(cfg, args, processes, log, run)
    except ValueError as error:
        parser.fail(error, processes.name)


def build(cfg: CfgNode, args: argparse.Namespace, processes: Processes, log: Log, run: RunDirectory) -> Session:
    """Build everything and continue where the run stands. Raises ValueError for what the user can mend."""
    torch.backends.cudnn.benchmark = cfg.TRAIN.BENCHMARK
    torch.backends.cudnn.deterministic = not cfg.TRAIN.BENCHMARK
    accumulation(cfg.TRAIN.GLOBAL_BATCH, cfg.TRAIN.MICRO_BATCH, processes.world)
    stands_in = args.dry_run and cfg.DATA.LOADER == "torch" and not cfg.DATA.PATH
    writes = processes.main and not (args.eval or args.dry_run)
    if writes:
        run.lock()
    check_same_run(cfg, run, log)
    data = build_data(as_imagenet(cfg) if stands_in else cfg, processes.rank, processes.world, processes.device)
    if stands_in:
        data.notes.append("DATA.PATH is not set: images are counted as ImageNet-1k's")
    plan = build_plan(cfg, processes, data.train.updates_per_epoch)
    precision = Precision(cfg.TRAIN.AMP, processes.device)
    seed_process(cfg.TRAIN.SEED)
    model = prepare_model(build_model(cfg, len(data.classes)), processes, cfg.MODEL.SYNC_BN)
    state = build_state(cfg, model, plan, precision)
    restore(cfg, args, run, state, data, processes, log)
    teacher = None if args.eval or state.complete else find_teacher(cfg, run, state, data, processes, log)
    loop = build_loop(cfg, wrap_model(model, processes), data.stage.train, precision, processes, teacher)
    agreement = Agreement(processes, lambda: Wish.STOP if INTERRUPTION.received else Wish.GO_ON)
    session = Session(cfg, processes, log, run, data, precision, state, loop, teacher, agreement)
    if writes and not state.complete:
        run.create(config.dump(cfg))
        run.lock()
        start = this_start(processes.world, state.update, processes.device)
        run.record_start(session.facts(), {**start, "config": yaml.safe_load(config.dump(cfg))})
        log.open(run.path, state.update, cfg.LOG.TENSORBOARD, state.closed)
    return session


def as_imagenet(cfg: CfgNode) -> CfgNode:
    """Return the config with a stand-in of ImageNet-1k's size for the images that a dry run was not given."""
    stand_in = cfg.clone()
    stand_in.defrost()
    stand_in.DATA.LOADER = "synthetic"
    stand_in.DATA.SYNTHETIC_TRAIN, stand_in.DATA.SYNTHETIC_VAL, stand_in.DATA.SYNTHETIC_CLASSES = IMAGENET
    return stand_in


def train(s: Session) -> int:
    """Do what is left of the run, or save and stop early if a signal asks for it; return the exit status."""
    if s.state.complete:
        s.log.say(f"{s.run.path} is complete: {s.state.plan.epochs} epochs, best {describe_best(s)}")
    else:
        INTERRUPTION.defer()
        announce(s)
        try:
            s.check(s.agreement.settle())
            while not s.state.complete:
                if not s.state.between_epochs:
                    train_epoch(s)
                end_epoch(s)
        except PreemptedError:
            return stop_early(s)
        s.log.say(f"done: best {describe_best(s)}; the run lies in {s.run.path}")
    if s.processes.main and not s.run.done.exists():
        s.run.mark(s.run.done, f"after update {s.state.update}")
    return 0


def train_epoch(s: Session) -> None:
    """Train the updates that are left of the epoch."""
    state, plan, log, every = s.state, s.state.plan, s.log, s.cfg.CHECKPOINT.EVERY_UPDATES

    def after_update() -> None:
        log.advance()
        if every and state.update % every == 0 and state.update_in_epoch:
            save(s)
        s.check(s.agreement.poll())

    epoch = state.epoch
    log.begin_epoch(epoch, plan.epochs, state.update_in_epoch, plan.updates_per_epoch)
    batches = s.data.train.epoch(epoch, state.update_in_epoch)
    s.loop.train_epoch(state, batches, lambda step: log.step(step, plan.epochs, plan.updates_per_epoch), after_update)
    log.end_epoch()


def end_epoch(s: Session) -> None:
    """Evaluate after an epoch, keep the best and save."""
    state = s.state
    epoch = state.update // state.plan.updates_per_epoch - 1
    if (epoch + 1) % s.cfg.EVAL.EVERY == 0 or state.trained:
        keep_best(s, evaluate_all(s), epoch)
    state.closed = state.update
    save(s)


def stop_early(s: Session) -> int:
    """Save where the run stands and leave the mark that says so; return the exit status.

    It is PREEMPTED, but 0 under torchrun, which would end the others and turn any other status into 1: there the mark is
    all there is to see.
    """
    s.log.end_epoch()
    if s.state.update:
        save(s)
    if s.processes.main:
        why = INTERRUPTION.received.name if INTERRUPTION.received else "a signal to another process"
        s.run.mark(s.run.preempted, f"by {why} after update {s.state.update}")
        s.log.say(f"stopped by {why} after update {s.state.update}; the same command continues")
    s.agreement.settle()  # nobody leaves before the mark is there
    INTERRUPTION.release()
    return 0 if s.processes.launcher == "torchrun" else PREEMPTED


def check_same_run(cfg: CfgNode, run: RunDirectory, log: Log) -> None:
    """Raise ValueError if the run directory holds checkpoints of a run with another recipe."""
    if not (run.config.is_file() and run.checkpoints.latest()):
        return
    old, new = (yaml.safe_load(config.dump(c)) for c in (config.load(str(run.config)), cfg))
    changed = differences(old, new, (*FREE, "TRAIN.MICRO_BATCH"))
    if changed:
        raise ValueError(
            f"{run.path} holds a run with other settings: {'; '.join(changed)}. Set them back to continue it, or start "
            "another run with --tag NAME"
        )
    if old["TRAIN"]["MICRO_BATCH"] != cfg.TRAIN.MICRO_BATCH:
        micro = f"{old['TRAIN']['MICRO_BATCH']} -> {cfg.TRAIN.MICRO_BATCH}"
        log.warn(f"TRAIN.MICRO_BATCH: {micro}: mixing, drop path and BatchNorm go other ways from here on")


def restore(
    cfg: CfgNode,
    args: argparse.Namespace,
    run: RunDirectory,
    state: TrainState,
    data: Data,
    processes: Processes,
    log: Log,
) -> None:
    """Bring the state to the run's latest checkpoint, else to --resume's, else to MODEL.INIT's weights, else leave it.

    With --eval, a file that is named comes before the run's own.
    """
    latest = processes.from_main(run.checkpoints.latest())
    named = args.eval and (args.resume or cfg.MODEL.INIT)
    source = Path(str(latest)) if latest and not named else Path(args.resume) if args.resume else None
    if source:
        stored = load_state(source)
        check_same_data(stored["facts"], data, source)
        state.load_state_dict(stored, str(source))
        log.say(f"continuing {source} at update {state.update} of {state.plan.updates} (epoch {state.epoch + 1})")
        if source != latest:
            state.best = {}  # whose files lie in the other run
            if state.complete and not args.eval:
                raise ValueError(
                    f"{source} is at the end of TRAIN.EPOCHS={state.plan.epochs}; raise it, or start with --init"
                )
        for flag, value in (("--resume", args.resume if source == latest else None), ("MODEL.INIT", cfg.MODEL.INIT)):
            if value:
                log.say(f"{flag} {value} is not read: the run has gone further")
    elif cfg.MODEL.INIT:
        weights, facts = load_weights(Path(cfg.MODEL.INIT), cfg.MODEL.INIT_WEIGHTS or "raw")
        arguments.check_which(facts, cfg.MODEL.INIT_WEIGHTS, cfg.MODEL.INIT)
        if args.eval:
            fit(state.model, weights, cfg.MODEL.INIT)  # refuses what would evaluate a fresh classifier
        log.say(load_initial(state.model, weights, cfg.MODEL.INIT))
        if len(facts.get("classes", [])) == len(data.classes) and facts["classes"] != data.classes:
            log.warn(f"{cfg.MODEL.INIT} was trained on other classes of the same number: its classifier is kept")
        if state.ema:
            state.ema.set(state.model)
    elif args.eval:
        raise ValueError(f"--eval: {run.path} holds no checkpoint; name one with --resume or --init, or use eval.py")


def find_teacher(
    cfg: CfgNode, run: RunDirectory, state: TrainState, data: Data, processes: Processes, log: Log
) -> Teacher | None:
    """Return the model to distil from, if one is asked for. Raises ValueError if it is not the one the run began with."""
    if cfg.DISTILL.TYPE == "none":
        return None
    model, said = build_teacher(cfg, data.classes)
    teacher = wrap_teacher(cfg, model, processes)
    if state.update and run.manifest.is_file():
        before = json.loads(run.manifest.read_text()).get("teacher", {}).get("digest", teacher.digest)
        if before != teacher.digest:
            raise ValueError(
                f"DISTILL.TEACHER_WEIGHTS={cfg.DISTILL.TEACHER_WEIGHTS} has changed since {run.path} began (digest {before} -> "
                f"{teacher.digest}); put the file back, or start another run with --tag NAME"
            )
    log.say(f"distilling ({cfg.DISTILL.TYPE}) from {said}; {teacher.describe()}")
    if not cfg.DISTILL.ALPHA:
        log.warn("DISTILL.ALPHA=0: the teacher is asked, but what it says counts for nothing")
    return teacher


def check_same_data(facts: dict[str, Any], data: Data, source: Path) -> None:
    """Raise ValueError if a checkpoint's position is one in another data set."""
    if facts["classes"] != data.classes:
        pairs = [f"{a} -> {b}" for a, b in zip_longest(facts["classes"], data.classes) if a != b]
        raise ValueError(f"{source} was trained on other classes: {', '.join(pairs[:3])}; use its data, or --init")
    changed = [
        f"{key}: {facts['data'].get(key)} -> {value}"
        for key, value in data.fingerprint.items()
        if facts["data"].get(key) != value
    ]
    if changed:
        raise ValueError(
            f"the data set has changed since {source}: {', '.join(changed)}; put it back, or start with --init"
        )


def save(s: Session) -> None:
    """Write a checkpoint of the whole state; called by all processes."""
    stored = s.state.state_dict(s.processes)
    check_finite(s.state, stored["sums"])
    if s.processes.main:
        facts = s.facts() | {"epoch": s.state.update / s.state.plan.updates_per_epoch}
        s.run.checkpoints.save(s.state.update, {**stored, "facts": facts})


def evaluate_all(s: Session) -> dict[str, Accuracy]:
    """Evaluate the raw and, if kept, the EMA weights on every validation image."""
    results: dict[str, Accuracy] = {}
    for which, model in s.state.weights().items():
        watched = s.agreement.watch(s.data.val, len(s.data.val), s.check)
        batches = s.log.track(watched, len(s.data.val), f"evaluate {which}")
        results[which] = evaluate(
            model,
            batches,
            s.data.stage.evaluate,
            s.precision,
            s.processes,
            s.data.val.num_images,
            s.cfg.EVAL.FLIP,
        )
    return results


def evaluate_only(s: Session) -> None:
    """Evaluate the weights the session starts from, and say the result."""
    for which, result in evaluate_all(s).items():
        s.log.say(f"{which:<3}  {result}")


def keep_best(s: Session, results: dict[str, Accuracy], epoch: int) -> None:
    """Log the results of an epoch (from 0) and keep the weights that beat all before them."""
    for which, result in results.items():
        counts = {key: value for key, value in asdict(result).items() if key != "seconds"}
        entry = {"top1": result.top1, "top5": result.top5, **counts, "epoch": epoch + 1, "update": s.state.update}
        best = s.state.note_result(which, entry)
        s.log.result(which, result, epoch, s.state.update, best)
        if best and s.processes.main:
            facts = s.facts() | {"weights": which, **entry}
            save_weights(s.run.best(which), s.state.weights()[which].state_dict(), facts)


def describe_best(s: Session) -> str:
    """Return the best results in a few words, the recipe's own first."""
    headline = s.cfg.RECIPE.HEADLINE
    ordered = sorted(s.state.best.items(), key=lambda item: item[0] != headline)
    found = (f"{which} top-1 {best['top1']:.3f} (epoch {best['epoch']})" for which, best in ordered)
    return ", ".join(found) or "none yet"


def announce(s: Session, with_memory: bool = False) -> None:
    """Say what is about to happen, derived values included."""
    memory = estimate_memory(s.cfg, s.state, s.precision) if with_memory and s.processes.main else None
    for label, text in report(s.cfg, s.state, s.data, s.processes.launcher, s.processes.device, s.run.path, memory):
        s.log.say(f"{label:<12}{text}")
    for note in s.data.notes:
        s.log.warn(note)


if __name__ == "__main__":
    sys.exit(main())
