"""Parts of the engine built from the config: state, loop, wrapped and compiled model."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from yacs.config import CfgNode

from common.timeline import parse_optional
from engine.batch_norm import to_sync_batch_norm
from engine.batch_plan import BatchPlan
from engine.compilation import Compilation
from engine.distributed.ddp import wrap_in_ddp
from engine.distributed.processes import Processes
from engine.drop_path import vary_drop_path
from engine.loop import Loop
from engine.loss import Criterion, Teacher, make_criterion
from engine.optim.build import build_optimizer, build_schedule
from engine.optim.ema import ModelEma
from engine.precision import Precision
from engine.state import TrainState


def build_plan(cfg: CfgNode, processes: Processes, updates_per_epoch: int) -> BatchPlan:
    """Divide the global batch among the processes."""
    return BatchPlan(
        global_batch=cfg.TRAIN.GLOBAL_BATCH,
        micro_batch=cfg.TRAIN.MICRO_BATCH,
        rank=processes.rank,
        world=processes.world,
        updates_per_epoch=updates_per_epoch,
        epochs=cfg.TRAIN.EPOCHS + cfg.SCHEDULE.COOLDOWN_EPOCHS,
    )


def build_state(cfg: CfgNode, model: nn.Module, plan: BatchPlan, precision: Precision) -> TrainState:
    """Return the state of a new run."""
    ema = ModelEma(model, cfg.EMA.DECAY) if cfg.EMA.DECAY else None
    optimizer = build_optimizer(cfg, model)
    schedule = build_schedule(cfg, model, ema, optimizer, plan)
    return TrainState(model=model, ema=ema, optimizer=optimizer, schedule=schedule, scaler=precision.scaler, plan=plan)


def wrap_model(cfg: CfgNode, model: nn.Module, plan: BatchPlan, processes: Processes) -> nn.Module:
    """Return the model wrapped for gradient exchange between processes, or the model itself for one process.

    Raises ValueError for DIST.STATIC_GRAPH with gradient accumulation.
    """
    # torch 2.15 fails on a first pass without gradient exchange.
    if processes.world > 1 and cfg.DIST.STATIC_GRAPH and plan.accumulation > 1:
        raise ValueError(
            f"DIST.STATIC_GRAPH=true does not go with accumulation {plan.accumulation}; set it to false, or TRAIN.MICRO_BATCH to "
            f"{plan.micro_batch * plan.accumulation}"
        )
    return wrap_in_ddp(
        model,
        processes,
        bucket_mb=cfg.DIST.BUCKET_MB,
        static_graph=cfg.DIST.STATIC_GRAPH,
        compression=cfg.DIST.COMPRESS,
    )


def compile_mode(cfg: CfgNode, model: nn.Module, device: torch.device) -> str:
    """Return TRAIN.COMPILE, with auto resolved: default on CUDA for models that state `inductor_options`, else off."""
    if cfg.TRAIN.COMPILE != "auto":
        return str(cfg.TRAIN.COMPILE)
    return "default" if device.type == "cuda" and hasattr(model, "inductor_options") else "off"


def build_compilation(cfg: CfgNode, model: nn.Module, plan: BatchPlan, device: torch.device) -> Compilation | None:
    """Return the compilation of the run's models, or None if TRAIN.COMPILE is off, or auto means off.

    Called before `build_state`: it replaces drop path layers if their rate is to change. Raises ValueError for
    reduce-overhead on the CPU or with gradient accumulation.
    """
    mode = compile_mode(cfg, model, device)
    if mode == "off":
        return None
    if mode == "reduce-overhead":
        if device.type != "cuda":
            raise ValueError("TRAIN.COMPILE=reduce-overhead records CUDA graphs; set it to default on the CPU")
        # A replay for the second micro-batch would overwrite the first one's gradients, which lie in graph memory.
        if plan.accumulation > 1:
            raise ValueError(
                f"TRAIN.COMPILE=reduce-overhead does not go with accumulation {plan.accumulation}; set it to default, or "
                f"TRAIN.MICRO_BATCH to {plan.micro_batch * plan.accumulation}"
            )
    if cfg.TIMELINE.DROP_PATH_RATE:
        vary_drop_path(model)
    sizes = parse_optional(cfg.TIMELINE.IMG_SIZE, "TIMELINE.IMG_SIZE")
    epochs = range(cfg.TRAIN.EPOCHS + cfg.SCHEDULE.COOLDOWN_EPOCHS)
    count = len({sizes.at(epoch) for epoch in epochs}) if sizes else 1
    return Compilation(mode, count, tuned=device.type == "cuda")


def prepare_model(model: nn.Module, processes: Processes, sync_batch_norm: bool = False) -> nn.Module:
    """Return the model on the device, convolutions in channels_last memory, with SyncBatchNorm if `sync_batch_norm`."""
    if sync_batch_norm and processes.world > 1:
        model = to_sync_batch_norm(model, processes)
    model = model.to(processes.device).to(memory_format=torch.channels_last)
    for module in model.modules():
        if getattr(module, "plain_weight", False):
            weight = module.get_parameter("weight")  # .contiguous() would leave the strides of dimensions of size 1
            weight.data = weight.data.contiguous().view(-1).view(weight.shape)
    return model


def wrap_teacher(cfg: CfgNode, model: nn.Module, processes: Processes) -> Teacher:
    """Return a trained model as a distillation teacher on the device; its `pretrained_cfg` states size and normalisation."""
    own: dict[str, Any] = model.pretrained_cfg  # type: ignore[assignment]
    height, width = own["input_size"][1:]
    size = (height, width) if own.get("fixed_input_size") else None
    return Teacher(
        prepare_model(model, processes),
        mean=cfg.DATA.MEAN,
        std=cfg.DATA.STD,
        own_mean=own["mean"],
        own_std=own["std"],
        own_size=size,
    )


def build_criterion(cfg: CfgNode, teacher: Teacher | None) -> Criterion:
    """Return the loss of (outputs, soft targets, images)."""
    return make_criterion(teacher, cfg.DISTILL.TYPE, cfg.DISTILL.ALPHA, cfg.DISTILL.TAU)


def build_loop(
    cfg: CfgNode,
    model: nn.Module,
    prepare: Callable[[Any, int, int, int], tuple[Tensor, Tensor]],
    precision: Precision,
    processes: Processes,
    teacher: Teacher | None = None,
) -> Loop:
    """Return the training loop of a (wrapped) model; `prepare` as in `Loop`. Turns on a student's distillation token."""
    train = cfg.TRAIN
    student = model.module if isinstance(model, DistributedDataParallel) else model
    use_token: Callable[[bool], None] | None = getattr(student, "set_distilled_training", None)
    if teacher and use_token:
        use_token(True)
    return Loop(
        model=model,
        criterion=build_criterion(cfg, teacher),
        prepare=prepare,
        precision=precision,
        processes=processes,
        clip_grad=train.CLIP_GRAD,
        seed=train.SEED,
        log_every=cfg.LOG.EVERY,
        eval_mode=train.EVAL_MODE,
        max_skipped=train.MAX_SKIPPED,
    )
