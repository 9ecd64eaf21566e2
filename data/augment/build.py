"""Build the transforms and the device stage from the config."""

import math

import torch
from yacs.config import CfgNode

from common.timeline import Timeline, parse_optional
from data.augment.device_stage import DeviceStage
from data.augment.mixup import Mixup
from data.augment.rand_augment_policy import parse_policy
from data.augment.random_erasing import RandomErasing
from data.augment.transforms import EvalTransform, TrainTransform


def build_train_transform(cfg: CfgNode) -> TrainTransform:
    """Build the random resized crop, flip, RandAugment and erasing of the training images."""
    return TrainTransform(
        size=cfg.DATA.IMG_SIZE,
        seed=cfg.TRAIN.SEED,
        scale=tuple(cfg.AUG.SCALE),
        ratio=tuple(cfg.AUG.RATIO),
        hflip=cfg.AUG.HFLIP,
        interpolation=cfg.DATA.INTERPOLATION,
        policy=parse_policy(cfg.AUG.RAND_AUGMENT) if cfg.AUG.RAND_AUGMENT else None,
        erase=build_random_erasing(cfg),
        fill=_fill(cfg),
        sizes=size_timeline(cfg),
        magnitude=parse_optional(cfg.TIMELINE.MAGNITUDE, "TIMELINE.MAGNITUDE"),
    )


def build_eval_transform(cfg: CfgNode) -> EvalTransform:
    """Build the evaluation crop; EVAL.CROP_PCT, the more specific key, overrides DATA.EVAL_RESIZE."""
    size = cfg.DATA.IMG_SIZE
    resize = cfg.DATA.EVAL_RESIZE if cfg.EVAL.MODE == "center" else 0
    if cfg.EVAL.CROP_PCT:
        resize = math.floor(size / cfg.EVAL.CROP_PCT)
    return EvalTransform(
        crop=size, resize=resize, interpolation=cfg.DATA.EVAL_INTERPOLATION, mode=cfg.EVAL.MODE, fill=_fill(cfg)
    )


def build_random_erasing(cfg: CfgNode) -> RandomErasing:
    """Build the drawing of erasing boxes."""
    return RandomErasing(cfg.AUG.ERASE_PROB, cfg.AUG.ERASE_COUNT, tuple(cfg.AUG.ERASE_AREA))


def build_device_stage(cfg: CfgNode, num_classes: int, device: torch.device) -> DeviceStage:
    """Build the normalisation, erasing and mixing of batches on the device."""
    aug = cfg.AUG
    mixing = Mixup(
        num_classes,
        mixup=aug.MIXUP,
        cutmix=aug.CUTMIX,
        prob=aug.MIX_PROB,
        switch_prob=aug.MIX_SWITCH_PROB,
        smoothing=aug.LABEL_SMOOTHING,
    )
    return DeviceStage(
        mixing,
        mean=cfg.DATA.MEAN,
        std=cfg.DATA.STD,
        seed=cfg.TRAIN.SEED,
        device=device,
        erase_mode=aug.ERASE_MODE,
        order=aug.ORDER,
        mix_prob=parse_optional(cfg.TIMELINE.MIX_PROB, "TIMELINE.MIX_PROB"),
    )


def size_timeline(cfg: CfgNode) -> Timeline | None:
    """Return the timeline of training image sizes, pixels; None for the constant DATA.IMG_SIZE."""
    return parse_optional(cfg.TIMELINE.IMG_SIZE, "TIMELINE.IMG_SIZE", multiple=32)


def _fill(cfg: CfgNode) -> tuple[int, int, int]:
    """Return DATA.MEAN as a colour, 0 .. 255."""
    red, green, blue = (min(255, round(255 * mean)) for mean in cfg.DATA.MEAN[:3])
    return red, green, blue
