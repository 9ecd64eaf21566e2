"""Build everything a run takes from data/ out of its config: the only file here that reads it.

data = build_data(cfg, rank, world, device)        train.py
data = build_eval_data(cfg, rank, world, device)   eval.py, which needs no train/
"""

import hashlib
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from yacs.config import CfgNode

from data.device import DeviceStage
from data.erasing import EraseBoxes
from data.folder import FolderSource, class_folders, read_class_index, scan, scan_labelled, split_folder, val_folder
from data.labels import class_names, label_folders
from data.mixing import Mixing
from data.rand_augment import parse_policy
from data.stream import IndexStream
from data.synthetic import SyntheticEval, SyntheticTrain
from data.torch_loader import EvalLoader, TrainLoader
from data.transforms import EvalTransform, TrainTransform
from timeline import Timeline, parse_optional

MAX_WORKERS = 16  # of each training process, when DATA.WORKERS=-1


@dataclass
class EvalData:
    """What an evaluation takes."""

    val: EvalLoader | SyntheticEval
    stage: DeviceStage
    classes: list[str]
    fingerprint: dict[str, Any]  # counts and hashes that tell whether two runs saw the same data
    notes: list[str] = field(default_factory=list)  # what a person should know at start-up
    origin: str = "synthetic images"  # where the images come from, and what told their classes
    names: Callable[[int], str] = str  # an image's file below that folder, by its index
    transform: EvalTransform | None = None  # None: images that are made as the model takes them
    answers: list[int] | None = None  # the only classes that an answer may name; None: all


@dataclass(frozen=True)
class ValFolder:
    """A folder of class folders, and the model whose classes they are: --val-path."""

    path: str
    known: Sequence[str] = ()  # the checkpoint's class names
    num_classes: int = 0  # the checkpoint's, 0 if it does not say
    all_logits: bool = False  # a folder of some of the classes leaves the others as answers


@dataclass
class Data(EvalData):
    """What a training run takes."""

    train: TrainLoader | SyntheticTrain = field(kw_only=True)
    stream: IndexStream = field(kw_only=True)


def build_data(cfg: CfgNode, rank: int, world: int, device: torch.device | str) -> Data:
    """Build the loaders, the device stage and the index stream of a training run."""
    device = torch.device(device)
    if cfg.DATA.LOADER == "synthetic":
        return _synthetic(cfg, rank, world, device)
    classes = _classes(cfg)
    train_source = scan(split_folder(cfg.DATA.PATH, "train"), classes, must_hold_all=True)
    val_source = scan(split_folder(cfg.DATA.PATH, "val"), classes, must_hold_all=False)
    stream = _stream(cfg, len(train_source))
    transform = TrainTransform(
        size=cfg.DATA.IMG_SIZE,
        seed=cfg.TRAIN.SEED,
        scale=tuple(cfg.AUG.SCALE),
        ratio=tuple(cfg.AUG.RATIO),
        hflip=cfg.AUG.HFLIP,
        interpolation=cfg.DATA.INTERPOLATION,
        policy=parse_policy(cfg.AUG.RAND_AUGMENT) if cfg.AUG.RAND_AUGMENT else None,
        erase=_erase_boxes(cfg),
        fill=_fill(cfg),
        sizes=_sizes(cfg),
        magnitude=parse_optional(cfg.TIMELINE.MAGNITUDE, "TIMELINE.MAGNITUDE"),
    )
    pin = device.type == "cuda"
    train = TrainLoader(train_source, transform, stream, rank, world, _workers(cfg), cfg.DATA.PREFETCH, pin)
    return Data(
        val=_eval_loader(cfg, val_source, rank, world, device),
        stage=_stage(cfg, len(classes), device),
        classes=classes,
        fingerprint=_fingerprint(classes, train=train_source, val=val_source),
        notes=_notes(val_source, classes),
        origin=str(val_source.root),
        names=val_source.relative,
        transform=_eval_transform(cfg),
        train=train,
        stream=stream,
    )


def build_eval_data(
    cfg: CfgNode, rank: int, world: int, device: torch.device | str, folder: ValFolder | None = None
) -> EvalData:
    """Build the evaluation loader and the device stage.

    The images are those of val/, with the classes of CLASS_INDEX, train/ or val/; or those of `folder`.
    """
    device = torch.device(device)
    if cfg.DATA.LOADER == "synthetic":
        if folder:
            raise ValueError(f"--val-path {folder.path} has no effect with DATA.LOADER=synthetic; set it to torch")
        return _synthetic(cfg, rank, world, device)
    answers, notes = None, []
    if folder:
        classes, source, origin = _labelled(cfg, folder)
        present = np.unique(source.labels).tolist()
        answers = present if len(present) < len(classes) and not folder.all_logits else None
    else:
        classes = _classes(cfg)
        source = scan(split_folder(cfg.DATA.PATH, "val"), classes, must_hold_all=False)
        origin, notes = str(source.root), _notes(source, classes)
    return EvalData(
        val=_eval_loader(cfg, source, rank, world, device),
        stage=_stage(cfg, len(classes), device),
        classes=classes,
        fingerprint=_fingerprint(classes, val=source),
        notes=notes,
        origin=origin,
        names=source.relative,
        transform=_eval_transform(cfg),
        answers=answers,
    )


def _labelled(cfg: CfgNode, folder: ValFolder) -> tuple[list[str], FolderSource, str]:
    """Return the model's classes, the folder's images with their labels among them, and a sentence on both."""
    lists = class_names(folder.known, cfg.DATA.CLASS_INDEX, folder.num_classes or cfg.MODEL.NUM_CLASSES)
    source, classes = next(iter(lists.items()))
    _check_count(cfg, classes, source)
    root = val_folder(folder.path)
    labels, how = label_folders(class_folders(root), lists, folder.path)
    images = scan_labelled(root, labels)
    return classes, images, f"{root}, {len(labels)} folders {how}"


def _classes(cfg: CfgNode) -> list[str]:
    """Return the classes in label order, checked against MODEL.NUM_CLASSES."""
    if cfg.DATA.CLASS_INDEX:
        classes, where = read_class_index(cfg.DATA.CLASS_INDEX), cfg.DATA.CLASS_INDEX
    else:
        split = "train" if (Path(cfg.DATA.PATH).expanduser() / "train").is_dir() else "val"
        folder = split_folder(cfg.DATA.PATH, split)
        classes, where = class_folders(folder), str(folder)
    _check_count(cfg, classes, where)
    return classes


def _check_count(cfg: CfgNode, classes: list[str], where: str) -> None:
    wanted = cfg.MODEL.NUM_CLASSES
    if wanted not in (0, len(classes)):
        raise ValueError(
            f"MODEL.NUM_CLASSES={wanted} but {where} holds {len(classes)} classes; "
            f"set MODEL.NUM_CLASSES to {len(classes)}, or to 0 to take the number from the data"
        )


def _stream(cfg: CfgNode, num_samples: int) -> IndexStream:
    batches = cfg.TRAIN.GLOBAL_BATCH, cfg.TRAIN.MICRO_BATCH
    return IndexStream(num_samples, cfg.TRAIN.SEED, *batches, repeats=cfg.AUG.REPEATS)


def _erase_boxes(cfg: CfgNode) -> EraseBoxes:
    return EraseBoxes(cfg.AUG.ERASE_PROB, cfg.AUG.ERASE_COUNT, tuple(cfg.AUG.ERASE_AREA))


def _sizes(cfg: CfgNode) -> Timeline | None:
    return parse_optional(cfg.TIMELINE.IMG_SIZE, "TIMELINE.IMG_SIZE", multiple=32)


def _level(mean: float) -> int:
    return min(255, round(255 * mean))


def _stage(cfg: CfgNode, num_classes: int, device: torch.device) -> DeviceStage:
    aug = cfg.AUG
    mixing = Mixing(num_classes, aug.MIXUP, aug.CUTMIX, aug.MIX_PROB, aug.MIX_SWITCH_PROB, aug.LABEL_SMOOTHING)
    mix_prob = parse_optional(cfg.TIMELINE.MIX_PROB, "TIMELINE.MIX_PROB")
    return DeviceStage(mixing, cfg.DATA.MEAN, cfg.DATA.STD, cfg.TRAIN.SEED, device, aug.ERASE_MODE, aug.ORDER, mix_prob)


def _eval_loader(cfg: CfgNode, source: FolderSource, rank: int, world: int, device: torch.device) -> EvalLoader:
    pin = device.type == "cuda"
    return EvalLoader(source, _eval_transform(cfg), cfg.EVAL.BATCH, rank, world, _workers(cfg), cfg.DATA.PREFETCH, pin)


def _eval_transform(cfg: CfgNode) -> EvalTransform:
    """Return the evaluation crop; EVAL.CROP_PCT, the more specific key, comes before DATA.EVAL_RESIZE."""
    size = cfg.DATA.IMG_SIZE
    resize = cfg.DATA.EVAL_RESIZE if cfg.EVAL.MODE == "center" else 0
    if cfg.EVAL.CROP_PCT:
        resize = math.floor(size / cfg.EVAL.CROP_PCT)
    return EvalTransform(size, resize, cfg.DATA.EVAL_INTERPOLATION, cfg.EVAL.MODE, _fill(cfg))


def _fill(cfg: CfgNode) -> tuple[int, int, int]:
    """Return the mean colour."""
    return _level(cfg.DATA.MEAN[0]), _level(cfg.DATA.MEAN[1]), _level(cfg.DATA.MEAN[2])


def _workers(cfg: CfgNode) -> int:
    """Return the loader processes of this training process: the cores it may use, shared with its neighbours."""
    if cfg.DATA.WORKERS >= 0:
        return cfg.DATA.WORKERS
    neighbours = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, min(MAX_WORKERS, len(os.sched_getaffinity(0)) // neighbours))


def _synthetic(cfg: CfgNode, rank: int, world: int, device: torch.device) -> Data:
    num_classes, size, seed = cfg.DATA.SYNTHETIC_CLASSES, cfg.DATA.IMG_SIZE, cfg.TRAIN.SEED
    if cfg.MODEL.NUM_CLASSES not in (0, num_classes):
        raise ValueError(
            f"MODEL.NUM_CLASSES={cfg.MODEL.NUM_CLASSES} but DATA.SYNTHETIC_CLASSES={num_classes}; make them equal"
        )
    stream = _stream(cfg, cfg.DATA.SYNTHETIC_TRAIN)
    pin = device.type == "cuda"
    return Data(
        val=SyntheticEval(cfg.DATA.SYNTHETIC_VAL, size, num_classes, cfg.EVAL.BATCH, seed, rank, world),
        stage=_stage(cfg, num_classes, device),
        classes=[f"class {i}" for i in range(num_classes)],
        fingerprint={
            "synthetic": True,
            "train": stream.num_samples,
            "val": cfg.DATA.SYNTHETIC_VAL,
            "classes": num_classes,
        },
        train=SyntheticTrain(stream, size, num_classes, _erase_boxes(cfg), seed, rank, world, pin, _sizes(cfg)),
        stream=stream,
    )


def _fingerprint(classes: list[str], **splits: FolderSource) -> dict[str, Any]:
    found: dict[str, Any] = {"classes": len(classes), "classes_sha256": _sha256("\n".join(classes))}
    for split, source in splits.items():
        counts = np.bincount(source.labels, minlength=len(classes))
        found[split] = len(source)
        found[f"{split}_per_class_sha256"] = _sha256(" ".join(map(str, counts)))
    return found


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _notes(val: FolderSource, classes: list[str]) -> list[str]:
    held = len(np.unique(val.labels))
    if held == len(classes):
        return []
    return [f"{val.root} has images of {held} of the {len(classes)} classes; the others are not evaluated"]
