"""The configuration: every key, its default, and the checks that keep a run from starting wrong.

A YAML file states differences only; `BASE:` names one file or a list of files (relative to it) that are merged before it,
later ones winning. `--opts KEY VALUE ...` is merged last. The result is frozen: derived values (accumulation, scaled
learning rate) are computed in engine/ and never written back, so that the dump of a config loads to the same config.
"""

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from yacs.config import CfgNode

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
# Which weights of MODEL.INIT to take, raw or ema; "" takes those it holds, raw if both.
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
# Evaluation: the shorter side is resized to this, then cropped; 0 resizes the whole image to the crop.
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
# Largest L2 norm of the gradient; 0 is off.
_C.TRAIN.CLIP_GRAD = 0.0
# Numbers of the forward pass: bf16, fp16 (with loss scaling) or off (float32).
_C.TRAIN.AMP = "bf16"
# cuDNN may try algorithms and take the fastest; false asks it for deterministic ones.
_C.TRAIN.BENCHMARK = True

_C.OPTIM = CfgNode()
# Name in timm's optimiser factory, of those that take BETAS and EPS.
_C.OPTIM.NAME = "adamw"
# Peak learning rate, for a global batch of SCALE_BATCH; 0 there takes LR as it is.
_C.OPTIM.LR = 1e-3
_C.OPTIM.SCALE_BATCH = 0
_C.OPTIM.BETAS = [0.9, 0.999]
_C.OPTIM.EPS = 1e-8
# Not applied to biases, other one-dimensional parameters and what the model names in no_weight_decay().
_C.OPTIM.WEIGHT_DECAY = 0.05

_C.SCHEDULE = CfgNode()
# Linear warmup, in epochs, from WARMUP_LR; then a cosine over TRAIN.EPOCHS that ends at MIN_LR. Stepped every update.
_C.SCHEDULE.WARMUP_EPOCHS = 20.0
_C.SCHEDULE.WARMUP_LR = 1e-6
_C.SCHEDULE.MIN_LR = 1e-5
# WARMUP_LR and MIN_LR are scaled with the global batch as OPTIM.LR is.
_C.SCHEDULE.SCALED = False

_C.EMA = CfgNode()
# Decay per update of the averaged weights, which are evaluated and kept beside the raw ones; 0 is off.
_C.EMA.DECAY = 0.0

_C.EVAL = CfgNode()
# Images per forward pass and process.
_C.EVAL.BATCH = 128
# Evaluate every so many epochs (the last one always).
_C.EVAL.EVERY = 1

_C.CHECKPOINT = CfgNode()
# Also save in the middle of an epoch, every so many updates; 0 saves at the end of an epoch only.
_C.CHECKPOINT.EVERY_UPDATES = 0
# Checkpoints kept besides the best weights.
_C.CHECKPOINT.KEEP = 2

_C.LOG = CfgNode()
# A line and a metrics.jsonl row every so many updates.
_C.LOG.EVERY = 50
# Write TensorBoard events into the run directory.
_C.LOG.TENSORBOARD = True

CHOICES: dict[str, tuple[str, ...]] = {
    "DEVICE": ("auto", "cpu", "cuda"),
    "MODEL.INIT_WEIGHTS": ("", "raw", "ema"),
    "DATA.LOADER": ("torch", "dali", "synthetic"),
    "DATA.DALI_DEVICE": ("auto", "cpu", "gpu"),
    "DATA.INTERPOLATION": ("bicubic", "bilinear", "random"),
    "DATA.EVAL_INTERPOLATION": ("bicubic", "bilinear"),
    "AUG.ERASE_MODE": ("pixel", "rand", "const"),
    "AUG.ORDER": ("erase_then_mix", "mix_then_erase"),
    "TRAIN.AMP": ("bf16", "fp16", "off"),
    "OPTIM.NAME": ("adamw", "adam", "nadam", "nadamw", "radam", "lamb"),
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
    "OPTIM.LR": (0, 1e3),
    "OPTIM.SCALE_BATCH": (0, 1e9),
    "OPTIM.BETAS": (0, 0.999999999),
    "OPTIM.EPS": (1e-30, 1),
    "OPTIM.WEIGHT_DECAY": (0, 1e3),
    "SCHEDULE.WARMUP_EPOCHS": (0, 1e6),
    "SCHEDULE.WARMUP_LR": (0, 1e3),
    "SCHEDULE.MIN_LR": (0, 1e3),
    "EMA.DECAY": (0, 0.999999999),
    "EVAL.BATCH": (1, 1e9),
    "EVAL.EVERY": (1, 1e6),
    "CHECKPOINT.EVERY_UPDATES": (0, 1e12),
    "CHECKPOINT.KEEP": (1, 1e6),
    "LOG.EVERY": (1, 1e9),
}


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
    for file in [files] if isinstance(files, str) else files:
        _merge_file(cfg, Path(file), ())
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
    """Return the config as YAML that `load` reads back to the same config."""
    return str(cfg.dump(sort_keys=False))


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


def _merge_file(cfg: CfgNode, file: Path, parents: tuple[Path, ...]) -> None:
    path = file.resolve()
    if path in parents:
        raise ValueError(
            f"BASE: {file} includes itself ({' -> '.join(p.name for p in (*parents, path))}); break the circle"
        )
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
    bases = tree.pop("BASE", [])
    for base in bases if isinstance(bases, list) else [bases]:
        if not isinstance(base, str):
            raise ValueError(f"BASE in {file} must be a file name or a list of them, got {bases!r}")
        if base:
            _merge_file(cfg, path.parent / base, (*parents, path))
    _merge_tree(cfg, tree, "", str(file))


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
        if isinstance(value, list | tuple) and (len(value) == len(default)):
            return [_coerce(v, d, f"{name}[{i}]", source) for i, (v, d) in enumerate(zip(value, default, strict=True))]
        raise ValueError(f"{name} in {source} must be a list of {len(default)} like {default}, got {value!r}")
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
    if cfg.DATA.LOADER != "synthetic" and 0 < cfg.DATA.EVAL_RESIZE < cfg.DATA.IMG_SIZE:
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
    if cfg.SCHEDULE.MIN_LR > cfg.OPTIM.LR:
        raise ValueError(
            f"SCHEDULE.MIN_LR={cfg.SCHEDULE.MIN_LR:g} is above OPTIM.LR={cfg.OPTIM.LR:g}: the rate would rise; lower MIN_LR"
        )
    if cfg.SCHEDULE.SCALED and not cfg.OPTIM.SCALE_BATCH:
        raise ValueError("SCHEDULE.SCALED=true has no effect while OPTIM.SCALE_BATCH=0; set SCALE_BATCH (usually 512)")
    if cfg.SCHEDULE.WARMUP_EPOCHS >= cfg.TRAIN.EPOCHS:
        raise ValueError(
            f"SCHEDULE.WARMUP_EPOCHS={cfg.SCHEDULE.WARMUP_EPOCHS:g} must be shorter than TRAIN.EPOCHS={cfg.TRAIN.EPOCHS}; "
            "lower the warmup or train longer"
        )
    if cfg.MODEL.NUM_CLASSES and cfg.DATA.LOADER == "synthetic" and cfg.MODEL.NUM_CLASSES != cfg.DATA.SYNTHETIC_CLASSES:
        raise ValueError(
            f"MODEL.NUM_CLASSES={cfg.MODEL.NUM_CLASSES} but DATA.SYNTHETIC_CLASSES={cfg.DATA.SYNTHETIC_CLASSES}; "
            "set one of them to the other, or MODEL.NUM_CLASSES to 0"
        )
