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

from engine.batchnorm import RunningStatistics
from engine.distributed import Processes
from engine.precision import Precision
from engine.randomness import seed_process
from engine.state import TrainState


class DivergedError(RuntimeError):
    """The loss is no number any more; nothing worth saving comes after it."""


def check_finite(state: TrainState, sums: Tensor) -> None:
    """Raise DivergedError if a loss or, without loss scaling, a gradient since the epoch began was not finite."""
    if bool(sums[:, 0].isfinite().all()) and (state.scaler.is_enabled() or torch.equal(sums[:, 2], sums[:, 3])):
        return
    what = "a gradient" if bool(sums[:, 0].isfinite().all()) else "the loss"
    raise DivergedError(
        f"{what} is not finite any more, after update {state.update}; start another run from a good checkpoint with a "
        "milder recipe: --tag NEW --resume FILE --opts OPTIM.LR ..."
    )


@dataclass(frozen=True)
class Step:
    """What a logging step reports; rates over the updates since the one before."""

    epoch: int
    update: int  # updates done in the run
    update_in_epoch: int
    loss: float  # mean since the last report
    epoch_loss: float  # mean since the epoch began
    grad_norm: float  # mean since the last report, of the updates that loss scaling did not skip
    lr: float
    images_per_s: float
    data_share: float  # share of the time spent waiting for the loader


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

    def train_epoch(
        self,
        state: TrainState,
        batches: Iterable[Any],
        report: Callable[[Step], None],
        after_update: Callable[[], None],
    ) -> None:
        """Run the epoch's remaining updates on this process's micro-batches, in order.

        Calls `report` on logging steps (the only ones that wait for the device) and `after_update` after every update.
        Raises DivergedError if a reported loss or, without loss scaling, gradient is not finite.
        """
        self.model.train(not self.eval_mode)
        state.schedule.begin_epoch(state.epoch)
        plan, stream = state.plan, iter(batches)
        statistics = RunningStatistics(state.model, plan.accumulation, self.processes, frozen=self.eval_mode)
        epoch, state.sums = state.epoch, state.sums.to(self.processes.device)
        since, before, waited = time.perf_counter(), state.update, 0.0
        while state.update < (epoch + 1) * plan.updates_per_epoch:
            waited += self._train_update(state, stream, statistics)
            done = state.update - epoch * plan.updates_per_epoch
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
            seed_process(self.seed, state.update, micro)
            with self._exchange(last=micro == micro_batches[-1]):
                with self.precision.autocast():
                    loss = self.criterion(self.model(images), targets, images) / plan.accumulation
                state.scaler.scale(loss).backward()
            statistics.after_micro_batch()
            loss_sum += loss.detach()
        state.scaler.unscale_(state.optimizer)
        norm = self._clip(state.model)
        state.scaler.step(state.optimizer)
        state.scaler.update()
        state.optimizer.zero_grad(set_to_none=True)
        finite = norm.isfinite()
        state.sums += torch.stack([loss_sum, torch.where(finite, norm, 0.0), finite, torch.ones_like(norm)])
        statistics.end()
        if state.ema:
            state.ema.update(state.model)
        state.update += 1
        return waited

    def _step(self, state: TrainState, epoch: int, updates_per_s: float, data_share: float) -> Step:
        """Read what a report needs from the device."""
        sums = state.mean_sums(self.processes).cpu()
        check_finite(state, sums)
        (epoch_loss, _, _, done), (loss, norm, norms, updates) = sums.tolist()
        return Step(
            epoch=epoch,
            update=state.update,
            update_in_epoch=round(done),
            loss=loss / updates,
            epoch_loss=epoch_loss / done,
            grad_norm=norm / norms if norms else math.inf,
            lr=max(group["lr"] for group in state.optimizer.param_groups),
            images_per_s=updates_per_s * state.plan.global_batch,
            data_share=data_share,
        )

    def _clip(self, model: nn.Module) -> Tensor:
        """Limit the gradient's L2 norm to `clip_grad` (0: leave it); return the norm it had."""
        if self.clip_grad:
            return nn.utils.clip_grad_norm_(model.parameters(), self.clip_grad)
        return nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])

    def _exchange(self, last: bool) -> AbstractContextManager:
        """Return the context that exchanges gradients between processes after the last micro-batch only."""
        if isinstance(self.model, DistributedDataParallel) and not last:
            return self.model.no_sync()
        return nullcontext()
