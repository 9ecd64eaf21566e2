"""Train a model, or continue a run: the table of contents.

    python train.py --cfg configs/groupmixformer/mobile_64.yaml --data-path DIR
    torchrun --nproc_per_node 8 train.py --cfg configs/groupmixformer/tiny_224.yaml --data-path DIR

The run directory is <output>/<name>; the same command continues the run from its last checkpoint.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: threads that spin take the loader's cores

from engine.distributed.signals import ENDED, PREEMPTED, PreemptedError, StopSignals

INTERRUPTION = StopSignals()
if __name__ == "__main__":
    INTERRUPTION.listen()  # before torch too, whose import takes seconds

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from yacs.config import CfgNode

import config
from config import command_line
from data.loaders.decode import UnreadableImageError
from engine.checkpoint.async_saver import AsyncSaver, SavingError
from engine.checkpoint.run_directory import RunDirectory, RunLockedError
from engine.distributed.elastic import Elastic, prevent_restarts
from engine.distributed.processes import (
    Processes,
    abort,
    exit_on_failure,
    init_processes,
    is_lost_connection,
    shut_down,
)
from engine.evaluate import NotFiniteError
from engine.logging.log import Log
from engine.optim.skipped_updates import DivergedError
from trainer.epochs import end_epoch, train_epoch
from trainer.session import Session, build_session
from trainer.stopping import describe_position, finish_saving, stop_early, write_marker
from trainer.summary import log_summary
from trainer.validation import describe_best, evaluate_only


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = command_line.train_parser()
    args = parser.parse_args(argv)
    try:
        cfg = command_line.resolve(args, command_line.TRAIN_FLAGS)
    except ValueError as error:
        try:
            parser.fail(error)
        finally:
            prevent_restarts()
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
    """Train, evaluate or summarize as the command line asks; return the exit status, or raise SystemExit after a failure."""
    session, log = None, Log(processes.main, dali=cfg.DATA.LOADER == "dali")
    for note in elastic.notes(cfg.CHECKPOINT.EVERY_UPDATES):
        log.warning(note)
    run = RunDirectory(Path(cfg.OUTPUT) / config.run_name(cfg), cfg.CHECKPOINT.KEEP)
    saver = AsyncSaver(run, log, cfg.CHECKPOINT.MAX_FAILURES)
    try:
        session = build_or_fail(parser, cfg, args, processes, run=run, log=log, saver=saver)
        if not (args.dry_run or args.eval):
            return train(session)
        log_summary(session, with_memory=True) if args.dry_run else evaluate_only(session)
        return 0
    except (DivergedError, NotFiniteError, SavingError, UnreadableImageError) as error:
        try:
            parser.stop(error, processes.name)
        finally:
            prevent_restarts()
    except KeyboardInterrupt:
        log.warning("interrupted; the same command continues from the last checkpoint, if one is saved")
        return ENDED
    except PreemptedError:
        log.warning("interrupted")
        return PREEMPTED
    except RuntimeError as error:
        if processes.world == 1 or not is_lost_connection(error):
            raise
        cause = f"{str(error).splitlines()[0][:200]}. One has ended or waits for something else"
        remedy = "see its log; the same command continues from the last checkpoint, if one is saved"
        parser.stop(RuntimeError(f"lost the others {describe_position(session)}: {cause}, {remedy}"), processes.name)
    finally:
        saver.wait()
        log.close()
        run.unlock()


def build_or_fail(
    parser: command_line.Parser,
    cfg: CfgNode,
    args: argparse.Namespace,
    processes: Processes,
    *,
    run: RunDirectory,
    log: Log,
    saver: AsyncSaver,
) -> Session:
    """Build the session, or end the process with the message of an error that the user can correct."""
    try:
        if args.dry_run:
            run.check_writable()
        return build_session(
            cfg, args, processes, run=run, log=log, saver=saver, interrupted=lambda: INTERRUPTION.received is not None
        )
    except RunLockedError as error:
        parser.fail(error, processes.name)
    except ValueError as error:
        try:
            parser.fail(error, processes.name)
        finally:
            prevent_restarts()


def train(s: Session) -> int:
    """Train the remaining epochs, or save and stop early after a stop signal; return the exit status."""
    if s.state.complete:
        s.log.info(f"{s.run.path} is complete: {s.state.plan.epochs} epochs, best {describe_best(s)}")
    else:
        INTERRUPTION.defer()
        log_summary(s)
        s.sample_images.draw_first_batch(s.loop, s.state)
        try:
            s.check(s.consensus.agree())
            while not s.state.complete:
                (end_epoch if s.state.between_epochs else train_epoch)(s)
            finish_saving(s)
        except PreemptedError:
            return stop_early(s, INTERRUPTION)
        s.log.info(f"done: best {describe_best(s)}; the run lies in {s.run.path}")
    if s.processes.main and not s.run.done.exists():
        write_marker(s, s.run.done, f"after update {s.state.update}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
