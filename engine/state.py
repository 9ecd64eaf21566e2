"""Training state: everything that changes while a run trains, stored in and restored from checkpoints."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from engine import running_sums
from engine.batch_plan import BatchPlan
from engine.checkpoint.contents import RESULT
from engine.distributed.processes import Processes
from engine.optim.backends import align_state
from engine.optim.ema import ModelEma
from engine.optim.schedules import Schedules
from engine.optim.skipped_updates import SkipCounts
from engine.running_sums import RunningSums

# Entries of a parameter group that the config and the device decide, not the checkpoint.
GROUP_SETTINGS = (
    *("lr", "initial_lr", "lr_scale", "weight_decay", "betas", "eps", "momentum"),
    *("fused", "foreach", "capturable"),
)
# Entries of the state of the optimisers that have fused kernels, which check neither shapes nor the number of values.
MOMENTS = {
    "Adam": ("exp_avg", "exp_avg_sq"),
    "AdamW": ("exp_avg", "exp_avg_sq"),
    "NAdam": ("exp_avg", "exp_avg_sq"),
    "Lamb": ("exp_avg", "exp_avg_sq"),
    "SGD": ("momentum_buffer",),
    "Adagrad": ("sum",),
}
# Entries without which a run cannot continue.
NEEDED = (
    *("format", "model", "ema", "optimizer", "scaler", "update", "global_batch", "updates_per_epoch", "best", "sums"),
)


@dataclass
class TrainState:
    """Weights, averaged weights, optimiser, scaler, position and best results of a run.

    The learning rate, the order of the samples and all random numbers are functions of the position (`update`), so restoring
    it restores them.
    """

    model: nn.Module
    ema: ModelEma | None
    optimizer: torch.optim.Optimizer
    schedule: Schedules
    scaler: torch.amp.GradScaler
    plan: BatchPlan
    update: int = 0  # updates done
    closed: int = 0  # updates done at the end of the last epoch whose evaluation is done too
    # By "raw" and "ema": top1, correct1, images, epoch, update.
    best: dict[str, dict[str, Any]] = field(default_factory=dict)
    sums: RunningSums = field(default_factory=RunningSums)
    skips: SkipCounts = field(default_factory=SkipCounts)
    rollbacks: int = 0  # returns of the run to an earlier checkpoint after too many consecutive skips

    @property
    def epoch(self) -> int:
        """Return the epoch of the next update, from 0."""
        return self.update // self.plan.updates_per_epoch

    @property
    def update_in_epoch(self) -> int:
        """Return the number of the next update in its epoch, from 0."""
        return self.update % self.plan.updates_per_epoch

    @property
    def between_epochs(self) -> bool:
        """Return True if an epoch's updates are done and its evaluation is not."""
        return self.update > self.closed and not self.update_in_epoch

    @property
    def trained(self) -> bool:
        """Return True if no update is left."""
        return self.update >= self.plan.updates

    @property
    def complete(self) -> bool:
        """Return True if no update and no evaluation is left."""
        return self.trained and not self.between_epochs

    def weights(self) -> dict[str, nn.Module]:
        """Return the models to evaluate, by name: raw, and ema if it is kept."""
        return {"raw": self.model} | ({"ema": self.ema.module} if self.ema else {})

    def note_result(self, which: str, result: dict[str, Any]) -> bool:
        """Keep a result of raw or EMA weights if it exceeds the best one so far; return True if it does.

        A result whose loss is not finite is never kept.
        """
        if not math.isfinite(result.get("loss", 0.0)):
            return False
        better = which not in self.best or result["correct1"] > self.best[which]["correct1"]
        if better:
            self.best[which] = result
        return better

    def move_counts(self, device: torch.device) -> None:
        """Move the running sums and skip counts to a device."""
        self.sums, self.skips = self.sums.to(device), self.skips.to(device)

    def state_dict(self, processes: Processes) -> dict[str, Any]:
        """Return tensors and plain values only, so that the file needs no unpickling of code. Called by all processes."""
        return {
            "model": self.model.state_dict(),
            "ema": self.ema.module.state_dict() if self.ema else None,
            "optimizer": self.optimizer.state_dict(),
            "optimizer_name": optimizer_name(self.optimizer),
            "scaler": self.scaler.state_dict(),
            "update": self.update,
            "closed": self.closed,
            "samples": self.update * self.plan.global_batch,
            "global_batch": self.plan.global_batch,
            "updates_per_epoch": self.plan.updates_per_epoch,
            "best": self.best,
            "sums": self.sums.mean(processes).cpu(),
            "skips": self.skips.tensor.cpu(),
            "rollbacks": self.rollbacks,
        }

    def load_state_dict(self, stored: Mapping[str, Any], file: str) -> None:
        """Continue from a stored state. Raises ValueError if it is of another model, batch, data set or optimiser, or incomplete."""
        if missing := [key for key in NEEDED if key not in stored]:
            raise ValueError(
                f"{file} holds no {missing[0]}, it is no state of a run; start from its weights with --init"
            )
        try:
            self._load(stored, file)
        except (KeyError, TypeError, AttributeError, IndexError, RuntimeError, OverflowError) as error:
            first = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise ValueError(
                f"{file} holds a state that does not fit this run ({type(error).__name__}: {first[:160]}); continue from another "
                "checkpoint, or start from its weights with --init"
            ) from error

    def _load(self, stored: Mapping[str, Any], file: str) -> None:
        if stored["format"] == 1:
            stored = from_format_1(stored)
        if any(key not in result for result in stored["best"].values() for key in RESULT):
            raise ValueError(
                f"{file} holds a best result without {', '.join(RESULT)}; continue from another checkpoint"
            )
        self._check_batches(stored, file)
        self._check_ema(stored, file)
        self._load_weights(stored, file)
        self._check_optimizer(stored, file)
        self._load_optimizer(stored["optimizer"], file)
        if stored["scaler"] and self.scaler.is_enabled():
            self.scaler.load_state_dict(stored["scaler"])
        self._load_position(stored)

    def _check_batches(self, stored: Mapping[str, Any], file: str) -> None:
        for key, here in (("global_batch", self.plan.global_batch), ("updates_per_epoch", self.plan.updates_per_epoch)):
            if stored[key] != here:
                remedy = "TRAIN.GLOBAL_BATCH" if key == "global_batch" else "the data set"
                raise ValueError(
                    f"{file} was written with {key.replace('_', ' ')} {stored[key]}, this run has {here}; "
                    f"set {remedy} back, or start a new run from its weights with --init"
                )

    def _check_ema(self, stored: Mapping[str, Any], file: str) -> None:
        if (stored["ema"] is None) != (self.ema is None):
            lacks = self.ema is not None
            raise ValueError(
                f"{file} {'lacks' if lacks else 'has'} EMA weights, this run {'keeps' if lacks else 'does not keep'} them; set "
                "EMA.DECAY back"
            )

    def _load_weights(self, stored: Mapping[str, Any], file: str) -> None:
        try:
            self.model.load_state_dict(stored["model"])
            if self.ema:
                self.ema.module.load_state_dict(stored["ema"])
        except RuntimeError as error:
            first = " ".join(line.strip() for line in str(error).splitlines()[:3])
            raise ValueError(f"{file} was written by another model: {first[:400]}") from error

    def _check_optimizer(self, stored: Mapping[str, Any], file: str) -> None:
        own_name = optimizer_name(self.optimizer)
        if (name := stored.get("optimizer_name", own_name)) != own_name:
            raise ValueError(
                f"{file} was written with the optimiser {name}, OPTIM.NAME makes {own_name}; set it back, or start a new run "
                "from its weights with --init"
            )

    def _load_optimizer(self, stored: dict[str, Any], file: str) -> None:
        """Load the optimiser's state; GROUP_SETTINGS stay as they are here, as do entries that another backend did not store."""
        own = self.optimizer.state_dict()["param_groups"]
        groups = [
            {**here, **_counts_of(group, here), "params": group["params"]}
            for group, here in zip(stored["param_groups"], own, strict=False)
        ]
        if len(groups) == len(stored["param_groups"]):
            stored = {**stored, "param_groups": groups}
        self._check_moments(stored["state"], file)
        try:
            self.optimizer.load_state_dict(stored)
            align_state(self.optimizer)
        except ValueError as error:
            raise ValueError(f"{file} was written with another optimiser or other parameter groups: {error}") from error

    def _check_moments(self, stored: Mapping[int, Mapping[str, Any]], file: str) -> None:
        """Raise ValueError if stored moments have other shapes than their parameters: fused kernels would read beyond them."""
        weights = [weight for group in self.optimizer.param_groups for weight in group["params"]]
        moments = MOMENTS.get(optimizer_name(self.optimizer))
        if moments is None:  # of timm's others, which are written in Python: they check shapes
            return
        for index, entry in stored.items():
            shape = weights[index].shape if 0 <= index < len(weights) else None
            wrong = [key for key in moments if entry and key not in entry]
            wrong += [key for key, value in entry.items() if not _is_moment(key, value, shape, key in moments)]
            if wrong or shape is None:
                raise ValueError(
                    f"{file} holds a state of the optimiser for parameter {index} that does not fit it ({str(wrong)[1:60]}); "
                    "continue from another checkpoint, or start from its weights with --init"
                )

    def _load_position(self, stored: Mapping[str, Any]) -> None:
        """Load position, best results and counts; entries that the first files of format 2 lack have their initial values."""
        self.update, self.best = stored["update"], stored["best"]
        self.closed = stored.get("closed", self.update - self.update_in_epoch)
        self.sums = RunningSums(stored["sums"]).to(self.sums.tensor.device)
        self.skips = SkipCounts(stored.get("skips")).to(self.skips.tensor.device)
        self.rollbacks = stored.get("rollbacks", 0)
        if self.update:  # as the last update left it; no other may follow before the state is stored again
            self.schedule.set(self.update - 1)


def _is_moment(key: str, value: Any, shape: torch.Size | None, full: bool) -> bool:
    """Return True for a tensor of a parameter's shape, unless it must be `full` also for a single number; None for SGD's first."""
    if not isinstance(value, Tensor):
        return value is None and key == "momentum_buffer"
    return value.is_floating_point() and (value.shape == shape or (not full and value.shape in ((), (1,))))


def _counts_of(group: Mapping[str, Any], here: Mapping[str, Any]) -> dict[str, Any]:
    """Return the numbers that an optimiser counts in a stored parameter group; all that the config decides stays as it is here."""
    kept = {key: value for key, value in group.items() if key not in GROUP_SETTINGS and type(value) in (int, float)}
    kept = {key: value for key, value in kept.items() if key == "step" or type(here.get(key)) is type(value)}
    step = group.get("step")
    return {**kept, "step": step} if isinstance(step, Tensor) and step.numel() == 1 else kept


def from_format_1(stored: Mapping[str, Any]) -> dict[str, Any]:
    """Return a stored state of format 1 in the form of format 2: its running sums have other columns."""
    return {**stored, "format": 2, "sums": running_sums.from_format_1(stored["sums"])}


def optimizer_name(optimizer: torch.optim.Optimizer) -> str:
    """Return the name under which an optimiser's state is stored, the same for all backends of an optimiser."""
    return str(getattr(optimizer, "stored_as", type(optimizer).__name__))
