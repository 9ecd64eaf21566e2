"""Train a model, or continue a run: the table of contents.

    python train.py --cfg configs/groupmixformer/mobile_64.yaml --data-path DIR
    torchrun --nproc_per_node 8 train.py --cfg configs/groupmixformer/tiny_224.yaml --data-path DIR

The run lies in <output>/<name>; the same command continues it where it stopped.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: threads that spin steal the loader's cores

from engine.distributed.signals import ENDED, PREEMPTED, PreemptedError, StopSignals

INTERRUPTION = StopSignals()
if __name__ == "__main__":
    INTERRUPTION.listen()  # before torch too, whose import takes seconds

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from yacs.config import CfgNode

import config
from config import command_line
from data.loaders.decode import UnreadableImageError
from engine.checkpoint.async_saver import AsyncSaver, SavingError
from engine.checkpoint.run_directory import RunDirectory, RunLockedError
from engine.distributed.consensus import Vote
from engine.distributed.elastic import Elastic, prevent_restarts
from engine.distributed.processes import (
    Processes,
    abort,
    exit_on_failure,
    init_processes,
    is_lost_connection,
    shut_down,
)
from engine.evaluate import Accuracy, evaluate
from engine.logging.log import Log
from engine.loop import StepMetrics
from engine.optim.skipped_updates import DivergedError
from trainer.rollback import roll_back
from trainer.session import Session, build_session
from trainer.summary import estimate_memory, summarize


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = command_line.train_parser()
    args = parser.parse_args(argv)
    try:
        cfg = command_line.resolve(args, command_line.TRAIN_FLAGS)
    except ValueError as error:
        prevent_restarts()
        parser.fail(error)
    elastic = Elastic(cfg.TRAIN.GLOBAL_BATCH, cfg.TRAIN.MICRO_BATCH)
    if elastic.idle:
        INTERRUPTION.defer()
        elastic.stand_by(lambda: INTERRUPTION.received is not None)
        return 0
    try:
        processes = init_processes(cfg.DEVICE, cfg.DIST.START_TIMEOUT, cfg.DIST.TIMEOUT)
    except ValueError as error:
        parser.fail(error)
    with exit_on_failure():
        status = work(parser, cfg, args, elastic, processes)
        if status == ENDED:
            abort(status)
    elastic.finish()
    shut_down()
    return status


def work(
    parser: command_line.Parser, cfg: CfgNode, args: argparse.Namespace, elastic: Elastic, processes: Processes
) -> int:
    """Do what the command line asks for; return the exit status, or raise SystemExit with that of a failure."""
    session, log = None, Log(processes.main, dali=cfg.DATA.LOADER == "dali")
    for note in elastic.notes(cfg.CHECKPOINT.EVERY_UPDATES):
        log.warning(note)
    run = RunDirectory(Path(cfg.OUTPUT) / config.run_name(cfg), cfg.CHECKPOINT.KEEP)
    saver = AsyncSaver(run, log, cfg.CHECKPOINT.MAX_FAILURES)
    try:
        session = build_or_fail(parser, cfg, args, processes, saver)
        if not (args.dry_run or args.eval):
            return train(session)
        announce(session, with_memory=True) if args.dry_run else evaluate_only(session)
        return 0
    except (DivergedError, SavingError, UnreadableImageError) as error:
        prevent_restarts()
        parser.stop(error, processes.name)
    except KeyboardInterrupt:
        log.warning("interrupted; the same command continues from the last checkpoint")
        return ENDED
    except PreemptedError:
        log.warning("interrupted")
        return PREEMPTED
    except RuntimeError as error:
        if processes.world == 1 or not is_lost_connection(error):
            raise
        said = f"lost the others {where(session)}: {str(error).splitlines()[0][:200]}. One has ended or waits for something else"
        remedy = "see what it says; the same command continues from the last checkpoint"
        parser.stop(RuntimeError(f"{said}, {remedy}"), processes.name)
    finally:
        saver.wait()
        log.close()
        run.unlock()


def where(s: Session | None) -> str:
    """Return where the run stands, for an error."""
    if s is None:
        return "while it was built"
    return (
        f"in the evaluation after update {s.state.update}"
        if s.state.between_epochs
        else f"in update {s.state.update + 1}"
    )


def build_or_fail(
    parser: command_line.Parser,
    cfg: CfgNode,
    args: argparse.Namespace,
    processes: Processes,
    saver: AsyncSaver,
) -> Session:
    """Build the session; end the process with the message of what the user can mend."""
    try:
        if args.dry_run:
            saver.run.check_writable()
        return build_session(cfg, args, processes, saver, lambda: INTERRUPTION.received is not None)
    except RunLockedError as error:
        parser.fail(error, processes.name)
    except ValueError as error:
        prevent_restarts()
        parser.fail(error, processes.name)


def train(s: Session) -> int:
    """Do what is left of the run, or save and stop early if a signal asks for it; return the exit status."""
    if s.state.complete:
        s.log.info(f"{s.run.path} is complete: {s.state.plan.epochs} epochs, best {describe_best(s)}")
    else:
        INTERRUPTION.defer()
        announce(s)
        s.sample_images.catch_first_batch(s.loop, s.state)
        try:
            s.check(s.consensus.agree())
            while not s.state.complete:
                (end_epoch if s.state.between_epochs else train_epoch)(s)
            if not s.saver.finish():
                s.saver.give_up()
            if s.consensus.agree() is Vote.FAIL:
                raise s.saver.saving_error()
        except PreemptedError:
            return stop_early(s)
        s.log.info(f"done: best {describe_best(s)}; the run lies in {s.run.path}")
    if s.processes.main and not s.run.done.exists():
        leave_mark(s, s.run.done, f"after update {s.state.update}")
    return 0


def train_epoch(s: Session) -> None:
    """Train the updates that are left of the epoch, or go back if they diverge."""
    state, plan, log, every = s.state, s.state.plan, s.log, s.cfg.CHECKPOINT.EVERY_UPDATES

    def log_step(step: StepMetrics) -> None:
        log.step(step, plan.epochs, plan.updates_per_epoch)
        note_bad_images(s)

    def after_update() -> None:
        if s.compilation:
            s.compilation.after_update(log.info)
        log.advance()
        s.saver.poll()
        if every and state.update % every == 0 and state.update_in_epoch:
            save(s)
        s.check(s.consensus.poll())

    epoch = state.epoch
    if s.compilation:
        s.compilation.begin(log.info)
    log.begin_epoch(epoch, plan.epochs, state.update_in_epoch, plan.updates_per_epoch)
    batches = s.data.bad.watch(s.data.train.epoch(epoch, state.update_in_epoch))
    try:
        s.loop.train_epoch(state, batches, log_step, after_update)
    except DivergedError as error:
        log.end_epoch()
        roll_back(error, state, s.loop, s.data.sampler, s.saver, s.processes)
        save(s)
        s.saver.wait()  # a run that is killed from here on does not go back a second time
        log.reopen(s.run.path, s.open_log)
    log.end_epoch()


def end_epoch(s: Session) -> None:
    """Evaluate after an epoch, keep the best and save; before the evaluation too, which may meet a file it cannot read."""
    state = s.state
    epoch = state.update // state.plan.updates_per_epoch - 1
    best: dict[str, Any] = {}
    if (epoch + 1) % s.cfg.EVAL.EVERY == 0 or state.trained:
        save(s)
        best = note_results(s, evaluate_all(s), epoch)
        if s.sample_images.is_due(epoch + 1, state.trained):
            s.sample_images.draw(state.weights()[s.cfg.RECIPE.HEADLINE], s.precision, epoch + 1, state.update)
    state.closed = state.update
    save(s, best)


def stop_early(s: Session) -> int:
    """Save where the run stands and leave the mark that says so; return the exit status.

    It is PREEMPTED, but 0 under torchrun, which would end the others and turn any other status into 1: there the mark is
    all there is to see.
    """
    s.log.end_epoch()
    if s.state.update:
        save(s)
    if not s.saver.finish():  # a mark would have it started again, for ever without progress
        s.saver.give_up()
    if s.consensus.agree() is Vote.FAIL:
        raise s.saver.saving_error()
    if s.processes.main:
        why = INTERRUPTION.received.name if INTERRUPTION.received else "a signal to another process"
        leave_mark(s, s.run.preempted, f"by {why} after update {s.state.update}")
        s.log.info(f"stopped by {why} after update {s.state.update}; the same command continues")
    s.consensus.agree()  # nobody leaves before the mark is there
    INTERRUPTION.release()
    return 0 if s.processes.launcher == "torchrun" else PREEMPTED


def leave_mark(s: Session, mark: Path, text: str) -> None:
    """Leave the file `preempted` or `done`, or say that there is none."""
    try:
        s.run.write_marker(mark, text)
    except OSError as error:
        s.log.warning(f"{mark} cannot be written ({error.strerror}): whoever looks for it finds nothing")


def note_bad_images(s: Session) -> None:
    """List the training images that any process could not read since the last call; called by all processes."""
    new = s.data.bad.take_new()
    if not s.processes.sum(torch.tensor(float(len(new)), device=s.processes.device)):
        return
    for bad in s.data.bad.add(s.processes.from_all(new), s.run.path if s.processes.main else None, s.log.warning):
        s.log.warning(f"{bad.path} {bad.reason}; training on {bad.replaced_by} instead")


def save(s: Session, best: Mapping[str, Mapping[str, Any]] | None = None) -> None:
    """Store the whole state, and the new best weights; called by all processes."""
    s.saver.save(s.state, s.processes, s.metadata(), best or {})


def evaluate_all(s: Session) -> dict[str, Accuracy]:
    """Evaluate the raw and, if kept, the EMA weights on every validation image."""
    results: dict[str, Accuracy] = {}
    for which, model in s.state.weights().items():
        watched = s.consensus.watch(s.data.val, len(s.data.val), s.check)
        kept = s.sample_images.watch(watched, -(-s.data.val.num_images // s.processes.world))
        batches = s.log.track(kept, len(s.data.val), f"evaluate {which}")
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
        s.log.info(f"{which:<3}  {result}")


def note_results(s: Session, results: dict[str, Accuracy], epoch: int) -> dict[str, dict[str, Any]]:
    """Log the results of an epoch (from 0); return those that beat all before them."""
    found: dict[str, dict[str, Any]] = {}
    for which, result in results.items():
        counts = {key: value for key, value in asdict(result).items() if key != "seconds"}
        entry = {"top1": result.top1, "top5": result.top5, **counts, "epoch": epoch + 1, "update": s.state.update}
        best = s.state.note_result(which, entry)
        s.log.result(which, result, epoch, s.state.update, best)
        if best:
            found[which] = entry
    return found


def describe_best(s: Session) -> str:
    """Return the best results in a few words, the recipe's own first."""
    headline = s.cfg.RECIPE.HEADLINE
    ordered = sorted(s.state.best.items(), key=lambda item: item[0] != headline)
    found = (f"{which} top-1 {best['top1']:.3f} (epoch {best['epoch']})" for which, best in ordered)
    return ", ".join(found) or "none yet"


def announce(s: Session, with_memory: bool = False) -> None:
    """Say what is about to happen, derived values included."""
    memory = estimate_memory(s.cfg, s.state, s.precision) if with_memory and s.processes.main else None
    for label, text in summarize(s.cfg, s.state, s.data, s.processes.launcher, s.processes.device, s.run.path, memory):
        s.log.info(f"{label:<12}{text}")
    for note in s.data.notes:
        s.log.warning(note)


if __name__ == "__main__":
    sys.exit(main())
