"""Everything that changes while a run trains, and how it is stored and restored."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from engine.batch_plan import BatchPlan
from engine.distributed.processes import Processes
from engine.optim.backends import align_state
from engine.optim.ema import ModelEma
from engine.optim.lr_schedule import Schedule

# Of an optimiser's group: what the config says, and how the device lets it be computed.
SETTINGS = (
    *("lr", "initial_lr", "lr_scale", "weight_decay", "betas", "eps", "momentum"),
    *("fused", "foreach", "capturable"),
)


@dataclass
class TrainState:
    """Weights, averaged weights, optimiser, scaler, position and best results of a run.

    The learning rate, the order of the samples and everything random are functions of the position (`update`), so restoring
    it restores them.
    """

    model: nn.Module
    ema: ModelEma | None
    optimizer: torch.optim.Optimizer
    schedule: Schedule
    scaler: torch.amp.GradScaler
    plan: BatchPlan
    update: int = 0  # updates done
    closed: int = 0  # updates done at the last end of an epoch whose evaluation is done too
    best: dict[str, dict[str, Any]] = field(
        default_factory=dict
    )  # by "raw" and "ema": top1, correct1, images, epoch, update
    # Since the epoch began, then since the last report, summed over updates: finite losses, their number, finite gradient
    # norms, their number, updates, skipped ones.
    sums: Tensor = field(default_factory=lambda: torch.zeros(2, 6, dtype=torch.float64))
    skips: Tensor = field(default_factory=lambda: torch.zeros(3, dtype=torch.int64))  # in a row, in the run, overflows
    rollbacks: int = 0  # times the run went back to a checkpoint after too many in a row

    @property
    def epoch(self) -> int:
        """The epoch that the next update belongs to, from 0."""
        return self.update // self.plan.updates_per_epoch

    @property
    def update_in_epoch(self) -> int:
        """The number of the next update in its epoch, from 0."""
        return self.update % self.plan.updates_per_epoch

    @property
    def between_epochs(self) -> bool:
        """Whether an epoch's updates are done and its evaluation is not."""
        return self.update > self.closed and not self.update_in_epoch

    @property
    def trained(self) -> bool:
        """Whether no update is left."""
        return self.update >= self.plan.updates

    @property
    def complete(self) -> bool:
        """Whether nothing is left to do."""
        return self.trained and not self.between_epochs

    def weights(self) -> dict[str, nn.Module]:
        """Return the models to evaluate, by name: raw, and ema if it is kept."""
        return {"raw": self.model} | ({"ema": self.ema.module} if self.ema else {})

    def note_result(self, which: str, result: dict[str, Any]) -> bool:
        """Keep a result if it beats the best of these weights; return whether it did."""
        better = which not in self.best or result["correct1"] > self.best[which]["correct1"]
        if better:
            self.best[which] = result
        return better

    def mean_sums(self, processes: Processes) -> Tensor:
        """Return `sums`, averaged over the processes."""
        return processes.sum(self.sums.to(processes.device, copy=True)).div_(
            processes.world
        )  # NCCL takes no CPU tensor

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
            "sums": self.mean_sums(processes).cpu(),
            "skips": self.skips.cpu(),
            "rollbacks": self.rollbacks,
        }

    def load_state_dict(self, state: dict[str, Any], source: str) -> None:
        """Continue from a stored state. Raises ValueError if it is of another model, batch, data set or optimiser."""
        for key, here in (("global_batch", self.plan.global_batch), ("updates_per_epoch", self.plan.updates_per_epoch)):
            if state[key] != here:
                remedy = "TRAIN.GLOBAL_BATCH" if key == "global_batch" else "the data set"
                raise ValueError(
                    f"{source} was written with {key.replace('_', ' ')} {state[key]}, this run has {here}; "
                    f"set {remedy} back, or start a new run from its weights with --init"
                )
        if (state["ema"] is None) != (self.ema is None):
            raise ValueError(
                f"{source} {'lacks' if self.ema else 'has'} EMA weights but EMA.DECAY says otherwise; set it as it was"
            )
        try:
            self.model.load_state_dict(state["model"])
            if self.ema:
                self.ema.module.load_state_dict(state["ema"])
        except RuntimeError as error:
            first = " ".join(line.strip() for line in str(error).splitlines()[:3])
            raise ValueError(f"{source} was written by another model: {first[:400]}") from error
        own_name = optimizer_name(self.optimizer)
        if (name := state.get("optimizer_name", own_name)) != own_name:
            raise ValueError(
                f"{source} was written with the optimiser {name}, OPTIM.NAME makes {own_name}; set it back, or start a new run "
                "from its weights with --init"
            )
        # The config rules over what the checkpoint's optimiser was set to; within a run they agree.
        # What it lacks another backend had no use for.
        stored, own = state["optimizer"], self.optimizer.state_dict()["param_groups"]
        groups = [
            {**here, **group, **{key: here[key] for key in SETTINGS if key in here}, "params": group["params"]}
            for group, here in zip(stored["param_groups"], own, strict=False)
        ]
        if len(groups) == len(stored["param_groups"]):
            stored = {**stored, "param_groups": groups}
        try:
            self.optimizer.load_state_dict(stored)
            align_state(self.optimizer)
        except ValueError as error:
            raise ValueError(
                f"{source} was written with another optimiser or other parameter groups: {error}"
            ) from error
        if state["scaler"] and self.scaler.is_enabled():
            self.scaler.load_state_dict(state["scaler"])
        self.update, self.best = state["update"], state["best"]
        self.closed = state.get("closed", self.update - self.update_in_epoch)  # format 1 closed an epoch at once
        sums = state["sums"]
        if state["format"] == 1:  # losses were all counted, and skipped updates ended the run
            sums = torch.stack([*sums.T[[0, 3, 1, 2, 3]], torch.zeros(2, dtype=sums.dtype)], dim=1)
        self.sums = sums.to(self.sums.device)
        self.skips = state.get("skips", torch.zeros(3, dtype=torch.int64)).to(self.skips.device)
        self.rollbacks = state.get("rollbacks", 0)


def optimizer_name(optimizer: torch.optim.Optimizer) -> str:
    """Return whose state an optimiser's is, whichever backend computes it."""
    return str(getattr(optimizer, "stored_as", type(optimizer).__name__))
