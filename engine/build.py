"""The engine's parts from the config: the only file of engine/ that reads it."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from timm.layers import convert_sync_batchnorm
from timm.loss import SoftTargetCrossEntropy
from timm.optim import (
    create_optimizer_v2,
    get_optimizer_info,
    param_groups_layer_decay,
    param_groups_weight_decay,
)
from timm.scheduler import create_scheduler_v2
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook, fp16_compress_hook
from torch.nn.parallel import DistributedDataParallel
from yacs.config import CfgNode

from common.timeline import parse_optional
from engine.batch_plan import BatchPlan, accumulation, scaled_lr
from engine.compilation import Compilation, vary_drop_path
from engine.distributed.processes import Processes
from engine.loop import Loop
from engine.loss import DistillationLoss, Teacher
from engine.optim.apex import apex_optimizer
from engine.optim.backends import align_state, backend_settings
from engine.optim.ema import ModelEma
from engine.optim.lr_schedule import LrSchedule, Schedule, drop_path_setter
from engine.precision import Precision
from engine.state import TrainState

HOOKS = {"bf16": bf16_compress_hook, "fp16": fp16_compress_hook}  # of DIST.COMPRESS


def build_plan(cfg: CfgNode, processes: Processes, updates_per_epoch: int) -> BatchPlan:
    """Divide the global batch among the processes."""
    train, epochs = cfg.TRAIN, cfg.TRAIN.EPOCHS + cfg.SCHEDULE.COOLDOWN_EPOCHS
    return BatchPlan(train.GLOBAL_BATCH, train.MICRO_BATCH, processes.rank, processes.world, updates_per_epoch, epochs)


def build_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """Return the optimiser: no weight decay for biases, one-dimensional parameters and those the model excepts."""
    optim = cfg.OPTIM
    excepted: set[str] = getattr(model, "no_weight_decay", set)()
    groups: list[dict[str, Any]]
    if optim.LAYER_DECAY < 1:
        groups = param_groups_layer_decay(model, optim.WEIGHT_DECAY, excepted, layer_decay=optim.LAYER_DECAY)
    else:
        groups = param_groups_weight_decay(model, optim.WEIGHT_DECAY, no_weight_decay_list=excepted)
    takes = optimizer_takes(optim.NAME)
    settings: dict[str, Any] = {}
    if optim.BETAS and "OPTIM.BETAS" in takes:
        settings["betas"] = tuple(optim.BETAS)
        if len(optim.BETAS) != (count := get_optimizer_info(optim.NAME).num_betas):
            raise ValueError(f"OPTIM.BETAS={optim.BETAS}: {optim.NAME} has {count}; give as many, or [] for its own")
    if optim.EPS and "OPTIM.EPS" in takes:
        settings["eps"] = optim.EPS
    if "OPTIM.MOMENTUM" in takes:
        settings["momentum"] = optim.MOMENTUM
    lr = scaled_lr(optim.LR, cfg.TRAIN.GLOBAL_BATCH, optim.SCALE_BATCH)
    device = next(model.parameters()).device
    if optim.BACKEND == "apex":
        if device.type != "cuda":
            raise ValueError(f"OPTIM.BACKEND=apex runs on CUDA only, this run is on {device.type}; set it to auto")
        return apex_optimizer(optim.NAME, groups, lr, **settings)
    settings |= backend_settings(optim.NAME, optim.BACKEND, device)
    return align_state(create_optimizer_v2(groups, optim.NAME, lr=lr, weight_decay=0.0, **settings))


def optimizer_takes(name: str) -> list[str]:
    """List which of OPTIM.BETAS, OPTIM.EPS and OPTIM.MOMENTUM an optimiser of timm's has; the others are inert."""
    info = get_optimizer_info(name)
    takes = {
        "OPTIM.BETAS": info.has_betas,
        "OPTIM.EPS": info.has_eps,
        "OPTIM.MOMENTUM": info.has_momentum,
    }
    return [key for key, has in takes.items() if has]


def build_learning_rate(cfg: CfgNode, optimizer: torch.optim.Optimizer, plan: BatchPlan) -> LrSchedule:
    """Return the learning rate over the updates, in timm's formulas."""
    schedule = cfg.SCHEDULE
    scale = cfg.OPTIM.SCALE_BATCH if schedule.SCALED else 0
    updates_per_step = plan.updates_per_epoch if schedule.UNIT == "epoch" else 1

    def steps(epochs: float) -> int:
        return round(epochs * plan.updates_per_epoch / updates_per_step)

    scheduler, _ = create_scheduler_v2(  # what it calls epochs are our steps
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
    if scheduler is None:
        raise ValueError(f"SCHEDULE.NAME={schedule.NAME} is no schedule of timm's; take cosine")
    end = steps(cfg.TRAIN.EPOCHS)  # where cosine and its like are at their lowest; the others may fall once more
    last = end if hasattr(scheduler, "get_cycle_length") else end - 1
    return LrSchedule(scheduler, updates_per_step, schedule.DELAY, last)


def build_schedule(
    cfg: CfgNode, model: nn.Module, ema: ModelEma | None, optimizer: torch.optim.Optimizer, plan: BatchPlan
) -> Schedule:
    """Return all that the position decides: learning rate, drop path, EMA decay."""
    drop_path = parse_optional(cfg.TIMELINE.DROP_PATH_RATE, "TIMELINE.DROP_PATH_RATE")
    setter = drop_path_setter(model, max(drop_path.values)) if drop_path else None
    ema_decay = parse_optional(cfg.TIMELINE.EMA_DECAY, "TIMELINE.EMA_DECAY")
    return Schedule(build_learning_rate(cfg, optimizer, plan), setter, drop_path, ema, ema_decay)


def build_state(cfg: CfgNode, model: nn.Module, plan: BatchPlan, precision: Precision) -> TrainState:
    """Return the state of a run that has not begun."""
    ema = ModelEma(model, cfg.EMA.DECAY) if cfg.EMA.DECAY else None
    optimizer = build_optimizer(cfg, model)
    schedule = build_schedule(cfg, model, ema, optimizer, plan)
    return TrainState(model, ema, optimizer, schedule, precision.scaler, plan)


def wrap_model(model: nn.Module, processes: Processes, cfg: CfgNode | None = None) -> nn.Module:
    """Return the model that exchanges gradients between processes, or the model itself for one process.

    Without a config gradients travel in torch's buckets and in their own format.
    """
    if processes.world == 1:
        return model
    ids = [processes.device.index] if processes.device.type == "cuda" else None
    # Buffers are not broadcast in the forward pass: engine/batch_norm.py keeps them equal.
    named = inspect.signature(DistributedDataParallel).parameters
    buffers = "forward_sync_buffers" if "forward_sync_buffers" in named else "broadcast_buffers"  # before torch 2.15
    settings: dict[str, Any] = {buffers: False}
    if cfg is not None:
        times = accumulation(cfg.TRAIN.GLOBAL_BATCH, cfg.TRAIN.MICRO_BATCH, processes.world)
        if cfg.DIST.STATIC_GRAPH and times > 1:  # torch 2.15 fails on a first pass that exchanges nothing
            raise ValueError(
                f"DIST.STATIC_GRAPH=true does not go with accumulation {times}; set it to false, or TRAIN.MICRO_BATCH to "
                f"{cfg.TRAIN.MICRO_BATCH * times}"
            )
        settings |= {"bucket_cap_mb": cfg.DIST.BUCKET_MB, "static_graph": cfg.DIST.STATIC_GRAPH}
    wrapped = DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True, **settings)
    if cfg is not None and cfg.DIST.COMPRESS != "none":
        try:
            wrapped.register_comm_hook(None, HOOKS[cfg.DIST.COMPRESS])
        except TypeError as error:
            raise ValueError(f"DIST.COMPRESS={cfg.DIST.COMPRESS}: {error}; set it to fp16 or none") from error
    return wrapped


def build_compilation(cfg: CfgNode, model: nn.Module, processes: Processes) -> Compilation | None:
    """Return what compiles the run's models, or None; before the state is built: drop path may have to be exchanged."""
    mode = cfg.TRAIN.COMPILE
    if mode == "off":
        return None
    if mode == "reduce-overhead":
        times = accumulation(cfg.TRAIN.GLOBAL_BATCH, cfg.TRAIN.MICRO_BATCH, processes.world)
        if processes.device.type != "cuda":
            raise ValueError("TRAIN.COMPILE=reduce-overhead records CUDA graphs; set it to default on the CPU")
        if times > 1:  # the first micro-batch's gradients lie in the memory of the graph, which the second replays
            raise ValueError(
                f"TRAIN.COMPILE=reduce-overhead does not go with accumulation {times}; set it to default, or TRAIN.MICRO_BATCH "
                f"to {cfg.TRAIN.MICRO_BATCH * times}"
            )
    if cfg.TIMELINE.DROP_PATH_RATE:
        vary_drop_path(model)
    sizes = parse_optional(cfg.TIMELINE.IMG_SIZE, "TIMELINE.IMG_SIZE")
    epochs = range(cfg.TRAIN.EPOCHS + cfg.SCHEDULE.COOLDOWN_EPOCHS)
    return Compilation(mode, len({sizes.at(epoch) for epoch in epochs}) if sizes else 1)


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


def wrap_teacher(cfg: CfgNode, model: nn.Module, processes: Processes) -> Teacher:
    """Return a trained model as the one to distil from, on the device; its `pretrained_cfg` says what images it knows."""
    own: dict[str, Any] = model.pretrained_cfg  # type: ignore[assignment]
    height, width = own["input_size"][1:]
    size = (height, width) if own.get("fixed_input_size") else None
    return Teacher(prepare_model(model, processes), cfg.DATA.MEAN, cfg.DATA.STD, own["mean"], own["std"], size)


def build_criterion(cfg: CfgNode, teacher: Teacher | None) -> Callable[[Any, Tensor, Tensor], Tensor]:
    """Return the loss of (outputs, soft targets, images)."""
    base = SoftTargetCrossEntropy()
    if teacher is None:
        return lambda outputs, targets, images: base(outputs, targets)
    return DistillationLoss(base, teacher, cfg.DISTILL.TYPE, cfg.DISTILL.ALPHA, cfg.DISTILL.TAU)


def build_loop(
    cfg: CfgNode,
    model: nn.Module,
    prepare: Callable[[Any, int, int, int], tuple[Tensor, Tensor]],
    precision: Precision,
    processes: Processes,
    teacher: Teacher | None = None,
) -> Loop:
    """Return the loop around a (wrapped) model; `prepare` as in `Loop`. A student with a distillation token will use it."""
    train = cfg.TRAIN
    student = model.module if isinstance(model, DistributedDataParallel) else model
    use_token: Callable[[bool], None] | None = getattr(student, "set_distilled_training", None)
    if teacher and use_token:
        use_token(True)
    return Loop(
        model,
        build_criterion(cfg, teacher),
        prepare,
        precision,
        processes,
        train.CLIP_GRAD,
        train.SEED,
        cfg.LOG.EVERY,
        train.EVAL_MODE,
        train.MAX_SKIPPED,
    )
