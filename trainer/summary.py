"""Summary of a run, derived values included: train.py logs it at the start and with --dry-run."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from yacs.config import CfgNode

from common.byte_size import format_bytes
from common.timeline import Timeline, parse_optional
from data.build import Data
from engine.batch_plan import divisors
from engine.build import compile_mode
from engine.checkpoint.disk_space import SpaceNeed, free_bytes
from engine.checkpoint.run_directory import RunDirectory
from engine.distributed.processes import Processes
from engine.memory import Memory, estimate, estimate_state
from engine.optim.backends import backend_of, skips_on_device
from engine.optim.build import build_optimizer
from engine.precision import Precision
from engine.state import TrainState
from models.kernels.switch import uses_kernels
from trainer.session import Session
from trainer.unused_options import unused_options

Line = tuple[str, str]  # label, text
OWN_CLIPPING = ("max_grad_norm", "clip_threshold")  # names of the clipping threshold in timm's optimisers


def log_summary(s: Session, with_memory: bool = False) -> None:
    """Log the summary of a session, on request with an estimate of the memory, and the notes on its data."""
    if not s.processes.main:
        return
    need = space_need(s.cfg, s.state)
    memory = estimate_memory(s.cfg, s.state, s.precision) if with_memory else None
    for label, text in summarize(s.cfg, s.state, s.data, processes=s.processes, run=s.run, need=need, memory=memory):
        s.log.info(f"{label:<12}{text}")
    for note in s.data.notes:
        s.log.warning(note)
    if warning := space_warning(need, s.run):
        s.log.warning(warning)


def summarize(
    cfg: CfgNode,
    state: TrainState,
    data: Data,
    *,
    processes: Processes,
    run: RunDirectory,
    need: SpaceNeed,
    memory: Memory | None,
) -> list[Line]:
    """Return the lines that describe a run, without memory if `memory` is None."""
    return [
        ("run", f"{run.path}, {state.update} of {state.plan.updates:,} updates done"),
        ("recipe", f"mode {cfg.RECIPE.MODE}; the result is the {_weights(cfg.RECIPE.HEADLINE)} weights'"),
        (
            "processes",
            f"{state.plan.world} ({processes.launcher}), device {processes.device.type}, amp {cfg.TRAIN.AMP}",
        ),
        *_data(cfg, data),
        *_model(cfg, state.model, processes.device),
        *_length(cfg, state),
        *_optimiser(cfg, state.optimizer),
        *_schedule(cfg, state),
        *_augmentation(cfg),
        *_evaluation(cfg),
        ("checkpoints", _checkpoints(cfg, need.checkpoint)),
        ("disk", f"{need.describe()}; {_room(run)}"),
        *([("memory", _memory(memory, cfg))] if memory else []),
        *(("inert", text) for text in unused_options(cfg, state.model, state.plan.world)),
    ]


def estimate_memory(cfg: CfgNode, state: TrainState, precision: Precision) -> Memory:
    """Estimate the memory of a process, at the largest image size of the run."""
    sizes = parse_optional(cfg.TIMELINE.IMG_SIZE, "TIMELINE.IMG_SIZE")
    size = int(max(sizes.values)) if sizes else cfg.DATA.IMG_SIZE
    state.model.train(not cfg.TRAIN.EVAL_MODE)
    images = (cfg.TRAIN.MICRO_BATCH, 3, size, size)
    return estimate(state.model, _plain_optimizer(cfg), bool(state.ema), images, precision.autocast)


def space_need(cfg: CfgNode, state: TrainState) -> SpaceNeed:
    """Estimate the disk space that the checkpoints and best weights of a run take."""
    memory = estimate_state(state.model, _plain_optimizer(cfg), bool(state.ema))
    return SpaceNeed(
        checkpoint=memory.stored, weights=memory.weights, keep=cfg.CHECKPOINT.KEEP, kinds=len(state.weights())
    )


def space_warning(need: SpaceNeed, run: RunDirectory) -> str:
    """Return a warning if the disk has too little room for the rest of a run's files, else an empty string."""
    free, missing = free_bytes(run.path), need.still_needed(run.stored_bytes())
    if free is None or free >= missing:
        return ""
    return (
        f"{format_bytes(free)} are free in {run.path}, {format_bytes(missing)} are needed for checkpoints and best weights: the run "
        f"may end without them; free some space, lower CHECKPOINT.KEEP={need.keep}, or choose another folder with --output"
    )


def _plain_optimizer(cfg: CfgNode) -> Callable[[nn.Module], torch.optim.Optimizer]:
    """Return a function that builds the run's optimiser for a small layer."""
    plain = cfg.clone()
    plain.defrost()
    plain.OPTIM.LAYER_DECAY = 1.0
    plain.OPTIM.BACKEND = "auto"  # all backends keep states of the same size
    return lambda layer: build_optimizer(plain, layer)


def _weights(kind: str) -> str:
    return "averaged (EMA)" if kind == "ema" else "raw"


def _data(cfg: CfgNode, data: Data) -> Iterator[Line]:
    counts = f"{data.fingerprint['train']:,} training and {data.val.num_images:,} validation images"
    yield "data", f"{counts}, {len(data.classes):,} classes; loader {cfg.DATA.LOADER}"


def _model(cfg: CfgNode, model: nn.Module, device: torch.device) -> Iterator[Line]:
    parameters = sum(p.numel() for p in model.parameters())
    drop_path = _over_time(cfg, "DROP_PATH_RATE", cfg.MODEL.DROP_PATH_RATE)
    mode = ", trained in evaluation mode" if cfg.TRAIN.EVAL_MODE else ""
    yield "model", f"{cfg.MODEL.NAME}, {parameters:,} parameters, drop path {drop_path}{mode}"
    if cfg.MODEL.NORM_BACKEND != "torch":
        yield "", f"LayerNorm by {cfg.MODEL.NORM_BACKEND}"
    if kernels := uses_kernels(model):
        yield "", f"Triton kernels in {kernels} layers; MODEL.KERNELS off runs PyTorch's operators instead"
    if (mode := compile_mode(cfg, model, device)) != "off":
        chosen = " (TRAIN.COMPILE auto; off runs the model uncompiled)" if cfg.TRAIN.COMPILE == "auto" else ""
        yield "", f"torch.compile {mode}, once for each size of batch and image{chosen}"
    if count := cfg.TRAIN.CHECKPOINT_BLOCKS:
        which = "all blocks" if count < 0 else f"the first {count} blocks"
        yield "", f"gradient checkpointing: {which} run again in the backward pass"


def _length(cfg: CfgNode, state: TrainState) -> Iterator[Line]:
    plan, cooldown = state.plan, cfg.SCHEDULE.COOLDOWN_EPOCHS
    division = f"{plan.micro_batch} images x {plan.world} processes x {plan.accumulation} accumulation"
    worlds = ", ".join(map(str, divisors(plan.global_batch // plan.micro_batch)))
    yield "batch", f"{plan.global_batch} = {division}; fits {worlds} processes"
    if plan.world > 1:
        form = "in float32" if cfg.DIST.COMPRESS == "none" else f"rounded to {cfg.DIST.COMPRESS}"
        static = ", static graph" if cfg.DIST.STATIC_GRAPH else ""
        yield "exchange", f"gradients once an update, {form}, in buckets of {cfg.DIST.BUCKET_MB:g} MiB{static}"
    epochs = f"{cfg.TRAIN.EPOCHS} + {cooldown} cooldown epochs" if cooldown else f"{cfg.TRAIN.EPOCHS} epochs"
    images = plan.updates * plan.global_batch
    yield "length", f"{epochs} of {plan.updates_per_epoch:,} updates = {plan.updates:,} updates, {images:,} images"


def _optimiser(cfg: CfgNode, optimizer: torch.optim.Optimizer) -> Iterator[Line]:
    optim, groups = cfg.OPTIM, optimizer.param_groups
    factor = f" = {optim.LR:g} x {cfg.TRAIN.GLOBAL_BATCH}/{optim.SCALE_BATCH}" if optim.SCALE_BATCH else ""
    clip = f"gradient clipped to norm {cfg.TRAIN.CLIP_GRAD:g}" if cfg.TRAIN.CLIP_GRAD else "no gradient clipping"
    clip += "".join(f", {optim.NAME}'s own {key} {groups[0][key]:g}" for key in OWN_CLIPPING if groups[0].get(key))
    yield "optimiser", f"{optim.NAME}, learning rate {groups[-1]['initial_lr']:.4g}{factor}; {clip}"
    settings = {key: groups[0][key] for key in ("betas", "eps", "momentum") if key in groups[0]}
    yield "", ", ".join(f"{key} {value}" for key, value in settings.items()) or "no other settings"
    wait = "" if skips_on_device(optimizer) else "; the host reads whether an update is finite, on CUDA a wait each"
    yield "", f"backend {backend_of(optimizer)}{wait}"
    for decay in sorted({group["weight_decay"] for group in groups}, reverse=True):
        decayed = [p for group in groups if group["weight_decay"] == decay for p in group["params"]]
        yield "", f"weight decay {decay:g}: {len(decayed)} tensors, {sum(p.numel() for p in decayed):,} parameters"
    scales = [group.get("lr_scale", 1.0) for group in groups]
    if min(scales) < 1:
        layers = len(set(scales))
        yield (
            "",
            f"layer decay {optim.LAYER_DECAY:g}: {layers} layers, learning rate x {min(scales):.4g} to {max(scales):g}",
        )


def _schedule(cfg: CfgNode, state: TrainState) -> Iterator[Line]:
    schedule, plan = cfg.SCHEDULE, state.plan
    lag = f", {schedule.DELAY} {schedule.UNIT} late" if schedule.DELAY else ""
    end = f" to {state.schedule.lr_at(plan.updates - 1):.4g}"
    yield "schedule", f"{schedule.NAME}{end}, by {schedule.UNIT}{lag}; warmup {schedule.WARMUP_EPOCHS:g} epochs"
    warm = math.ceil(schedule.WARMUP_EPOCHS)
    shown = {0, 1, 2, warm - 1, warm, warm + 1, plan.epochs // 2, cfg.TRAIN.EPOCHS - 1, plan.epochs - 1}
    epochs = sorted(epoch for epoch in shown if 0 <= epoch < plan.epochs)
    rates = (f"{epoch}: {state.schedule.lr_at(epoch * plan.updates_per_epoch):.4g}" for epoch in epochs)
    yield "", f"learning rate where epochs begin (from 0)  {'  '.join(rates)}"
    if state.ema:
        yield "ema", f"decay {_over_time(cfg, 'EMA_DECAY', cfg.EMA.DECAY)} an update"


def _augmentation(cfg: CfgNode) -> Iterator[Line]:
    aug, timeline = cfg.AUG, cfg.TIMELINE
    size = _over_time(cfg, "IMG_SIZE", cfg.DATA.IMG_SIZE)
    magnitude = f" (magnitude {timeline.MAGNITUDE})" if timeline.MAGNITUDE else ""
    resampling = "bilinear or bicubic" if cfg.DATA.INTERPOLATION == "random" else cfg.DATA.INTERPOLATION
    crop = f"crop of {aug.SCALE[0]:g} to {aug.SCALE[1]:g} of the area, {resampling}, to {size} pixels"
    policy = f"{aug.RAND_AUGMENT or 'no RandAugment'}{magnitude}"
    repeats = f"; each image {aug.REPEATS} times an epoch" if aug.REPEATS > 1 else ""
    yield "augment", f"{crop}, flip {aug.HFLIP:g}, {policy}{repeats}"
    erase = f"erasing {aug.ERASE_PROB:g} ({aug.ERASE_MODE})" if aug.ERASE_PROB else "no erasing"
    prob = _over_time(cfg, "MIX_PROB", aug.MIX_PROB)
    mix = f"mixup {aug.MIXUP:g}, cutmix {aug.CUTMIX:g} with probability {prob}"
    yield "", f"{mix}, {erase}, {aug.ORDER}; label smoothing {aug.LABEL_SMOOTHING:g}"
    if cfg.DISTILL.TYPE != "none":
        distillation = (
            f"{cfg.DISTILL.TYPE} from {cfg.DISTILL.TEACHER}, alpha {cfg.DISTILL.ALPHA:g}, tau {cfg.DISTILL.TAU:g}"
        )
        yield "distill", distillation


def _evaluation(cfg: CfgNode) -> Iterator[Line]:
    size, ev = cfg.DATA.IMG_SIZE, cfg.EVAL
    if ev.MODE != "center":
        resize = f"{ev.MODE} to {math.floor(size / (ev.CROP_PCT or 1))}, centre crop {size}"
    elif ev.CROP_PCT:
        resize = f"shorter side to {math.floor(size / ev.CROP_PCT)}, centre crop {size}"
    elif cfg.DATA.EVAL_RESIZE:
        resize = f"shorter side to {cfg.DATA.EVAL_RESIZE}, centre crop {size}"
    else:
        resize = f"whole image to {size}"
    flip = ", averaged with the mirror image" if ev.FLIP else ""
    weights = "raw and EMA weights" if cfg.EMA.DECAY else "raw weights"
    often = "every epoch" if ev.EVERY == 1 else f"every {ev.EVERY} epochs"
    yield "evaluate", f"{often}, {weights}; {resize}, {cfg.DATA.EVAL_INTERPOLATION}{flip}"


def _room(run: RunDirectory) -> str:
    free, stored = free_bytes(run.path), run.stored_bytes()
    there = f", {format_bytes(stored)} stored already" if stored else ""
    return f"{'an unknown amount' if free is None else format_bytes(free)} free{there}"


def _checkpoints(cfg: CfgNode, size: int) -> str:
    often = f" and every {cfg.CHECKPOINT.EVERY_UPDATES} updates" if cfg.CHECKPOINT.EVERY_UPDATES else ""
    each = f", about {format_bytes(size)} each"
    return f"every epoch{often}, the last {cfg.CHECKPOINT.KEEP} kept{each}; best raw{' and EMA' if cfg.EMA.DECAY else ''} weights"


def _memory(memory: Memory, cfg: CfgNode) -> str:
    parts = {"weights": memory.weights, "gradients": memory.gradients, "optimiser": memory.optimizer, "EMA": memory.ema}
    kept = ", ".join(f"{name} {format_bytes(size)}" for name, size in parts.items() if size)
    activations = f"activations {format_bytes(memory.activations)} for {cfg.TRAIN.MICRO_BATCH} images"
    without = "workspace and teacher" if cfg.DISTILL.TYPE != "none" else "workspace"
    return f"about {format_bytes(memory.total)} a process: {activations}, {kept} (estimated, without {without})"


def _over_time(cfg: CfgNode, key: str, constant: Any) -> str:
    timeline: Timeline | None = parse_optional(cfg.TIMELINE[key], f"TIMELINE.{key}")
    return f"{timeline} (epoch:value)" if timeline else f"{constant:g}"
