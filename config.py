"""The configuration: every key, its default, and the checks that keep a run from starting wrong.

A YAML file states differences only; `BASE:` names one file or a list of files (relative to it) that are merged before it,
later ones winning. A `PUBLISHED:` section states what differs in the authors' own runs: with RECIPE.MODE published it is
merged right after its file, otherwise left out (`PUBLISHED: null` says that nothing was published, `{}` that nothing differs).
`--opts KEY VALUE ...` is merged last. The result is frozen: derived values (accumulation, scaled learning rate) are
computed in engine/ and never written back, so that the dump of a config loads to the same config.
"""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from yacs.config import CfgNode

import timeline

_C = CfgNode()

# One YAML file or a list of them to start from, relative to the file that says so; empty in a resolved config.
_C.BASE = [""]

# Where runs go: the run directory is OUTPUT/NAME, or OUTPUT/NAME-TAG.
_C.OUTPUT = "output"
# Name of the run; "" means <MODEL.NAME>_<DATA.IMG_SIZE>.
_C.NAME = ""
# Distinguishes runs of one config.
_C.TAG = ""
# auto (CUDA when there is one), cpu or cuda.
_C.DEVICE = "auto"

_C.RECIPE = CfgNode()
# corrected, or published: what the authors' trainers executed, quirks included (docs/recipes.md lists the differences).
_C.RECIPE.MODE = "corrected"
# The weights whose accuracy is the recipe's result, raw or ema. Both are evaluated and kept all the same.
_C.RECIPE.HEADLINE = "raw"
# What differs in the authors' runs, in YAML files; empty in a resolved config.
_C.PUBLISHED = CfgNode()

_C.MODEL = CfgNode()
# Any registered name of models/ (groupmixformer_mobile, ...) or of timm.
_C.MODEL.NAME = "groupmixformer_mobile"
# 0 takes the number from the data; any other number must equal it.
_C.MODEL.NUM_CLASSES = 0
# Dropout before the classifier.
_C.MODEL.DROP_RATE = 0.0
# Stochastic depth of the last block; the blocks before it rise linearly from 0.
_C.MODEL.DROP_PATH_RATE = 0.0
# Weights to start from (.safetensors, or a checkpoint of a run); "" starts from random weights.
_C.MODEL.INIT = ""
# Which weights of MODEL.INIT to take, raw or ema; "" takes those it holds, RECIPE.HEADLINE's if both.
_C.MODEL.INIT_WEIGHTS = ""
# BatchNorm statistics over all processes (torch.nn.SyncBatchNorm, CUDA only) instead of over each micro-batch.
_C.MODEL.SYNC_BN = False

_C.DATA = CfgNode()
# Folder with train/<class>/*.jpg and val/<class>/*.jpg, or with the archives that hold them: docs/data.md.
_C.DATA.PATH = ""
# File that tells the classes of validation images in an archive without class folders; "" looks beside the archive.
_C.DATA.VAL_LABELS = ""
# torch (decodes JPEGs on the CPU), dali (NVIDIA DALI, on a GPU or the CPU) or synthetic (random images, no decoding: the
# ceiling of everything else).
_C.DATA.LOADER = "torch"
# Where DALI decodes: cpu, gpu, or auto, which is where the model trains.
_C.DATA.DALI_DEVICE = "auto"
# Training and evaluation crop, pixels.
_C.DATA.IMG_SIZE = 224
# File that fixes the order of the classes; "" sorts the folder names.
_C.DATA.CLASS_INDEX = ""
# Loader processes of each training process; -1 chooses by the cores.
_C.DATA.WORKERS = -1
# Batches each worker keeps ready.
_C.DATA.PREFETCH = 4
# Shuffle blocks of this many neighbouring images, then inside windows of 256 blocks (networked storage); 0 shuffles all.
_C.DATA.BLOCK_SHUFFLE = 0
# Share of the training images that may be unreadable, rounded up to whole images; 0 stops at the first.
_C.DATA.MAX_BAD_SHARE = 0.001
# Evaluation with EVAL.MODE center: the shorter side is resized to this, then cropped; 0 resizes the whole image to the
# crop. EVAL.CROP_PCT, if set, comes before it.
_C.DATA.EVAL_RESIZE = 256
# Resampling for training crops (bicubic, bilinear, random of the two) ...
_C.DATA.INTERPOLATION = "bicubic"
# ... and for evaluation.
_C.DATA.EVAL_INTERPOLATION = "bicubic"
# Per-channel mean and standard deviation of the normalisation, of pixels in 0..1.
_C.DATA.MEAN = [0.485, 0.456, 0.406]
_C.DATA.STD = [0.229, 0.224, 0.225]
# Sizes of the synthetic data set.
_C.DATA.SYNTHETIC_TRAIN = 12800
_C.DATA.SYNTHETIC_VAL = 1000
# Classes of the synthetic data set.
_C.DATA.SYNTHETIC_CLASSES = 1000

_C.AUG = CfgNode()
# Area of the random crop, as a share of the image, and its aspect ratio.
_C.AUG.SCALE = [0.08, 1.0]
_C.AUG.RATIO = [0.75, 1.3333333333333333]
# Probability of a horizontal flip.
_C.AUG.HFLIP = 0.5
# timm's policy string; "" is off.
_C.AUG.RAND_AUGMENT = "rand-m9-mstd0.5-inc1"
# Random erasing: probability, fill (pixel: noise, rand: one colour, const: mean), boxes, area as a share of the crop.
_C.AUG.ERASE_PROB = 0.25
_C.AUG.ERASE_MODE = "pixel"
_C.AUG.ERASE_COUNT = 1
_C.AUG.ERASE_AREA = [0.02, 0.3333333333333333]
# Beta parameters of mixup and cutmix, 0 is off.
_C.AUG.MIXUP = 0.8
_C.AUG.CUTMIX = 1.0
# Probability that a micro-batch is mixed at all, and that cutmix is taken when both are on.
_C.AUG.MIX_PROB = 1.0
_C.AUG.MIX_SWITCH_PROB = 0.5
# erase_then_mix, or mix_then_erase (SG-Former).
_C.AUG.ORDER = "erase_then_mix"
# Label smoothing of the training targets.
_C.AUG.LABEL_SMOOTHING = 0.1
# How often an image appears in an epoch's list (repeated augmentation: 3; the epoch keeps its length).
_C.AUG.REPEATS = 1

_C.TRAIN = CfgNode()
# Passes over the training images.
_C.TRAIN.EPOCHS = 300
# Images an update learns from, on all processes together ...
_C.TRAIN.GLOBAL_BATCH = 1024
# ... in pieces of this many images; GLOBAL_BATCH = MICRO_BATCH x processes x accumulation, which follows.
_C.TRAIN.MICRO_BATCH = 128
# Seed of everything random: order, augmentation, mixing, drop path, initial weights.
_C.TRAIN.SEED = 0
# Train with the model in evaluation mode, as DeiT and STViT fine-tune: no dropout, no drop path, frozen BatchNorm statistics.
_C.TRAIN.EVAL_MODE = False
# Largest L2 norm of the gradient; 0 is off.
_C.TRAIN.CLIP_GRAD = 0.0
# An update whose loss or gradient is not finite is skipped. After this many in a row the run goes back to its last good
# checkpoint, once; the next time it stops.
_C.TRAIN.MAX_SKIPPED = 10
# Numbers of the forward pass: bf16, fp16 (with loss scaling) or off (float32).
_C.TRAIN.AMP = "bf16"
# cuDNN may try algorithms and take the fastest; false asks it for deterministic ones.
_C.TRAIN.BENCHMARK = True

_C.OPTIM = CfgNode()
# Name in timm's optimiser factory ("sgd" is Nesterov's, "momentum" the plain one).
_C.OPTIM.NAME = "adamw"
# Peak learning rate, for a global batch of SCALE_BATCH; 0 there takes LR as it is.
_C.OPTIM.LR = 1e-3
_C.OPTIM.SCALE_BATCH = 0
# Of the optimisers that have them; [] and 0 leave them at the optimiser's own.
_C.OPTIM.BETAS = []
_C.OPTIM.EPS = 0.0
_C.OPTIM.MOMENTUM = 0.9
# Not applied to biases, other one-dimensional parameters and what the model names in no_weight_decay().
_C.OPTIM.WEIGHT_DECAY = 0.05
# Learning rate of each layer (stem, every block) relative to the one after it; 1 is off, 0.75 usual for fine-tuning.
_C.OPTIM.LAYER_DECAY = 1.0

_C.SCHEDULE = CfgNode()
# How the learning rate falls after the warmup, in timm's formulas: cosine, tanh or poly to MIN_LR, step, multistep or constant.
_C.SCHEDULE.NAME = "cosine"
# Whether it changes at every update or only at every epoch.
_C.SCHEDULE.UNIT = "update"
# Steps (updates or epochs, as UNIT says) that it lags behind: 1 takes the first value twice, as two of the authors' trainers do.
_C.SCHEDULE.DELAY = 0
# Linear warmup, in epochs, from WARMUP_LR; it takes the place of the schedule's first epochs and does not lengthen it.
_C.SCHEDULE.WARMUP_EPOCHS = 20.0
_C.SCHEDULE.WARMUP_LR = 1e-6
# Where cosine, tanh and poly end after TRAIN.EPOCHS.
_C.SCHEDULE.MIN_LR = 1e-5
# Epochs after TRAIN.EPOCHS, at the learning rate that those end with.
_C.SCHEDULE.COOLDOWN_EPOCHS = 0
# WARMUP_LR and MIN_LR are scaled with the global batch as OPTIM.LR is.
_C.SCHEDULE.SCALED = False
# step: epochs between two falls; multistep: the epochs of the falls; both: what the rate is multiplied by.
_C.SCHEDULE.DECAY_EPOCHS = 30.0
_C.SCHEDULE.MILESTONES = []
_C.SCHEDULE.DECAY_RATE = 0.1
# poly: the exponent.
_C.SCHEDULE.POWER = 1.0

# What changes from epoch to epoch: "" leaves the key that is named; else EPOCH:VALUE points, "0:0.4, 260:0.6" (steps) or
# "0:0.1 -> 100:0.4" (linear).
_C.TIMELINE = CfgNode()
# In place of MODEL.DROP_PATH_RATE.
_C.TIMELINE.DROP_PATH_RATE = ""
# In place of EMA.DECAY, which must be on.
_C.TIMELINE.EMA_DECAY = ""
# Magnitude of AUG.RAND_AUGMENT, in place of its m.
_C.TIMELINE.MAGNITUDE = ""
# In place of AUG.MIX_PROB; "0:1, 280:0" turns mixing off at epoch 280.
_C.TIMELINE.MIX_PROB = ""
# Size of the training images, in place of DATA.IMG_SIZE, which stays the size of evaluation; ramps go in multiples of 32.
_C.TIMELINE.IMG_SIZE = ""

_C.DISTILL = CfgNode()
# DeiT's distillation: soft (the teacher's distribution), hard (its most probable class), or none.
_C.DISTILL.TYPE = "none"
# The model that teaches: any registered name of models/ or of timm, for the classes of the data.
_C.DISTILL.TEACHER = ""
# Its weights: a file of any layout that MODEL.INIT takes, or pretrained for those that timm downloads.
_C.DISTILL.TEACHER_WEIGHTS = ""
# Share of the distillation loss; the rest is the loss on the targets.
_C.DISTILL.ALPHA = 0.5
# Temperature that soft divides both models' logits by.
_C.DISTILL.TAU = 1.0

_C.EMA = CfgNode()
# Decay per update of the averaged weights, which are evaluated and kept beside the raw ones; 0 is off.
_C.EMA.DECAY = 0.0

_C.EVAL = CfgNode()
# Images per forward pass and process.
_C.EVAL.BATCH = 128
# Evaluate every so many epochs (the last one always).
_C.EVAL.EVERY = 1
# How an image becomes the DATA.IMG_SIZE square, by timm's names: center (shorter side resized, centre cropped), squash
# (squeezed to a square) or border (longer side resized, the rest filled with DATA.MEAN). squash and border show the whole
# image unless CROP_PCT is below 1.
_C.EVAL.MODE = "center"
# The crop as a share of the resized side: that is floor(IMG_SIZE / CROP_PCT) pixels. 0 leaves it to DATA.EVAL_RESIZE with
# center, and is 1 with squash and border.
_C.EVAL.CROP_PCT = 0.0
# Average the logits of the image and of its mirror image; takes twice as long.
_C.EVAL.FLIP = False

_C.CHECKPOINT = CfgNode()
# Also save in the middle of an epoch, every so many updates; 0 saves at the end of an epoch only.
_C.CHECKPOINT.EVERY_UPDATES = 0
# Checkpoints kept besides the best weights.
_C.CHECKPOINT.KEEP = 2
# Failures to write one, in a row (disk full, no permission), after which the run stops; before, it trains on.
_C.CHECKPOINT.MAX_FAILURES = 3

_C.DIST = CfgNode()
# Seconds within which all processes of a run must have started.
_C.DIST.START_TIMEOUT = 300.0
# Seconds after which an exchange between processes fails: a process is gone, or does something else than the others.
_C.DIST.TIMEOUT = 1800.0

_C.LOG = CfgNode()
# A line and a metrics.jsonl row every so many updates.
_C.LOG.EVERY = 50
# Write TensorBoard events into the run directory.
_C.LOG.TENSORBOARD = True

CHOICES: dict[str, tuple[str, ...]] = {
    "DEVICE": ("auto", "cpu", "cuda"),
    "RECIPE.MODE": ("corrected", "published"),
    "RECIPE.HEADLINE": ("raw", "ema"),
    "MODEL.INIT_WEIGHTS": ("", "raw", "ema"),
    "DATA.LOADER": ("torch", "dali", "synthetic"),
    "DATA.DALI_DEVICE": ("auto", "cpu", "gpu"),
    "DATA.INTERPOLATION": ("bicubic", "bilinear", "random"),
    "DATA.EVAL_INTERPOLATION": ("bicubic", "bilinear"),
    "AUG.ERASE_MODE": ("pixel", "rand", "const"),
    "AUG.ORDER": ("erase_then_mix", "mix_then_erase"),
    "EVAL.MODE": ("center", "squash", "border"),
    "TRAIN.AMP": ("bf16", "fp16", "off"),
    "OPTIM.NAME": (
        *("adamw", "adam", "nadam", "nadamw", "radam", "adabelief", "adan", "adopt", "lamb", "lion"),
        *("sgd", "momentum", "rmsproptf", "madgrad", "adafactor", "muon"),
    ),
    "SCHEDULE.NAME": ("cosine", "tanh", "poly", "step", "multistep", "constant"),
    "SCHEDULE.UNIT": ("update", "epoch"),
    "DISTILL.TYPE": ("none", "soft", "hard"),
}

# Smallest and largest value, both allowed. Of a list, of each entry.
RANGES: dict[str, tuple[float, float]] = {
    "MODEL.NUM_CLASSES": (0, 1e9),
    "MODEL.DROP_RATE": (0, 0.999),
    "MODEL.DROP_PATH_RATE": (0, 0.999),
    "DATA.IMG_SIZE": (16, 1e5),
    "DATA.WORKERS": (-1, 4096),
    "DATA.PREFETCH": (1, 1024),
    "DATA.BLOCK_SHUFFLE": (0, 1e9),
    "DATA.MAX_BAD_SHARE": (0, 1),
    "DATA.EVAL_RESIZE": (0, 1e5),
    "DATA.MEAN": (0, 1),
    "DATA.STD": (1e-3, 1),
    "DATA.SYNTHETIC_TRAIN": (1, 1e12),
    "DATA.SYNTHETIC_VAL": (1, 1e12),
    "DATA.SYNTHETIC_CLASSES": (1, 1e9),
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
    "LOG.EVERY": (1, 1e9),
}

RESOLVED = "resolved"  # stands under PUBLISHED in a dump
TO_MIN_LR = ("cosine", "tanh", "poly")  # the schedules that end at SCHEDULE.MIN_LR

# Timelines: the key whose place each takes (whose range its values keep).
TIMELINES = {
    "TIMELINE.DROP_PATH_RATE": "MODEL.DROP_PATH_RATE",
    "TIMELINE.EMA_DECAY": "EMA.DECAY",
    "TIMELINE.MAGNITUDE": "AUG.RAND_AUGMENT",
    "TIMELINE.MIX_PROB": "AUG.MIX_PROB",
    "TIMELINE.IMG_SIZE": "DATA.IMG_SIZE",
}

SMALLEST_CROP_PCT = 0.05  # below it, images would be enlarged beyond reason


def defaults() -> CfgNode:
    """Return a fresh, mutable copy of the schema with its defaults."""
    return _C.clone()


def load(
    files: str | Sequence[str] = (), opts: Sequence[str] = (), flags: Mapping[str, tuple[str, str]] | None = None
) -> CfgNode:
    """Merge the files, KEY VALUE pairs and flags into the defaults; return the checked, frozen config.

    `flags` maps a flag, as errors call it, to its key and value.

    Raises ValueError, naming key, value, source and remedy, for anything the schema does not declare or allow.
    """
    cfg = defaults()
    names = [files] if isinstance(files, str) else list(files)
    steps = [step for file in names for step in _read(cfg, Path(file), ())]
    given = {**dict(zip(opts[::2], opts[1::2], strict=False)), **dict((flags or {}).values())}
    for step in _of_mode(cfg, steps, given.get("RECIPE.MODE"), " ".join(names)):
        _merge_tree(cfg, step.tree, "", step.source)
    _merge_opts(cfg, opts)
    for flag, (key, value) in (flags or {}).items():
        if key in opts[::2]:
            raise ValueError(f"{flag} {value} and --opts {key} set the same key; give one of them")
        _set(cfg, key, value, flag)
    cfg.BASE = [""]
    validate(cfg)
    cfg.freeze()
    return cfg


def dump(cfg: CfgNode) -> str:
    """Return the config as YAML that `load` reads back to the same config, in its mode and no other."""
    return str(cfg.dump(sort_keys=False)).replace("PUBLISHED: {}", f"PUBLISHED: {RESOLVED}")


def keys(node: CfgNode, prefix: str = "") -> list[str]:
    """List the dotted names of all values below a node."""
    names: list[str] = []
    for key, value in node.items():
        names += keys(value, f"{prefix}{key}.") if isinstance(value, CfgNode) else [prefix + key]
    return names


def get(cfg: CfgNode, key: str) -> Any:
    """Return the value under a dotted name."""
    for part in key.split("."):
        cfg = cfg[part]
    return cfg


def run_name(cfg: CfgNode) -> str:
    """Return the name of the run's directory below OUTPUT."""
    name = cfg.NAME or f"{cfg.MODEL.NAME}_{cfg.DATA.IMG_SIZE}"
    return f"{name}-{cfg.TAG}" if cfg.TAG else name


class _UniqueKeys(yaml.SafeLoader):
    """A YAML loader that refuses a key given twice in one section, where PyYAML silently takes the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"{key.value} is given twice", problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


@dataclass
class _Step:
    """Keys to merge: a file's, or its PUBLISHED section. `ends` says that what was published before counts no more."""

    tree: dict[str, Any]
    source: str
    published: bool = False
    ends: bool = False
    resolved: bool = False  # of a dump, which is in one mode for good


def _of_mode(cfg: CfgNode, steps: Sequence[_Step], asked: str | None, names: str) -> Iterator[_Step]:
    """Yield the steps that count in the mode asked for, else in the one the files say."""
    said = [step.tree["RECIPE"]["MODE"] for step in steps if "MODE" in (step.tree.get("RECIPE") or {})]
    mode = asked or (said[-1] if said else cfg.RECIPE.MODE)
    for step in steps:
        own = (step.tree.get("RECIPE") or {}).get("MODE", "corrected")
        if step.resolved and own != mode:
            raise ValueError(
                f"RECIPE.MODE={mode}: {step.source} is the resolved config of a run in mode {own}; start from the recipe's file"
            )
    last = max((i for i, step in enumerate(steps) if step.ends), default=-1)
    overlays = [step for step in steps[last + 1 :] if step.published]
    if mode == "published" and not overlays and not any(step.resolved for step in steps):
        raise ValueError(
            f"RECIPE.MODE=published: {names or 'no config'} states no PUBLISHED section, nobody published such a run; leave "
            "the mode at corrected"
        )
    for i, step in enumerate(steps):
        if not step.published or (mode == "published" and i > last):
            yield step


def _read(cfg: CfgNode, file: Path, parents: tuple[Path, ...]) -> Iterator[_Step]:
    """Yield what a file and those it builds on say, in the order in which it counts."""
    path = file.resolve()
    if path in parents:
        raise ValueError(
            f"BASE: {file} includes itself ({' -> '.join(p.name for p in (*parents, path))}); break the circle"
        )
    tree = _parse(file, parents)
    bases = tree.pop("BASE", [])
    for base in bases if isinstance(bases, list) else [bases]:
        if not isinstance(base, str):
            raise ValueError(f"BASE in {file} must be a file name or a list of them, got {base!r}")
        if base:
            yield from _read(cfg, path.parent / base, (*parents, path))
    overlay = tree.pop("PUBLISHED", False)
    if not (overlay in (None, False, RESOLVED) or isinstance(overlay, dict)):
        raise ValueError(f"PUBLISHED in {file} must be a section of keys, {{}} or null, got {overlay!r}")
    yield _Step(tree, str(file), ends=overlay is None, resolved=overlay == RESOLVED)
    if isinstance(overlay, dict):
        source = f"PUBLISHED of {file}"
        _merge_tree(cfg.clone(), overlay, "", source)  # checked also where it is not used
        yield _Step(overlay, source, published=True)


def _parse(file: Path, parents: tuple[Path, ...]) -> dict[str, Any]:
    """Return a YAML file's tree; ValueError says what is wrong with it, or what lies near it."""
    if not file.is_file():
        said_by = f", named by BASE in {parents[-1]}" if parents else ""
        folder = next((p for p in file.parents if p.is_dir()), Path())
        near = difflib.get_close_matches(file.name, [p.name for p in folder.glob("[!.]*.yaml")], n=3, cutoff=0.3)
        hint = f"; near it lie {', '.join(str(folder / n) for n in near)}" if near else ""
        what = "is a folder, not a file" if file.is_dir() else "does not exist"
        raise ValueError(f"config file {file} {what}{said_by}{hint}")
    try:
        tree = yaml.load(file.read_text(encoding="utf-8"), _UniqueKeys)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"config file {file} is not valid YAML: {error}") from error
    if tree is None:
        tree = {}
    if not isinstance(tree, dict):
        raise ValueError(f"config file {file} must hold KEY: VALUE lines, not a {type(tree).__name__}")
    if not isinstance(tree.get("RECIPE", {}), dict):
        raise ValueError(f"RECIPE in {file} is a section, got {tree['RECIPE']!r}; give its keys, e.g. MODE")
    return tree


def _merge_tree(cfg: CfgNode, tree: dict[str, Any], prefix: str, source: str) -> None:
    node = get(cfg, prefix[:-1]) if prefix else cfg
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if key not in node:
            raise ValueError(_unknown(cfg, name, source))
        if isinstance(node[key], CfgNode):
            if not isinstance(value, dict):
                raise ValueError(
                    f"{name} in {source} is a section, got {value!r}; give its keys, e.g. {keys(node[key])[:3]}"
                )
            _merge_tree(cfg, value, f"{name}.", source)
        else:
            node[key] = _coerce(value, node[key], name, source)


def _merge_opts(cfg: CfgNode, opts: Sequence[str]) -> None:
    joined = next((text for text in opts[::2] if "=" in text), None)
    if joined:
        raise ValueError(
            f"--opts takes KEY VALUE pairs, with a space: write {joined.replace('=', ' ', 1)}, not {joined}"
        )
    if len(opts) % 2:
        raise ValueError(f"--opts takes KEY VALUE pairs; {opts[-1]!r} has no value (got {' '.join(opts)})")
    for name, text in zip(opts[::2], opts[1::2], strict=True):
        if name not in keys(cfg) or name == "BASE":
            raise ValueError(_unknown(cfg, name, "--opts"))
        _set(cfg, name, text, "--opts")


def _set(cfg: CfgNode, name: str, text: str, source: str) -> None:
    section, _, key = name.rpartition(".")
    node = get(cfg, section) if section else cfg
    try:
        value = text if isinstance(node[key], str) else yaml.safe_load(text)
    except yaml.YAMLError:
        value = text
    node[key] = _coerce(value, node[key], name, source)


def _unknown(cfg: CfgNode, name: str, source: str) -> str:
    known = [key for key in keys(cfg) if key != "BASE"]
    near = difflib.get_close_matches(name.upper(), known, n=1, cutoff=0.0)
    leaf = [key for key in known if key.rsplit(".", 1)[-1] == name.rsplit(".", 1)[-1].upper()]
    return f"unknown key {name} in {source}; did you mean {(leaf or near)[0]}? All keys stand in config.py"


def _coerce(value: Any, default: Any, name: str, source: str) -> Any:
    wanted = type(default)
    if isinstance(default, list):
        if not default and isinstance(value, list | tuple):  # of any length, of numbers
            return [_coerce(v, 0.0, f"{name}[{i}]", source) for i, v in enumerate(value)]
        if isinstance(value, list | tuple) and (len(value) == len(default)):
            return [_coerce(v, d, f"{name}[{i}]", source) for i, (v, d) in enumerate(zip(value, default, strict=True))]
        shape = f"of {len(default)} like {default}" if default else "of numbers, e.g. [150, 225]"
        raise ValueError(f"{name} in {source} must be a list {shape}, got {value!r}")
    if wanted is float and isinstance(value, int | float | str) and not isinstance(value, bool):
        try:
            return float(value)  # an int is fine, and so is 1e-3, which YAML reads as a string
        except ValueError:
            pass
    if type(value) is wanted:
        return value
    if wanted is str and isinstance(value, bool):
        raise ValueError(
            f"{name} in {source} must be a word: YAML reads on, off, yes and no as true or false; put it in quotes"
        )
    raise ValueError(
        f"{name} in {source} must be {wanted.__name__}, got {value!r} ({type(value).__name__}); its default is {default!r}"
    )


def validate(cfg: CfgNode) -> None:
    """Raise ValueError for a value out of range or a combination that cannot run."""
    for name, allowed in CHOICES.items():
        if (value := get(cfg, name)) not in allowed:
            near = difflib.get_close_matches(value.lower(), allowed, n=1, cutoff=0.5)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}{hint}")
    for name, (low, high) in RANGES.items():
        value = get(cfg, name)
        for number in value if isinstance(value, list) else [value]:
            if not low <= number <= high:
                raise ValueError(f"{name} must lie between {low:g} and {high:g}, got {value}")
    for name in ("AUG.SCALE", "AUG.RATIO", "AUG.ERASE_AREA"):
        low, high = get(cfg, name)
        if low > high:
            raise ValueError(f"{name} must be [smallest, largest], got {[low, high]}")
    for name in ("NAME", "TAG"):
        if "/" in cfg[name] or cfg[name] in (".", ".."):
            raise ValueError(f"{name} is one folder name, got {cfg[name]!r}; use OUTPUT for the path")
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
    if cfg.DATA.LOADER != "dali" and cfg.DATA.DALI_DEVICE != "auto":
        raise ValueError(
            f"DATA.DALI_DEVICE={cfg.DATA.DALI_DEVICE} has no effect while DATA.LOADER={cfg.DATA.LOADER}; set DATA.LOADER to dali"
        )
    if cfg.TRAIN.MICRO_BATCH == 1 and (cfg.AUG.MIXUP or cfg.AUG.CUTMIX) and cfg.AUG.MIX_PROB:
        raise ValueError(
            "TRAIN.MICRO_BATCH=1 leaves mixup and cutmix no partner; set AUG.MIX_PROB to 0 or raise it to 2"
        )
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
        raise ValueError(f"SCHEDULE.MILESTONES must rise, got {cfg.SCHEDULE.MILESTONES}")
    if cfg.RECIPE.HEADLINE == "ema" and not cfg.EMA.DECAY:
        raise ValueError("RECIPE.HEADLINE=ema but EMA.DECAY=0 keeps no averaged weights; set EMA.DECAY or HEADLINE raw")
    _validate_timelines(cfg)
    _validate_distillation(cfg)
    if cfg.MODEL.NUM_CLASSES and cfg.DATA.LOADER == "synthetic" and cfg.MODEL.NUM_CLASSES != cfg.DATA.SYNTHETIC_CLASSES:
        raise ValueError(
            f"MODEL.NUM_CLASSES={cfg.MODEL.NUM_CLASSES} but DATA.SYNTHETIC_CLASSES={cfg.DATA.SYNTHETIC_CLASSES}; "
            "set one of them to the other, or MODEL.NUM_CLASSES to 0"
        )


def _validate_timelines(cfg: CfgNode) -> None:
    for name, instead in TIMELINES.items():
        if not (text := get(cfg, name)):
            continue
        low, high = RANGES.get(instead, (0, 1000 if "mmax" in cfg.AUG.RAND_AUGMENT else 10))
        for value in timeline.parse(text, name).values:
            if not low <= value <= high:
                raise ValueError(f"{name}={text!r}: {value:g} must lie between {low:g} and {high:g}, as {instead} does")
        if name in ("TIMELINE.EMA_DECAY", "TIMELINE.MAGNITUDE") and not get(cfg, instead):
            raise ValueError(f"{name} has no effect while {instead} is off; set {instead}")
    if (text := cfg.TIMELINE.IMG_SIZE) and any(v % 1 for v in timeline.parse(text, "TIMELINE.IMG_SIZE").values):
        raise ValueError(f"TIMELINE.IMG_SIZE={text!r}: sizes are whole numbers of pixels")


def _validate_distillation(cfg: CfgNode) -> None:
    kind, teacher, weights = cfg.DISTILL.TYPE, cfg.DISTILL.TEACHER, cfg.DISTILL.TEACHER_WEIGHTS
    given = " and ".join(
        f"DISTILL.{key}={value!r}" for key, value in (("TEACHER", teacher), ("TEACHER_WEIGHTS", weights)) if value
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
            f"DISTILL.TEACHER={teacher!r} has random weights while DISTILL.TEACHER_WEIGHTS is empty: it would teach nothing; "
            "name a file, or say pretrained for the weights that timm downloads"
        )
    if kind == "hard" and cfg.DISTILL.TAU != 1:
        raise ValueError(
            f"DISTILL.TAU={cfg.DISTILL.TAU:g} has no effect with DISTILL.TYPE=hard; leave TAU at 1, or set TYPE to soft"
        )
