"""Training loop: an update from its micro-batches, an epoch from its updates."""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import get_total_norm

from engine.batch_norm import RunningStatistics
from engine.batch_plan import BatchPlan
from engine.default_generators import seed_default_generators
from engine.distributed.processes import Processes
from engine.loss import Criterion
from engine.optim.clip_and_step import clip_and_step
from engine.optim.skipped_updates import ConsecutiveSkips, DivergedError, gradient_seed
from engine.precision import Precision
from engine.state import TrainState


@dataclass(frozen=True)
class StepMetrics:
    """Metrics of one logging step; means and rates over the updates since the logging step before."""

    epoch: int
    update: int  # updates done in the run
    update_in_epoch: int
    loss: float  # mean of the finite ones
    epoch_loss: float  # mean since the epoch began
    grad_norm: float  # mean over the updates that were not skipped
    lr: float
    images_per_s: float
    data_share: float  # share of the time spent waiting for the loader
    skipped: int = 0  # updates whose loss or gradient was not finite
    skipped_in_run: int = 0
    overflows_in_run: int = 0  # updates skipped because scaled fp16 gradients overflowed


@dataclass
class Loop:
    """Parts of the training loop besides the state that it changes.

    `model` is the state's model, possibly wrapped for gradient exchange. `prepare(batch, update, micro, epoch)` turns a
    loader's batch into (images, soft targets) on the device, `update` counting from the start of the run. `criterion(outputs,
    targets, images)` is the loss.
    """

    model: nn.Module
    criterion: Criterion
    prepare: Callable[[Any, int, int, int], tuple[Tensor, Tensor]]
    precision: Precision
    processes: Processes
    clip_grad: float
    seed: int
    log_every: int
    eval_mode: bool = False  # train the model in evaluation mode
    max_skipped: int = 10  # consecutive skipped updates that end the training
    on_batch: Callable[[Tensor, Tensor, int], None] | None = None  # called with each (images, targets, update)
    losses: Tensor | None = None  # of the last max_skipped + 1 updates by micro-batch, 0 for those of other processes

    def train_epoch(
        self,
        state: TrainState,
        batches: Iterable[Any],
        log_step: Callable[[StepMetrics], None],
        after_update: Callable[[], None],
    ) -> None:
        """Run the epoch's remaining updates on this process's micro-batches, in order.

        Calls `log_step` on logging steps, the only ones that wait for the device, and `after_update` after every update.
        Raises DivergedError after `max_skipped` consecutive skipped updates (engine/optim/skipped_updates.py).
        """
        self.model.train(not self.eval_mode)
        state.schedule.begin_epoch(state.epoch)
        state.move_counts(self.processes.device)
        plan, iterator = state.plan, iter(batches)
        statistics = RunningStatistics(state.model, plan.accumulation, self.processes, frozen=self.eval_mode)
        epoch, consecutive_skips = state.epoch, ConsecutiveSkips()
        since, before, waited = time.perf_counter(), state.update, 0.0
        while state.update < (epoch + 1) * plan.updates_per_epoch:
            waited += self._train_update(state, iterator, statistics)
            done = state.update - epoch * plan.updates_per_epoch
            skips = consecutive_skips.read(state.skips)
            if done == plan.updates_per_epoch:
                skips = max(skips, int(state.skips.consecutive))
            if skips >= self.max_skipped:
                raise self._diverged(state)
            if done % self.log_every == 0 or done == plan.updates_per_epoch:
                seconds = time.perf_counter() - since
                log_step(self._step_metrics(state, epoch, (state.update - before) / seconds, waited / seconds))
                state.sums.begin_logging()
                since, before, waited = time.perf_counter(), state.update, 0.0
            if done == plan.updates_per_epoch:
                state.sums.begin_epoch()
            after_update()

    def _train_update(self, state: TrainState, batches: Iterator[Any], statistics: RunningStatistics) -> float:
        """Do one update; return the seconds spent waiting for the loader."""
        plan, waited = state.plan, 0.0
        loss_sum = torch.zeros((), device=self.processes.device)
        state.schedule.set(state.update)
        statistics.begin()
        micro_batches = plan.micro_batches()
        for micro in micro_batches:
            started = time.perf_counter()
            batch = next(batches)
            waited += time.perf_counter() - started
            images, targets = self.prepare(batch, state.update, micro, state.epoch)
            if self.on_batch is not None:
                self.on_batch(images, targets, state.update)
            seed_default_generators(self.seed, state.update, micro)
            with self._exchange(last=micro == micro_batches[-1]):
                with self.precision.autocast():
                    loss = self.criterion(self.model(images), targets, images) / plan.accumulation
                statistics.after_forward()
                state.scaler.scale(loss).backward(gradient_seed(loss))
            statistics.after_backward()
            loss_sum += loss.detach()
            losses = self._losses(plan)
            losses[state.update % len(losses), micro] = loss.detach() * plan.accumulation
        self._apply_gradients(state, loss_sum, statistics)
        return waited

    def _apply_gradients(self, state: TrainState, loss: Tensor, statistics: RunningStatistics) -> None:
        """Change the state by the gradients of an update, unless they are not finite; `loss` is the update's on this process."""
        state.scaler.unscale_(state.optimizer)
        norm = get_total_norm([p.grad for p in state.model.parameters() if p.grad is not None])
        is_finite = norm.isfinite()
        skipped = state.skips.count(is_finite, self._is_overflow(state, loss))
        clip_and_step(is_finite, state.optimizer, norm, self.clip_grad)
        state.scaler.update()
        state.optimizer.zero_grad(set_to_none=True)
        state.sums.add(loss, norm, skipped)
        statistics.end(is_finite)
        if state.ema:
            state.ema.update_if(is_finite, state.model)
        state.update += 1

    def _is_overflow(self, state: TrainState, loss: Tensor) -> Tensor:
        """Return True if loss scaling can be the cause of a gradient that is not finite: the losses of all processes are finite."""
        if not state.scaler.is_enabled():
            return torch.zeros_like(loss, dtype=torch.bool)
        not_finite = self.processes.sum((~loss.isfinite()).float())
        return (not_finite == 0) & (state.scaler.scale(torch.ones_like(loss)) > 1)

    def _losses(self, plan: BatchPlan) -> Tensor:
        if self.losses is None:
            self.losses = torch.zeros(
                self.max_skipped + 1, plan.accumulation * plan.world, device=self.processes.device
            )
            self.losses[:, plan.rank :: plan.world] = math.nan  # unknown for updates before this start of the run
        return self.losses

    def _diverged(self, state: TrainState) -> DivergedError:
        """Return the error of too many skips; waits for the device, which may be an update further than ConsecutiveSkips."""
        consecutive, last_update = int(state.skips.consecutive), state.update
        if consecutive < self.max_skipped:  # the update after the limit was reached was finite
            consecutive, last_update = self.max_skipped, state.update - 1
        return DivergedError(
            f"{consecutive} updates in a row (TRAIN.MAX_SKIPPED={self.max_skipped}) had a loss or a gradient that is not finite, "
            f"the last one update {last_update}",
            consecutive=consecutive,
            last_update=last_update,
        )

    def _step_metrics(self, state: TrainState, epoch: int, updates_per_s: float, data_share: float) -> StepMetrics:
        """Return the metrics of a logging step; waits for the device."""
        since_epoch, since_logging = state.sums.read(self.processes)
        skips = state.skips.read()
        return StepMetrics(
            epoch=epoch,
            update=state.update,
            update_in_epoch=state.update - epoch * state.plan.updates_per_epoch,
            loss=since_logging.mean_loss,
            epoch_loss=since_epoch.mean_loss,
            grad_norm=since_logging.mean_grad_norm,
            lr=max(group["lr"] for group in state.optimizer.param_groups),
            images_per_s=updates_per_s * state.plan.global_batch,
            data_share=data_share,
            skipped=round(since_logging.skipped),
            skipped_in_run=skips.in_run,
            overflows_in_run=skips.overflows,
        )

    def _exchange(self, last: bool) -> AbstractContextManager:
        """Return the context that exchanges gradients between processes after the last micro-batch only."""
        if isinstance(self.model, DistributedDataParallel) and not last:
            return self.model.no_sync()
        return nullcontext()
