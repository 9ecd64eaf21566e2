"""The training loop: an update from its micro-batches, an epoch from its updates."""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from engine.batchnorm import RunningStatistics
from engine.distributed import Processes
from engine.precision import Precision
from engine.randomness import seed_process
from engine.state import TrainState


class DivergedError(RuntimeError):
    """The loss is no number any more; nothing worth saving comes after it."""


@dataclass(frozen=True)
class Step:
    """What a logging step reports; rates over the updates since the one before."""

    epoch: int
    update: int  # updates done in the run
    update_in_epoch: int
    loss: float  # mean since the last report
    epoch_loss: float  # mean since the epoch began
    grad_norm: float
    lr: float
    images_per_s: float
    data_share: float  # share of the time spent waiting for the loader


@dataclass
class Loop:
    """The parts that an update needs besides the state it changes.

    `model` is the state's model, possibly wrapped for gradient exchange. `prepare(batch, update, micro, epoch)` turns a
    loader's batch into (images, soft targets) on the device, `update` counting from the start of the run.
    """

    model: nn.Module
    criterion: nn.Module
    prepare: Callable[[Any, int, int, int], tuple[Tensor, Tensor]]
    precision: Precision
    processes: Processes
    clip_grad: float
    seed: int
    log_every: int

    def train_epoch(
        self,
        state: TrainState,
        batches: Iterable[Any],
        report: Callable[[Step], None],
        after_update: Callable[[], None],
    ) -> None:
        """Run the epoch's remaining updates on this process's micro-batches, in order.

        Raises DivergedError if a reported loss is not finite. Calls `report` on logging steps (the only ones that wait for the device) and `after_update` after every update.
        """
        self.model.train()
        plan, stream = state.plan, iter(batches)
        statistics = RunningStatistics(state.model, plan.accumulation, self.processes)
        epoch, state.sums = state.epoch, state.sums.to(self.processes.device)
        since, before, waited = time.perf_counter(), state.update, 0.0
        while state.update < (epoch + 1) * plan.updates_per_epoch:
            waited += self._train_update(state, stream, statistics)
            done = state.update - epoch * plan.updates_per_epoch
            if done % self.log_every == 0 or done == plan.updates_per_epoch:
                epoch_loss, _, loss, norm = state.mean_sums(self.processes).tolist()
                seconds, window = time.perf_counter() - since, done % self.log_every or self.log_every
                report(
                    Step(
                        epoch=epoch,
                        update=state.update,
                        update_in_epoch=done,
                        loss=loss / window,
                        epoch_loss=epoch_loss / done,
                        grad_norm=norm / window,
                        lr=max(group["lr"] for group in state.optimizer.param_groups),
                        images_per_s=(state.update - before) * plan.global_batch / seconds,
                        data_share=waited / seconds,
                    )
                )
                if not math.isfinite(loss):
                    raise DivergedError(
                        f"the loss is {loss} after update {state.update}; continue from the last checkpoint with a lower "
                        "OPTIM.LR, TRAIN.CLIP_GRAD, or TRAIN.AMP off"
                    )
                state.sums[2:] = 0
                since, before, waited = time.perf_counter(), state.update, 0.0
            if done == plan.updates_per_epoch:
                state.sums.zero_()
            after_update()

    def _train_update(self, state: TrainState, batches: Iterator[Any], statistics: RunningStatistics) -> float:
        """Do one update; return the seconds spent waiting for the loader."""
        plan, waited = state.plan, 0.0
        state.schedule.step_update(state.update)
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
                    loss = self.criterion(self.model(images), targets) / plan.accumulation
                state.scaler.scale(loss).backward()
            statistics.after_micro_batch()
            state.sums[::2] += loss.detach()
        state.scaler.unscale_(state.optimizer)
        norm = self._clip(state.model)
        state.scaler.step(state.optimizer)
        state.scaler.update()
        state.optimizer.zero_grad(set_to_none=True)
        state.sums[1::2] += norm
        statistics.end()
        if state.ema:
            state.ema.update(state.model)
        state.update += 1
        return waited

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
