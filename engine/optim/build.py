"""Optimiser and schedules built from the config."""

from typing import Any

import torch
from timm.optim import create_optimizer_v2, get_optimizer_info
from timm.scheduler import create_scheduler_v2
from torch import nn
from yacs.config import CfgNode

from common.timeline import parse_optional
from engine.batch_plan import BatchPlan, scaled_lr
from engine.drop_path import DropPathSchedule, drop_path_setter
from engine.optim.apex import apex_optimizer
from engine.optim.backends import align_state, backend_settings
from engine.optim.ema import EmaDecaySchedule, ModelEma
from engine.optim.lr_schedule import LrSchedule
from engine.optim.param_groups import parameter_groups
from engine.optim.schedules import Schedules


def build_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """Return the optimiser of a model, with weight decay and layer decay by parameter group.

    Raises ValueError if OPTIM.BETAS has the wrong length or the backend is not available.
    """
    optim = cfg.OPTIM
    groups = parameter_groups(model, optim.WEIGHT_DECAY, optim.LAYER_DECAY)
    settings = _settings(cfg)
    lr = scaled_lr(optim.LR, cfg.TRAIN.GLOBAL_BATCH, optim.SCALE_BATCH)
    device = next(model.parameters()).device
    if optim.BACKEND == "apex":
        if device.type != "cuda":
            raise ValueError(f"OPTIM.BACKEND=apex runs on CUDA only, this run is on {device.type}; set it to auto")
        return apex_optimizer(optim.NAME, groups, lr, **settings)
    settings |= backend_settings(optim.NAME, optim.BACKEND, device)
    return align_state(create_optimizer_v2(groups, optim.NAME, lr=lr, weight_decay=0.0, **settings))


def _settings(cfg: CfgNode) -> dict[str, Any]:
    """Return the arguments betas, eps and momentum that the optimiser supports and the config sets."""
    optim, supported = cfg.OPTIM, supported_keys(cfg.OPTIM.NAME)
    settings: dict[str, Any] = {}
    if optim.BETAS and "OPTIM.BETAS" in supported:
        settings["betas"] = tuple(optim.BETAS)
        if len(optim.BETAS) != (count := get_optimizer_info(optim.NAME).num_betas):
            raise ValueError(f"OPTIM.BETAS={optim.BETAS}: {optim.NAME} has {count}; give as many, or [] for its own")
    if optim.EPS and "OPTIM.EPS" in supported:
        settings["eps"] = optim.EPS
    if "OPTIM.MOMENTUM" in supported:
        settings["momentum"] = optim.MOMENTUM
    return settings


def supported_keys(name: str) -> list[str]:
    """List those of OPTIM.BETAS, OPTIM.EPS and OPTIM.MOMENTUM that an optimiser of timm uses; the others have no effect."""
    info = get_optimizer_info(name)
    supported = {
        "OPTIM.BETAS": info.has_betas,
        "OPTIM.EPS": info.has_eps,
        "OPTIM.MOMENTUM": info.has_momentum,
    }
    return [key for key, has in supported.items() if has]


def build_learning_rate(cfg: CfgNode, optimizer: torch.optim.Optimizer, plan: BatchPlan) -> LrSchedule:
    """Return the learning rate schedule: warmup, decay by one of timm's formulas, cooldown at the last value."""
    schedule = cfg.SCHEDULE
    scale = cfg.OPTIM.SCALE_BATCH if schedule.SCALED else 0
    updates_per_step = plan.updates_per_epoch if schedule.UNIT == "epoch" else 1

    def steps(epochs: float) -> int:
        return round(epochs * plan.updates_per_epoch / updates_per_step)

    scheduler, _ = create_scheduler_v2(  # timm's "epochs" are the schedule's steps
        optimizer,
        schedule.NAME,
        num_epochs=steps(cfg.TRAIN.EPOCHS),
        decay_epochs=max(steps(schedule.DECAY_EPOCHS), 1),
        decay_milestones=[steps(epoch) for epoch in schedule.MILESTONES],
        decay_rate=schedule.POWER if schedule.NAME == "poly" else schedule.DECAY_RATE,
        min_lr=scaled_lr(schedule.MIN_LR, plan.global_batch, scale),
        warmup_lr=scaled_lr(schedule.WARMUP_LR, plan.global_batch, scale),
        warmup_epochs=steps(schedule.WARMUP_EPOCHS),
    )
    assert scheduler is not None, schedule.NAME
    end = steps(cfg.TRAIN.EPOCHS)  # cosine, tanh and poly reach their minimum here; step schedules may fall once more
    last = end if hasattr(scheduler, "get_cycle_length") else end - 1
    return LrSchedule(scheduler, updates_per_step=updates_per_step, delay=schedule.DELAY, last=last)


def build_schedule(
    cfg: CfgNode, model: nn.Module, ema: ModelEma | None, optimizer: torch.optim.Optimizer, plan: BatchPlan
) -> Schedules:
    """Return the schedules of a run: learning rate, drop path rate, EMA decay."""
    drop_path = parse_optional(cfg.TIMELINE.DROP_PATH_RATE, "TIMELINE.DROP_PATH_RATE")
    ema_decay = parse_optional(cfg.TIMELINE.EMA_DECAY, "TIMELINE.EMA_DECAY")
    return Schedules(
        learning_rate=build_learning_rate(cfg, optimizer, plan),
        drop_path=DropPathSchedule(drop_path_setter(model, max(drop_path.values)), drop_path) if drop_path else None,
        ema_decay=EmaDecaySchedule(ema, ema_decay) if ema and ema_decay else None,
    )
