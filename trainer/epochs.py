"""Epochs of a run: training with checkpoints, votes and rollback, then evaluation and saving."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch

from data.loaders.batch import BadImage
from engine.loop import StepMetrics
from engine.optim.skipped_updates import DivergedError
from trainer.rollback import roll_back
from trainer.session import Session
from trainer.validation import evaluate_raw_and_ema, find_failure, log_results


def train_epoch(s: Session) -> None:
    """Train the remaining updates of the epoch; roll back to the last good checkpoint if they diverge."""
    state, plan, log, every = s.state, s.state.plan, s.log, s.cfg.CHECKPOINT.EVERY_UPDATES

    def log_step(step: StepMetrics) -> None:
        log.step(step, plan.epochs, plan.updates_per_epoch)
        log_bad_images(s)

    def after_update() -> None:
        if s.compilation:
            s.compilation.after_update(log.info, log.warning)
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
        roll_back(error, state, s.loop, s.data.sampler, s.processes, run=s.run, log=log, saver=s.saver)
        save(s)
        s.saver.wait()  # once the rollback is stored, a killed run cannot roll back a second time
        log.reopen(s.run.path, s.open_log)
    log.end_epoch()


def end_epoch(s: Session) -> None:
    """Evaluate after an epoch, keep the best weights and save.

    Saves before the evaluation too, which fails at a validation image that cannot be read. Raises NotFiniteError if the last
    evaluation of the headline weights is not finite; the next start repeats it.
    """
    state = s.state
    epoch = state.update // state.plan.updates_per_epoch - 1
    new_best: dict[str, Any] = {}
    if (epoch + 1) % s.cfg.EVAL.EVERY == 0 or state.trained:
        save(s)
        results = evaluate_raw_and_ema(s)
        new_best = log_results(s, results, epoch)
        if state.trained and (failure := find_failure(s, results)):
            save(s, new_best)
            raise failure
        if s.sample_images.is_due(epoch + 1, state.trained):
            s.sample_images.draw(state.weights()[s.cfg.RECIPE.HEADLINE], s.precision, epoch + 1, state.update)
    state.closed = state.update
    save(s, new_best)


def save(s: Session, new_best: Mapping[str, Mapping[str, Any]] | None = None) -> None:
    """Store the whole state and the new best weights; called by all processes."""
    s.saver.save(s.state, s.processes, s.metadata(), new_best or {})


def log_bad_images(s: Session) -> None:
    """Log the training images that any process could not read since the last call; called by all processes."""
    new = s.data.bad.take_new()
    if not s.processes.sum(torch.tensor(float(len(new)), device=s.processes.device)):
        return
    found = [[BadImage(**bad) for bad in own] for own in s.processes.from_all([asdict(bad) for bad in new])]
    for bad in s.data.bad.add(found, s.run.path if s.processes.main else None, s.log.warning):
        s.log.warning(f"{bad.path} {bad.reason}; training on {bad.replaced_by} instead")
