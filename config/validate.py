"""Validation of config values: choices, ranges, and combinations that cannot run or have no effect."""

import difflib
import os
import re
from collections.abc import Callable

from yacs.config import CfgNode

from common import timeline
from common.text import shorten
from config.lookup import get, run_name

CHOICES: dict[str, tuple[str, ...]] = {
    "DEVICE": ("auto", "cpu", "cuda"),
    "RECIPE.MODE": ("corrected", "published"),
    "RECIPE.HEADLINE": ("raw", "ema"),
    "MODEL.INIT_WEIGHTS": ("", "raw", "ema"),
    "MODEL.KERNELS": ("auto", "off", "triton"),
    "MODEL.NORM_BACKEND": ("torch", "apex"),
    "DATA.LOADER": ("torch", "dali", "synthetic"),
    "DATA.DALI_DEVICE": ("auto", "cpu", "gpu"),
    "DATA.INTERPOLATION": ("bicubic", "bilinear", "random"),
    "DATA.EVAL_INTERPOLATION": ("bicubic", "bilinear"),
    "AUG.ERASE_MODE": ("pixel", "rand", "const"),
    "AUG.ORDER": ("erase_then_mix", "mix_then_erase"),
    "EVAL.MODE": ("center", "squash", "border"),
    "TRAIN.AMP": ("bf16", "fp16", "off"),
    "TRAIN.COMPILE": ("auto", "off", "default", "max-autotune", "reduce-overhead"),
    "OPTIM.NAME": (
        *("adamw", "adam", "nadam", "nadamw", "radam", "adabelief", "adan", "adopt", "lamb", "lion"),
        *("sgd", "momentum", "rmsproptf", "madgrad", "adafactor", "muon"),
    ),
    "OPTIM.BACKEND": ("auto", "fused", "foreach", "for-loop", "apex"),
    "SCHEDULE.NAME": ("cosine", "tanh", "poly", "step", "multistep", "constant"),
    "SCHEDULE.UNIT": ("update", "epoch"),
    "DIST.COMPRESS": ("none", "bf16", "fp16"),
    "DISTILL.TYPE": ("none", "soft", "hard"),
}

# Smallest and largest allowed value, of each entry where the value is a list.
RANGES: dict[str, tuple[float, float]] = {
    "MODEL.NUM_CLASSES": (0, 1e6),
    "MODEL.DROP_RATE": (0, 0.999),
    "MODEL.DROP_PATH_RATE": (0, 0.999),
    "DATA.IMG_SIZE": (16, 8192),
    "DATA.WORKERS": (-1, 4096),
    "DATA.PREFETCH": (1, 1024),
    "DATA.BLOCK_SHUFFLE": (0, 1e9),
    "DATA.MAX_BAD_SHARE": (0, 1),
    "DATA.EVAL_RESIZE": (0, 1e5),
    "DATA.MEAN": (0, 1),
    "DATA.STD": (1e-3, 1),
    "DATA.SYNTHETIC_TRAIN": (1, 1e12),
    "DATA.SYNTHETIC_VAL": (1, 1e12),
    "DATA.SYNTHETIC_CLASSES": (1, 1e6),
    "AUG.SCALE": (1e-6, 1),
    "AUG.RATIO": (1e-3, 1e3),
    "AUG.HFLIP": (0, 1),
    "AUG.ERASE_PROB": (0, 1),
    "AUG.ERASE_COUNT": (1, 100),
    "AUG.ERASE_AREA": (1e-6, 1),
    "AUG.MIXUP": (0, 1e3),
    "AUG.CUTMIX": (0, 1e3),
    "AUG.MIX_PROB": (0, 1),
    "AUG.MIX_SWITCH_PROB": (0, 1),
    "AUG.LABEL_SMOOTHING": (0, 0.999),
    "AUG.REPEATS": (1, 100),
    "TRAIN.EPOCHS": (1, 1e6),
    "TRAIN.GLOBAL_BATCH": (1, 1e9),
    "TRAIN.MICRO_BATCH": (1, 1e9),
    "TRAIN.SEED": (0, 2**63 - 1),
    "TRAIN.CLIP_GRAD": (0, 1e9),
    "TRAIN.MAX_SKIPPED": (1, 1e4),
    "TRAIN.CHECKPOINT_BLOCKS": (-1, 1e4),
    "OPTIM.LR": (0, 1e3),
    "OPTIM.SCALE_BATCH": (0, 1e9),
    "OPTIM.BETAS": (0, 0.999999999),
    "OPTIM.EPS": (0, 1),
    "OPTIM.MOMENTUM": (0, 0.999999999),
    "OPTIM.WEIGHT_DECAY": (0, 1e3),
    "OPTIM.LAYER_DECAY": (1e-6, 1),
    "SCHEDULE.DELAY": (0, 1e9),
    "SCHEDULE.WARMUP_EPOCHS": (0, 1e6),
    "SCHEDULE.WARMUP_LR": (0, 1e3),
    "SCHEDULE.MIN_LR": (0, 1e3),
    "SCHEDULE.COOLDOWN_EPOCHS": (0, 1e6),
    "SCHEDULE.DECAY_EPOCHS": (1e-6, 1e6),
    "SCHEDULE.MILESTONES": (0, 1e6),
    "SCHEDULE.DECAY_RATE": (1e-9, 1),
    "SCHEDULE.POWER": (1e-6, 100),
    "DISTILL.ALPHA": (0, 1),
    "DISTILL.TAU": (1e-3, 1e3),
    "EMA.DECAY": (0, 0.999999999),
    "EVAL.BATCH": (1, 1e9),
    "EVAL.EVERY": (1, 1e6),
    "EVAL.CROP_PCT": (0, 1),
    "CHECKPOINT.EVERY_UPDATES": (0, 1e12),
    "CHECKPOINT.KEEP": (1, 1e6),
    "CHECKPOINT.MAX_FAILURES": (1, 1e6),
    "DIST.START_TIMEOUT": (1, 1e6),
    "DIST.TIMEOUT": (1, 1e6),
    "DIST.BUCKET_MB": (1, 1e4),
    "LOG.EVERY": (1, 1e9),
    "LOG.PICTURES_EVERY": (0, 1e6),
}

TO_MIN_LR = ("cosine", "tanh", "poly")  # learning rate schedules that end at SCHEDULE.MIN_LR

# Timelines: the key that each replaces, whose range also holds for its values.
TIMELINES = {
    "TIMELINE.DROP_PATH_RATE": "MODEL.DROP_PATH_RATE",
    "TIMELINE.EMA_DECAY": "EMA.DECAY",
    "TIMELINE.MAGNITUDE": "AUG.RAND_AUGMENT",
    "TIMELINE.MIX_PROB": "AUG.MIX_PROB",
    "TIMELINE.IMG_SIZE": "DATA.IMG_SIZE",
}

SMALLEST_CROP_PCT = 0.05  # below it, images would be enlarged beyond reason


def validate(cfg: CfgNode) -> None:
    """Raise ValueError for a value out of range or a combination that cannot run."""
    for validator in VALIDATORS:
        validator(cfg)


def _validate_choices(cfg: CfgNode) -> None:
    for name, allowed in CHOICES.items():
        if (value := get(cfg, name)) not in allowed:
            near = difflib.get_close_matches(value.lower(), allowed, n=1, cutoff=0.5)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {shorten(value)}{hint}")


def _validate_ranges(cfg: CfgNode) -> None:
    for name, (low, high) in RANGES.items():
        value = get(cfg, name)
        for number in value if isinstance(value, list) else [value]:
            if not low <= number <= high:
                raise ValueError(f"{name} must lie between {low:g} and {high:g}, got {shorten(value)}")


def _validate_augmentation(cfg: CfgNode) -> None:
    for name in ("AUG.SCALE", "AUG.RATIO", "AUG.ERASE_AREA"):
        low, high = get(cfg, name)
        if low > high:
            raise ValueError(f"{name} must be [smallest, largest], got {[low, high]}")


def _validate_names(cfg: CfgNode) -> None:
    for name in ("NAME", "TAG"):
        if "/" in cfg[name] or cfg[name] in (".", ".."):
            raise ValueError(f"{name} is one folder name, got {shorten(cfg[name])}; use OUTPUT for the path")
    folder, key = run_name(cfg), "NAME or TAG" if cfg.NAME else "MODEL.NAME or TAG"
    if "/" in folder or re.search(r"[\x00-\x1f\x7f-\x9f]", folder) or len(os.fsencode(folder)) > 255:
        raise ValueError(
            f"{key}: the run directory would be named {shorten(folder)}; give a name of at most 255 bytes, without / and "
            "control characters"
        )


def _validate_custom_model(cfg: CfgNode) -> None:
    if (module := cfg.MODEL.MODULE) and not (module.endswith(".py") or all(map(str.isidentifier, module.split(".")))):
        raise ValueError(
            f"MODEL.MODULE={shorten(module)} is neither a file, mine/net.py, nor a module, package.net; give one"
        )


def _validate_evaluation(cfg: CfgNode) -> None:
    if 0 < cfg.EVAL.CROP_PCT < SMALLEST_CROP_PCT:
        raise ValueError(
            f"EVAL.CROP_PCT={cfg.EVAL.CROP_PCT:g} must be 0 (off) or lie between {SMALLEST_CROP_PCT:g} and 1; "
            "it is the share of the resized side that is kept, usually 0.875 to 1"
        )
    uses_resize = cfg.EVAL.MODE == "center" and not cfg.EVAL.CROP_PCT
    if cfg.DATA.LOADER != "synthetic" and uses_resize and 0 < cfg.DATA.EVAL_RESIZE < cfg.DATA.IMG_SIZE:
        raise ValueError(
            f"DATA.EVAL_RESIZE={cfg.DATA.EVAL_RESIZE} is smaller than the crop DATA.IMG_SIZE={cfg.DATA.IMG_SIZE}; "
            f"give at least {cfg.DATA.IMG_SIZE}, usually {round(cfg.DATA.IMG_SIZE / 0.875)}"
        )


def _validate_data(cfg: CfgNode) -> None:
    if cfg.DATA.LOADER != "dali" and cfg.DATA.DALI_DEVICE != "auto":
        raise ValueError(
            f"DATA.DALI_DEVICE={cfg.DATA.DALI_DEVICE} has no effect while DATA.LOADER={cfg.DATA.LOADER}; set DATA.LOADER to dali"
        )
    if cfg.DATA.LOADER == "dali" and cfg.EVAL.MODE == "border":
        raise ValueError("EVAL.MODE=border: the DALI loader crops and does not fill; set DATA.LOADER to torch")


def _validate_mixing(cfg: CfgNode) -> None:
    if cfg.TRAIN.MICRO_BATCH == 1 and (cfg.AUG.MIXUP or cfg.AUG.CUTMIX) and cfg.AUG.MIX_PROB:
        raise ValueError(
            "TRAIN.MICRO_BATCH=1 leaves mixup and cutmix no partner; set AUG.MIX_PROB to 0 or raise it to 2"
        )


def _validate_schedule(cfg: CfgNode) -> None:
    scale = cfg.TRAIN.GLOBAL_BATCH / cfg.OPTIM.SCALE_BATCH if cfg.OPTIM.SCALE_BATCH else 1.0
    low, high = cfg.SCHEDULE.MIN_LR * (scale if cfg.SCHEDULE.SCALED else 1.0), cfg.OPTIM.LR * scale
    if cfg.SCHEDULE.NAME in TO_MIN_LR and low > high:
        raise ValueError(
            f"SCHEDULE.MIN_LR={low:g} is above OPTIM.LR={high:g} (as scaled with the batch): the rate would rise; lower MIN_LR"
        )
    if cfg.SCHEDULE.UNIT == "epoch" and cfg.SCHEDULE.WARMUP_EPOCHS % 1:
        raise ValueError(
            f"SCHEDULE.WARMUP_EPOCHS={cfg.SCHEDULE.WARMUP_EPOCHS:g} must be whole while SCHEDULE.UNIT is epoch; or set UNIT update"
        )
    if cfg.SCHEDULE.SCALED and not cfg.OPTIM.SCALE_BATCH:
        raise ValueError("SCHEDULE.SCALED=true has no effect while OPTIM.SCALE_BATCH=0; set SCALE_BATCH (usually 512)")
    if cfg.SCHEDULE.WARMUP_EPOCHS >= cfg.TRAIN.EPOCHS:
        raise ValueError(
            f"SCHEDULE.WARMUP_EPOCHS={cfg.SCHEDULE.WARMUP_EPOCHS:g} must be shorter than TRAIN.EPOCHS={cfg.TRAIN.EPOCHS}; "
            "lower the warmup or train longer"
        )
    if cfg.SCHEDULE.NAME == "multistep" and not cfg.SCHEDULE.MILESTONES:
        raise ValueError("SCHEDULE.NAME=multistep needs SCHEDULE.MILESTONES, e.g. [150, 225]")
    if sorted(set(cfg.SCHEDULE.MILESTONES)) != cfg.SCHEDULE.MILESTONES:
        raise ValueError(f"SCHEDULE.MILESTONES must rise, got {shorten(cfg.SCHEDULE.MILESTONES)}")


def _validate_recipe(cfg: CfgNode) -> None:
    if cfg.RECIPE.HEADLINE == "ema" and not cfg.EMA.DECAY:
        raise ValueError("RECIPE.HEADLINE=ema but EMA.DECAY=0 keeps no averaged weights; set EMA.DECAY or HEADLINE raw")


def _validate_compilation(cfg: CfgNode) -> None:
    if cfg.TRAIN.COMPILE == "reduce-overhead" and cfg.EVAL.FLIP:
        raise ValueError(
            "TRAIN.COMPILE=reduce-overhead does not go with EVAL.FLIP: the mirror image's logits would take the place of the "
            "image's; set COMPILE to default or FLIP to false"
        )


def _validate_timelines(cfg: CfgNode) -> None:
    for name, replaced in TIMELINES.items():
        if not (text := get(cfg, name)):
            continue
        low, high = RANGES.get(replaced, (0, 1000 if "mmax" in cfg.AUG.RAND_AUGMENT else 10))
        for value in timeline.parse(text, name).values:
            if not low <= value <= high:
                raise ValueError(
                    f"{name}={shorten(text)}: {value:g} must lie between {low:g} and {high:g}, as {replaced} does"
                )
        if name in ("TIMELINE.EMA_DECAY", "TIMELINE.MAGNITUDE") and not get(cfg, replaced):
            raise ValueError(f"{name} has no effect while {replaced} is off; set {replaced}")
    if (text := cfg.TIMELINE.IMG_SIZE) and any(v % 1 for v in timeline.parse(text, "TIMELINE.IMG_SIZE").values):
        raise ValueError(f"TIMELINE.IMG_SIZE={shorten(text)}: sizes are whole numbers of pixels")


def _validate_distillation(cfg: CfgNode) -> None:
    kind, teacher, weights = cfg.DISTILL.TYPE, cfg.DISTILL.TEACHER, cfg.DISTILL.TEACHER_WEIGHTS
    given = " and ".join(
        f"DISTILL.{key}={shorten(value)}"
        for key, value in (("TEACHER", teacher), ("TEACHER_WEIGHTS", weights))
        if value
    )
    if kind == "none" and given:
        raise ValueError(
            f"{given}: no effect while DISTILL.TYPE=none; set TYPE to soft or hard, or leave the teacher out"
        )
    if kind != "none" and not teacher:
        raise ValueError(
            f"DISTILL.TYPE={kind} needs DISTILL.TEACHER, the name of a model of models/ or timm; set it, or TYPE to none"
        )
    if kind != "none" and not weights:
        raise ValueError(
            f"DISTILL.TEACHER={shorten(teacher)} has random weights while DISTILL.TEACHER_WEIGHTS is empty: it would teach nothing; "
            "name a file, or set it to pretrained for the weights that timm downloads"
        )
    if kind == "hard" and cfg.DISTILL.TAU != 1:
        raise ValueError(
            f"DISTILL.TAU={cfg.DISTILL.TAU:g} has no effect with DISTILL.TYPE=hard; leave TAU at 1, or set TYPE to soft"
        )


def _validate_classes(cfg: CfgNode) -> None:
    if cfg.MODEL.NUM_CLASSES and cfg.DATA.LOADER == "synthetic" and cfg.MODEL.NUM_CLASSES != cfg.DATA.SYNTHETIC_CLASSES:
        raise ValueError(
            f"MODEL.NUM_CLASSES={cfg.MODEL.NUM_CLASSES} but DATA.SYNTHETIC_CLASSES={cfg.DATA.SYNTHETIC_CLASSES}; "
            "set one of them to the other, or MODEL.NUM_CLASSES to 0"
        )


# In this order; the first error is raised.
VALIDATORS: tuple[Callable[[CfgNode], None], ...] = (
    _validate_choices,
    _validate_ranges,
    _validate_augmentation,
    _validate_names,
    _validate_custom_model,
    _validate_evaluation,
    _validate_data,
    _validate_mixing,
    _validate_schedule,
    _validate_recipe,
    _validate_compilation,
    _validate_timelines,
    _validate_distillation,
    _validate_classes,
)
