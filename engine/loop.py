"""The training loop: an update from its micro-batches, an epoch from its updates."""

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

from common.rng import seed_default_generators
from engine.batch_norm import RunningStatistics
from engine.batch_plan import BatchPlan
from engine.distributed.processes import Processes
from engine.optim.clip_and_step import ConsecutiveSkips, DivergedError, clip_and_step, count_skipped, gradient_seed
from engine.precision import Precision
from engine.state import TrainState


@dataclass(frozen=True)
class StepMetrics:
    """What a logging step reports; rates over the updates since the one before."""

    epoch: int
    update: int  # updates done in the run
    update_in_epoch: int
    loss: float  # mean since the last report, of the finite ones
    epoch_loss: float  # mean since the epoch began
    grad_norm: float  # mean since the last report, of the updates that were not skipped
    lr: float
    images_per_s: float
    data_share: float  # share of the time spent waiting for the loader
    skipped: int = 0  # updates since the last report whose loss or gradient was not finite
    skipped_in_run: int = 0
    overflows_in_run: int = 0  # updates skipped because scaled fp16 gradients overflowed


@dataclass
class Loop:
    """The parts that an update needs besides the state it changes.

    `model` is the state's model, possibly wrapped for gradient exchange. `prepare(batch, update, micro, epoch)` turns a
    loader's batch into (images, soft targets) on the device, `update` counting from the start of the run. `criterion(outputs,
    targets, images)` is the loss.
    """

    model: nn.Module
    criterion: Callable[[Any, Tensor, Tensor], Tensor]
    prepare: Callable[[Any, int, int, int], tuple[Tensor, Tensor]]
    precision: Precision
    processes: Processes
    clip_grad: float
    seed: int
    log_every: int
    eval_mode: bool = False  # train the model in evaluation mode
    max_skipped: int = 10  # updates skipped in a row that end the training
    on_batch: Callable[[Tensor, Tensor, int], None] | None = None  # called with each (images, targets, update)
    losses: Tensor | None = None  # of the last max_skipped + 1 updates by micro-batch, 0 where another process ran it

    def train_epoch(
        self,
        state: TrainState,
        batches: Iterable[Any],
        report: Callable[[StepMetrics], None],
        after_update: Callable[[], None],
    ) -> None:
        """Run the epoch's remaining updates on this process's micro-batches, in order.

        Raises DivergedError after `max_skipped` skipped updates in a row (safety.py). Calls `report` on logging steps, the
        only ones that wait for the device, and `after_update` after every update.
        """
        self.model.train(not self.eval_mode)
        state.schedule.begin_epoch(state.epoch)
        plan, stream = state.plan, iter(batches)
        statistics = RunningStatistics(state.model, plan.accumulation, self.processes, frozen=self.eval_mode)
        epoch, row = state.epoch, ConsecutiveSkips()
        state.sums, state.skips = state.sums.to(self.processes.device), state.skips.to(self.processes.device)
        since, before, waited = time.perf_counter(), state.update, 0.0
        while state.update < (epoch + 1) * plan.updates_per_epoch:
            waited += self._train_update(state, stream, statistics)
            done = state.update - epoch * plan.updates_per_epoch
            skipped = row.read(state.skips)
            if done == plan.updates_per_epoch:
                skipped = max(skipped, int(state.skips[0]))
            if skipped >= self.max_skipped:
                raise self._diverged(state)
            if done % self.log_every == 0 or done == plan.updates_per_epoch:
                seconds = time.perf_counter() - since
                step = self._step(state, epoch, (state.update - before) / seconds, waited / seconds)
                report(step)
                state.sums[1] = 0
                since, before, waited = time.perf_counter(), state.update, 0.0
            if done == plan.updates_per_epoch:
                state.sums.zero_()
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
                with statistics.backward():
                    state.scaler.scale(loss).backward(gradient_seed(loss))
            statistics.after_micro_batch()
            loss_sum += loss.detach()
            losses = self._losses(plan)
            losses[state.update % len(losses), micro] = loss.detach() * plan.accumulation
        state.scaler.unscale_(state.optimizer)
        norm = get_total_norm([p.grad for p in state.model.parameters() if p.grad is not None])
        ok = norm.isfinite()
        skipped = count_skipped(state.skips, ok, self._overflow(state, loss_sum))
        clip_and_step(ok, state.optimizer, norm, self.clip_grad)
        state.scaler.update()
        state.optimizer.zero_grad(set_to_none=True)
        finite = loss_sum.isfinite()
        loss, norm = torch.where(finite, loss_sum, 0.0), torch.where(ok, norm, 0.0)
        state.sums += torch.stack([loss, finite, norm, ok, torch.ones_like(norm), skipped])
        statistics.end(ok)
        if state.ema:
            state.ema.move_if(ok, state.model)
        state.update += 1
        return waited

    def _overflow(self, state: TrainState, loss: Tensor) -> Tensor:
        """Return whether a gradient that is not finite is the work of loss scaling, by the losses of all processes."""
        if not state.scaler.is_enabled():
            return torch.zeros_like(loss, dtype=torch.bool)
        lost = self.processes.sum((~loss.isfinite()).float())
        return (lost == 0) & (state.scaler.scale(torch.ones_like(loss)) > 1)

    def _losses(self, plan: BatchPlan) -> Tensor:
        if self.losses is None:
            self.losses = torch.zeros(
                self.max_skipped + 1, plan.accumulation * plan.world, device=self.processes.device
            )
            self.losses[:, plan.rank :: plan.world] = math.nan  # not known, where the run was continued
        return self.losses

    def _diverged(self, state: TrainState) -> DivergedError:
        """Return the error of too many skipped updates; waits for the device, which may be an update further (Row)."""
        row, end = int(state.skips[0]), state.update
        if row < self.max_skipped:  # the update since was a good one
            row, end = self.max_skipped, state.update - 1
        return DivergedError(
            f"{row} updates in a row (TRAIN.MAX_SKIPPED={self.max_skipped}) had a loss or a gradient that is not finite, the last "
            f"one update {end}",
            row,
            end,
        )

    def _step(self, state: TrainState, epoch: int, updates_per_s: float, data_share: float) -> StepMetrics:
        """Read what a report needs from the device."""
        (epoch_loss, epoch_losses, *_), since = state.mean_sums(self.processes).tolist()
        loss, losses, norm, norms, _, skipped = since
        skips = state.skips.tolist()
        return StepMetrics(
            epoch=epoch,
            update=state.update,
            update_in_epoch=state.update - epoch * state.plan.updates_per_epoch,
            loss=loss / losses if losses else math.nan,
            epoch_loss=epoch_loss / epoch_losses if epoch_losses else math.nan,
            grad_norm=norm / norms if norms else math.inf,
            lr=max(group["lr"] for group in state.optimizer.param_groups),
            images_per_s=updates_per_s * state.plan.global_batch,
            data_share=data_share,
            skipped=round(skipped),
            skipped_in_run=skips[1],
            overflows_in_run=skips[2],
        )

    def _exchange(self, last: bool) -> AbstractContextManager:
        """Return the context that exchanges gradients between processes after the last micro-batch only."""
        if isinstance(self.model, DistributedDataParallel) and not last:
            return self.model.no_sync()
        return nullcontext()
