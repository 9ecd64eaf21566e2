"""Build everything a run takes from data/ out of its config: the only file here that reads it.

data = build_data(cfg, rank, world, device)        train.py
data = build_eval_data(cfg, rank, world, device)   eval.py, which needs no train/
"""

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from yacs.config import CfgNode

from common.timeline import Timeline, parse_optional
from data.augment.device_stage import DeviceStage
from data.augment.mixup import Mixup
from data.augment.rand_augment_policy import parse_policy
from data.augment.random_erasing import RandomErasing
from data.augment.transforms import EvalTransform, TrainTransform
from data.loaders.bad_images import BadImages
from data.loaders.dali_loader import DaliEvalLoader, DaliTrainLoader, readers_of
from data.loaders.sampler import Sampler
from data.loaders.shared_memory import check_shared_memory, default_workers
from data.loaders.synthetic import SyntheticEval, SyntheticTrain
from data.loaders.torch_loader import EvalLoader, TrainLoader
from data.stores.archive_index import NoImagesError, Say
from data.stores.class_labels import class_names, label_folders
from data.stores.folder import FolderSource, class_folders, read_class_index, scan_labelled, val_folder
from data.stores.layout import has_split
from data.stores.store import ArchiveSource, ArchiveStore, FolderStore, file_sizes, open_store

Source = FolderSource | ArchiveSource
SIZES, LARGE = 256, 95  # files whose sizes tell what a batch of them takes, and the percentile that does


@dataclass
class EvalData:
    """What an evaluation takes."""

    val: EvalLoader | DaliEvalLoader | SyntheticEval
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

    train: TrainLoader | DaliTrainLoader | SyntheticTrain = field(kw_only=True)
    sampler: Sampler = field(kw_only=True)
    bad: BadImages = field(kw_only=True)


def build_data(cfg: CfgNode, rank: int, world: int, device: torch.device | str, say: Say | None = None) -> Data:
    """Build the loaders, the device stage and the index stream of a training run.

    `say` hears when an index of archives is built; without it stderr does.
    """
    device = torch.device(device)
    if cfg.DATA.LOADER == "synthetic":
        return _synthetic(cfg, rank, world, device)
    train_store, val_store = _open(cfg, "train", say), _open(cfg, "val", say)
    classes = _classes(cfg, train_store)
    train_source = train_store.source(classes, must_hold_all=True)
    val_source = val_store.source(classes, must_hold_all=False)
    sampler = _stream(cfg, len(train_source), _storage_order(cfg, train_source))
    _check_shared_memory(cfg, train_source, cfg.TRAIN.MICRO_BATCH, _largest_size(cfg), world)
    _check_shared_memory(cfg, val_source, cfg.EVAL.BATCH, cfg.DATA.IMG_SIZE, world)
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
    return Data(
        val=_eval_loader(cfg, val_source, rank, world, device),
        stage=_stage(cfg, len(classes), device),
        classes=classes,
        fingerprint=_fingerprint(classes, train=train_source, val=val_source) | _order_fingerprint(sampler),
        notes=[*train_store.notes, *val_store.notes, *_notes(val_store, val_source, classes)],
        origin=val_store.where,
        names=_names(val_source),
        transform=_eval_transform(cfg),
        train=_train_loader(cfg, train_source, transform, sampler, rank, world, device),
        sampler=sampler,
        bad=BadImages(len(train_source), cfg.DATA.MAX_BAD_SHARE),
    )


def build_eval_data(
    cfg: CfgNode,
    rank: int,
    world: int,
    device: torch.device | str,
    say: Say | None = None,
    folder: ValFolder | None = None,
) -> EvalData:
    """Build the evaluation loader and the device stage.

    The images are those of val/, with the classes of CLASS_INDEX, train/ or val/; or those of `folder`.
    """
    device = torch.device(device)
    if cfg.DATA.LOADER == "synthetic":
        if folder:
            raise ValueError(f"--val-path {folder.path} has no effect with DATA.LOADER=synthetic; set it to torch")
        return _synthetic(cfg, rank, world, device)
    answers: list[int] | None = None
    notes: list[str] = []
    source: Source
    if folder:
        classes, source, origin = _labelled(cfg, folder)
        present = np.unique(source.labels).tolist()
        answers = present if len(present) < len(classes) and not folder.all_logits else None
    else:
        store = _open(cfg, "val", say)
        classes = _classes(cfg, _train_or(store, cfg, say))
        source = store.source(classes, must_hold_all=False)
        origin, notes = store.where, [*store.notes, *_notes(store, source, classes)]
    _check_shared_memory(cfg, source, cfg.EVAL.BATCH, cfg.DATA.IMG_SIZE, world)
    return EvalData(
        val=_eval_loader(cfg, source, rank, world, device),
        stage=_stage(cfg, len(classes), device),
        classes=classes,
        fingerprint=_fingerprint(classes, val=source),
        notes=notes,
        origin=origin,
        names=_names(source),
        transform=_eval_transform(cfg),
        answers=answers,
    )


def _names(source: Source) -> Callable[[int], str]:
    """Return what gives an image's name: its path below the split's folder, or its place in an archive."""
    return source.relative if isinstance(source, FolderSource) else source.name


def _labelled(cfg: CfgNode, folder: ValFolder) -> tuple[list[str], FolderSource, str]:
    """Return the model's classes, the folder's images with their labels among them, and a sentence on both."""
    lists = class_names(folder.known, cfg.DATA.CLASS_INDEX, folder.num_classes or cfg.MODEL.NUM_CLASSES)
    source, classes = next(iter(lists.items()))
    _check_count(cfg, classes, source)
    root = val_folder(folder.path)
    labels, how = label_folders(class_folders(root), lists, folder.path)
    images = scan_labelled(root, labels)
    return classes, images, f"{root}, {len(labels)} folders {how}"


def _open(cfg: CfgNode, split: str, say: Say | None) -> FolderStore | ArchiveStore:
    return open_store(cfg.DATA.PATH, split, cfg.DATA.VAL_LABELS, say)


def _train_or(val: FolderStore | ArchiveStore, cfg: CfgNode, say: Say | None) -> FolderStore | ArchiveStore:
    """Return the training images, which name all classes, if they are there; else the validation images."""
    if cfg.DATA.CLASS_INDEX or not has_split(cfg.DATA.PATH, "train"):
        return val
    try:
        return _open(cfg, "train", say)
    except NoImagesError:  # an archive that holds val/ only
        return val


def _classes(cfg: CfgNode, store: FolderStore | ArchiveStore) -> list[str]:
    """Return the classes in label order, checked against MODEL.NUM_CLASSES."""
    if cfg.DATA.CLASS_INDEX:
        classes, where = read_class_index(cfg.DATA.CLASS_INDEX), cfg.DATA.CLASS_INDEX
    else:
        classes, where = store.classes(), store.where
    _check_count(cfg, classes, where)
    return classes


def _check_count(cfg: CfgNode, classes: list[str], where: str) -> None:
    wanted = cfg.MODEL.NUM_CLASSES
    if wanted not in (0, len(classes)):
        raise ValueError(
            f"MODEL.NUM_CLASSES={wanted} but {where} holds {len(classes)} classes; "
            f"set MODEL.NUM_CLASSES to {len(classes)}, or to 0 to take the number from the data"
        )


def _stream(cfg: CfgNode, num_samples: int, storage: np.ndarray | None = None) -> Sampler:
    batches = cfg.TRAIN.GLOBAL_BATCH, cfg.TRAIN.MICRO_BATCH
    block = cfg.DATA.BLOCK_SHUFFLE
    return Sampler(num_samples, cfg.TRAIN.SEED, *batches, repeats=cfg.AUG.REPEATS, block=block, storage=storage)


def _storage_order(cfg: CfgNode, source: Source) -> np.ndarray | None:
    """Return the order in which the images lie, which a block shuffle follows and the source reads ahead in."""
    if not (cfg.DATA.BLOCK_SHUFFLE and isinstance(source, ArchiveSource)):
        return None
    source.read_ahead(cfg.DATA.BLOCK_SHUFFLE)
    return source.storage_order()


def _order_fingerprint(sampler: Sampler) -> dict[str, Any]:
    """Return what tells whether two stores give a block shuffle the same order; nothing for a full shuffle."""
    if not sampler.block:
        return {}
    stored = np.arange(sampler.num_samples, dtype=np.int64) if sampler.storage is None else sampler.storage
    return {"train_storage_sha256": hashlib.sha256(stored.tobytes()).hexdigest()[:16]}


def _erase_boxes(cfg: CfgNode) -> RandomErasing:
    return RandomErasing(cfg.AUG.ERASE_PROB, cfg.AUG.ERASE_COUNT, tuple(cfg.AUG.ERASE_AREA))


def _sizes(cfg: CfgNode) -> Timeline | None:
    return parse_optional(cfg.TIMELINE.IMG_SIZE, "TIMELINE.IMG_SIZE", multiple=32)


def _level(mean: float) -> int:
    return min(255, round(255 * mean))


def _stage(cfg: CfgNode, num_classes: int, device: torch.device) -> DeviceStage:
    aug = cfg.AUG
    mixing = Mixup(num_classes, aug.MIXUP, aug.CUTMIX, aug.MIX_PROB, aug.MIX_SWITCH_PROB, aug.LABEL_SMOOTHING)
    mix_prob = parse_optional(cfg.TIMELINE.MIX_PROB, "TIMELINE.MIX_PROB")
    return DeviceStage(mixing, cfg.DATA.MEAN, cfg.DATA.STD, cfg.TRAIN.SEED, device, aug.ERASE_MODE, aug.ORDER, mix_prob)


def _train_loader(
    cfg: CfgNode,
    source: Source,
    transform: TrainTransform,
    sampler: Sampler,
    rank: int,
    world: int,
    device: torch.device,
) -> TrainLoader | DaliTrainLoader:
    share = source, transform, sampler, rank, world, _workers(cfg), cfg.DATA.PREFETCH
    if cfg.DATA.LOADER == "dali":
        return DaliTrainLoader(*share, device, cfg.DATA.DALI_DEVICE)
    return TrainLoader(*share, pin_memory=device.type == "cuda")


def _eval_loader(
    cfg: CfgNode, source: Source, rank: int, world: int, device: torch.device
) -> EvalLoader | DaliEvalLoader:
    share = source, _eval_transform(cfg), cfg.EVAL.BATCH, rank, world, _workers(cfg), cfg.DATA.PREFETCH
    if cfg.DATA.LOADER == "dali":
        if cfg.EVAL.MODE == "border":
            raise ValueError("EVAL.MODE=border: the DALI loader crops and does not fill; set DATA.LOADER to torch")
        return DaliEvalLoader(*share, device, cfg.DATA.DALI_DEVICE)
    return EvalLoader(*share, pin_memory=device.type == "cuda")


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
    """Return the loader processes of this training process."""
    return cfg.DATA.WORKERS if cfg.DATA.WORKERS >= 0 else default_workers()


def _check_shared_memory(cfg: CfgNode, source: Source, batch: int, size: int, world: int) -> None:
    """Check room for the batches under way: of crops of a size, or for DALI of the source's files."""
    share = -(-len(source) // world)  # in training a little less: AUG.REPEATS and updates leave some out
    batch, batches = min(batch, share), -(-share // batch)
    workers, image = _workers(cfg), 3 * size * size
    readers = workers
    if cfg.DATA.LOADER == "dali":
        readers = readers_of(workers)
        sample = np.linspace(0, len(source) - 1, min(len(source), SIZES)).astype(np.int64)
        image = math.ceil(np.percentile(file_sizes(source, sample), LARGE))
    check_shared_memory(workers, cfg.DATA.PREFETCH, batch * image, batches, readers)


def _largest_size(cfg: CfgNode) -> int:
    sizes = _sizes(cfg)
    return max(cfg.DATA.IMG_SIZE, *(int(size) for size in sizes.values)) if sizes else cfg.DATA.IMG_SIZE


def _synthetic(cfg: CfgNode, rank: int, world: int, device: torch.device) -> Data:
    num_classes, size, seed = cfg.DATA.SYNTHETIC_CLASSES, cfg.DATA.IMG_SIZE, cfg.TRAIN.SEED
    if cfg.MODEL.NUM_CLASSES not in (0, num_classes):
        raise ValueError(
            f"MODEL.NUM_CLASSES={cfg.MODEL.NUM_CLASSES} but DATA.SYNTHETIC_CLASSES={num_classes}; make them equal"
        )
    sampler = _stream(cfg, cfg.DATA.SYNTHETIC_TRAIN)
    pin = device.type == "cuda"
    return Data(
        val=SyntheticEval(cfg.DATA.SYNTHETIC_VAL, size, num_classes, cfg.EVAL.BATCH, seed, rank, world),
        stage=_stage(cfg, num_classes, device),
        classes=[f"class {i}" for i in range(num_classes)],
        fingerprint={
            "synthetic": True,
            "train": sampler.num_samples,
            "val": cfg.DATA.SYNTHETIC_VAL,
            "classes": num_classes,
        },
        train=SyntheticTrain(sampler, size, num_classes, _erase_boxes(cfg), seed, rank, world, pin, _sizes(cfg)),
        sampler=sampler,
        bad=BadImages(sampler.num_samples, cfg.DATA.MAX_BAD_SHARE),
    )


def _fingerprint(classes: list[str], **splits: Source) -> dict[str, Any]:
    found: dict[str, Any] = {"classes": len(classes), "classes_sha256": _sha256("\n".join(classes))}
    for split, source in splits.items():
        counts = np.bincount(source.labels, minlength=len(classes))
        found[split] = len(source)
        found[f"{split}_per_class_sha256"] = _sha256(" ".join(map(str, counts)))
    return found


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _notes(store: FolderStore | ArchiveStore, val: Source, classes: list[str]) -> list[str]:
    held = len(np.unique(val.labels))
    if held == len(classes):
        return []
    return [f"{store.where} has images of {held} of the {len(classes)} classes; the others are not evaluated"]
