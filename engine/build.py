"""The engine's parts from the config: the only file of engine/ that reads it."""

from collections.abc import Callable
from typing import Any

import torch
from timm.layers import convert_sync_batchnorm
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2, param_groups_weight_decay
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from yacs.config import CfgNode

from engine.distributed import Processes
from engine.loop import Loop
from engine.plan import Plan, scaled_lr
from engine.precision import Precision
from engine.state import TrainState


def build_plan(cfg: CfgNode, processes: Processes, updates_per_epoch: int) -> Plan:
    """Divide the global batch among the processes."""
    train = cfg.TRAIN
    return Plan(train.GLOBAL_BATCH, train.MICRO_BATCH, processes.rank, processes.world, updates_per_epoch, train.EPOCHS)


def build_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """Return the optimiser: no weight decay for biases, one-dimensional parameters and those the model excepts."""
    excepted: set[str] = getattr(model, "no_weight_decay", set)()
    groups = param_groups_weight_decay(model, cfg.OPTIM.WEIGHT_DECAY, no_weight_decay_list=excepted)
    lr = scaled_lr(cfg.OPTIM.LR, cfg.TRAIN.GLOBAL_BATCH, cfg.OPTIM.SCALE_BATCH)
    name = cfg.OPTIM.NAME
    fused = {"fused": True} if name in ("adam", "adamw") and next(model.parameters()).is_cuda else {}
    betas, eps = tuple(cfg.OPTIM.BETAS), cfg.OPTIM.EPS
    return create_optimizer_v2(groups, name, lr=lr, weight_decay=0.0, betas=betas, eps=eps, **fused)


def build_schedule(cfg: CfgNode, optimizer: torch.optim.Optimizer, plan: Plan) -> CosineLRScheduler:
    """Return the schedule; update u (from 0) is done with the learning rate of `step_update(u)`."""
    scale = cfg.OPTIM.SCALE_BATCH if cfg.SCHEDULE.SCALED else 0
    return CosineLRScheduler(
        optimizer,
        t_initial=plan.updates,
        lr_min=scaled_lr(cfg.SCHEDULE.MIN_LR, plan.global_batch, scale),
        warmup_t=round(cfg.SCHEDULE.WARMUP_EPOCHS * plan.updates_per_epoch),
        warmup_lr_init=scaled_lr(cfg.SCHEDULE.WARMUP_LR, plan.global_batch, scale),
        t_in_epochs=False,
    )


def build_state(cfg: CfgNode, model: nn.Module, plan: Plan, precision: Precision) -> TrainState:
    """Return the state of a run that has not begun."""
    ema = ModelEmaV3(model, decay=cfg.EMA.DECAY) if cfg.EMA.DECAY else None
    optimizer = build_optimizer(cfg, model)
    return TrainState(model, ema, optimizer, build_schedule(cfg, optimizer, plan), precision.scaler, plan)


def wrap_model(model: nn.Module, processes: Processes) -> nn.Module:
    """Return the model that exchanges gradients between processes, or the model itself for one process."""
    if processes.world == 1:
        return model
    ids = [processes.local_rank] if processes.device.type == "cuda" else None
    # Buffers are not broadcast: engine/batchnorm.py keeps them equal.
    return DistributedDataParallel(model, device_ids=ids, broadcast_buffers=False, gradient_as_bucket_view=True)


def prepare_model(model: nn.Module, processes: Processes, sync_batch_norm: bool = False) -> nn.Module:
    """Return the model on the device, convolutions in channels_last memory, with SyncBatchNorm if asked for."""
    if sync_batch_norm and processes.world > 1:
        if processes.device.type != "cuda":
            raise ValueError("MODEL.SYNC_BN: torch's SyncBatchNorm runs on CUDA only; set it to false on the CPU")
        model = convert_sync_batchnorm(model)  # timm's: it keeps the activation of its fused norms
    model = model.to(processes.device).to(memory_format=torch.channels_last)
    for module in model.modules():
        if getattr(module, "plain_weight", False):
            weight = module.get_parameter("weight")  # .contiguous() would leave the strides of dimensions of size 1
            weight.data = weight.data.contiguous().view(-1).view(weight.shape)
    return model


def build_loop(
    cfg: CfgNode,
    model: nn.Module,
    prepare: Callable[[Any, int, int, int], tuple[Tensor, Tensor]],
    precision: Precision,
    processes: Processes,
) -> Loop:
    """Return the loop around a (wrapped) model; `prepare` as in `Loop`."""
    train = cfg.TRAIN
    return Loop(
        model, SoftTargetCrossEntropy(), prepare, precision, processes, train.CLIP_GRAD, train.SEED, cfg.LOG.EVERY
    )
