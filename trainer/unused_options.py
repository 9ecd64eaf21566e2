"""Options that are set and have no effect, with the reason: lines `inert` of the summary, warnings of the doctor."""

from collections.abc import Iterator

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from yacs.config import CfgNode

import config
from common.timeline import parse_optional
from engine.optim.build import supported_keys

# Keys of the learning rate schedule that only some schedules use.
SCHEDULE_USERS: dict[str, tuple[str, ...]] = {
    "SCHEDULE.MIN_LR": config.TO_MIN_LR,
    "SCHEDULE.DECAY_EPOCHS": ("step",),
    "SCHEDULE.MILESTONES": ("multistep",),
    "SCHEDULE.DECAY_RATE": ("step", "multistep"),
    "SCHEDULE.POWER": ("poly",),
}


def unused_options(cfg: CfgNode, model: nn.Module, world: int) -> Iterator[str]:
    """Yield the keys that are set and have no effect, each as "KEY value: reason"; `world` is the number of processes."""
    has_batch_norm = any(isinstance(module, _BatchNorm) for module in model.modules())
    if cfg.MODEL.SYNC_BN and not cfg.TRAIN.EVAL_MODE and (world == 1 or not has_batch_norm):
        yield f"MODEL.SYNC_BN: {'there is one process' if has_batch_norm else 'the model has no BatchNorm'}"
    if world == 1:
        for key in ("DIST.BUCKET_MB", "DIST.COMPRESS", "DIST.STATIC_GRAPH"):
            if (value := config.get(cfg, key)) != config.get(config.defaults(), key):
                yield f"{key} {value}: there is one process"
    if cfg.TRAIN.EVAL_MODE:
        for key in ("MODEL.DROP_RATE", "MODEL.DROP_PATH_RATE", "TIMELINE.DROP_PATH_RATE", "MODEL.SYNC_BN"):
            if value := config.get(cfg, key):
                yield f"{key} {value}: TRAIN.EVAL_MODE keeps the model in evaluation mode"
    for key in config.TIMELINES:
        line = parse_optional(config.get(cfg, key), key)
        if line and line.end >= cfg.TRAIN.EPOCHS + cfg.SCHEDULE.COOLDOWN_EPOCHS:
            yield f"{key} {line}: the run ends before epoch {line.end:g}"
    yield from _changed_without_effect(cfg)
    if cfg.DATA.LOADER == "synthetic":
        yield "AUG.SCALE, RATIO, HFLIP, RAND_AUGMENT, DATA.INTERPOLATION, EVAL_RESIZE, EVAL.MODE, CROP_PCT: images are synthetic"


def _changed_without_effect(cfg: CfgNode) -> Iterator[str]:
    """Yield the keys that differ from their default and that the other options leave unused."""
    reasons = _unused_schedule(cfg) | _unused_augmentation(cfg)
    if cfg.EVAL.MODE != "center" or cfg.EVAL.CROP_PCT:
        reasons["DATA.EVAL_RESIZE"] = (
            "EVAL.CROP_PCT sets the size" if cfg.EVAL.CROP_PCT else f"EVAL.MODE {cfg.EVAL.MODE}"
        )
    if cfg.DISTILL.TYPE == "none":
        reasons |= dict.fromkeys(("DISTILL.ALPHA", "DISTILL.TAU"), "DISTILL.TYPE is none")
    if not cfg.MODEL.INIT:
        reasons["MODEL.INIT_WEIGHTS"] = "MODEL.INIT is not set"
    default = config.defaults()
    for key, reason in reasons.items():
        if (value := config.get(cfg, key)) != config.get(default, key):
            yield f"{key} {value}: {reason}"


def _unused_schedule(cfg: CfgNode) -> dict[str, str]:
    """Return the unused keys of optimizer, learning rate schedule and timelines, each with the reason."""
    schedule, takes = cfg.SCHEDULE, supported_keys(cfg.OPTIM.NAME)
    settings = ("OPTIM.BETAS", "OPTIM.EPS", "OPTIM.MOMENTUM")
    reasons = {key: f"OPTIM.NAME {cfg.OPTIM.NAME} has none" for key in settings if key not in takes}
    for key, users in SCHEDULE_USERS.items():
        if schedule.NAME not in users:
            reasons[key] = f"SCHEDULE.NAME {schedule.NAME}"
    for key in ("TIMELINE.DROP_PATH_RATE", "TIMELINE.MIX_PROB"):
        if config.get(cfg, key):
            reasons[config.TIMELINES[key]] = f"{key} takes its place"
    if not schedule.WARMUP_EPOCHS:
        reasons["SCHEDULE.WARMUP_LR"] = "there is no warmup"
        if schedule.NAME == "constant":
            reasons["SCHEDULE.DELAY"] = "the learning rate does not change"
    return reasons


def _unused_augmentation(cfg: CfgNode) -> dict[str, str]:
    """Return the unused keys of random erasing, mixup and cutmix, each with the reason."""
    aug = cfg.AUG
    reasons: dict[str, str] = {}
    if not aug.ERASE_PROB:
        reasons |= dict.fromkeys(("AUG.ERASE_MODE", "AUG.ERASE_COUNT", "AUG.ERASE_AREA"), "AUG.ERASE_PROB is 0")
    if not (aug.MIXUP or aug.CUTMIX):
        off = "AUG.MIXUP and AUG.CUTMIX are 0"
        reasons |= dict.fromkeys(("AUG.MIX_PROB", "TIMELINE.MIX_PROB", "AUG.MIX_SWITCH_PROB"), off)
    elif not (aug.MIX_PROB or cfg.TIMELINE.MIX_PROB):
        reasons |= dict.fromkeys(("AUG.MIXUP", "AUG.CUTMIX", "AUG.MIX_SWITCH_PROB"), "AUG.MIX_PROB is 0")
    elif not (aug.MIXUP and aug.CUTMIX):
        reasons["AUG.MIX_SWITCH_PROB"] = "only one of mixup and cutmix is on"
    return reasons
