"""Build the loaders, the sampler and the device stage of a run from its config.

data = build_data(cfg, rank, world, device)        train.py
data = build_eval_data(cfg, rank, world, device)   eval.py; needs no training images
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from yacs.config import CfgNode

from data.augment.build import (
    build_device_stage,
    build_eval_transform,
    build_random_erasing,
    build_train_transform,
    size_timeline,
)
from data.augment.device_stage import DeviceStage
from data.augment.transforms import EvalTransform
from data.loaders.bad_images import BadImages
from data.loaders.brightness import sample_darkness
from data.loaders.dali_loader import DaliEvalLoader, DaliTrainLoader, readers_of
from data.loaders.image_source import ImageSource
from data.loaders.sampler import Sampler
from data.loaders.shared_memory import check_shared_memory
from data.loaders.synthetic import SyntheticEval, SyntheticTrain
from data.loaders.torch_loader import EvalLoader, TrainLoader
from data.loaders.workers import default_workers
from data.stores.archive_index import NoImagesError
from data.stores.archive_listing import Progress
from data.stores.archive_reader import ArchiveSource
from data.stores.class_labels import class_names
from data.stores.fingerprint import class_fingerprint, storage_fingerprint
from data.stores.folder import FolderSource, read_class_index
from data.stores.folder_split import open_val_folder
from data.stores.layout import has_split
from data.stores.split import Split, file_sizes, open_split, same_place, single_class

FILE_SAMPLE, LARGE_PERCENTILE = 256, 95  # sizes of so many files, and their percentile, estimate a batch of files


@dataclass
class EvalData:
    """Loader, device stage and classes of an evaluation."""

    val: EvalLoader | DaliEvalLoader | SyntheticEval
    stage: DeviceStage
    classes: list[str]  # in label order
    fingerprint: dict[str, Any]  # counts and hashes that are equal for two runs on the same images
    notes: list[str] = field(default_factory=list)  # warnings for the summary at start-up
    origin: str = "synthetic images"  # location of the images, and how their classes were found
    names: Callable[[int], str] = str  # maps an image index to its path, see _names
    transform: EvalTransform | None = None  # None for synthetic images
    answers: list[int] | None = None  # the only labels that may be predicted; None: all


@dataclass(frozen=True)
class ValFolder:
    """Folder of class folders (--val-path), and the classes of the checkpoint that is evaluated on it."""

    path: str
    known: Sequence[str] = ()  # the checkpoint's class names
    num_classes: int = 0  # the checkpoint's, 0 if unknown
    all_logits: bool = False  # predict among all classes, also where the folder holds only some of them


@dataclass
class Data(EvalData):
    """Loaders, sampler and device stage of a training run."""

    train: TrainLoader | DaliTrainLoader | SyntheticTrain = field(kw_only=True)
    sampler: Sampler = field(kw_only=True)
    bad: BadImages = field(kw_only=True)


def build_data(
    cfg: CfgNode, rank: int, world: int, device: torch.device | str, progress: Progress | None = None
) -> Data:
    """Build the loaders, the device stage and the sampler of a training run.

    `progress` is called with lines about the building of an archive index; without it they go to stderr.
    """
    device = torch.device(device)
    if cfg.DATA.LOADER == "synthetic":
        return _synthetic(cfg, rank, world, device)
    train_split, val_split = _open(cfg, "train", progress), _open(cfg, "val", progress)
    classes = _classes(cfg, train_split)
    train_source = train_split.source(classes, must_hold_all=True)
    val_source = val_split.source(classes, must_hold_all=False)
    dark = [
        *_dark(rank, train_source, train_split.name),
        *_dark(rank, val_source, val_split.name),
    ]  # without read-ahead
    sampler = _sampler(cfg, len(train_source), _storage_order(cfg, train_source))
    _check_shared_memory(cfg, train_source, cfg.TRAIN.MICRO_BATCH, _largest_size(cfg), world)
    _check_shared_memory(cfg, val_source, cfg.EVAL.BATCH, cfg.DATA.IMG_SIZE, world)
    fingerprint = class_fingerprint(classes, train=train_source.labels, val=val_source.labels)
    if sampler.block:  # the order then depends on the storage order, which a run must be continued with
        stored = np.arange(sampler.num_samples, dtype=np.int64) if sampler.storage is None else sampler.storage
        fingerprint |= storage_fingerprint(stored)
    return Data(
        val=_eval_loader(cfg, val_source, rank, world, device),
        stage=build_device_stage(cfg, len(classes), device),
        classes=classes,
        fingerprint=fingerprint,
        notes=[
            *train_split.notes,
            *val_split.notes,
            *same_place(train_split, val_split),
            *_missing_classes(val_split, val_source, classes),
            *dark,
        ],
        origin=val_split.name,
        names=_names(val_source),
        transform=build_eval_transform(cfg),
        train=_train_loader(cfg, train_source, sampler, rank, world, device),
        sampler=sampler,
        bad=BadImages(len(train_source), cfg.DATA.MAX_BAD_SHARE),
    )


def build_eval_data(
    cfg: CfgNode,
    rank: int,
    world: int,
    device: torch.device | str,
    progress: Progress | None = None,
    folder: ValFolder | None = None,
) -> EvalData:
    """Build the evaluation loader and the device stage, for val/ or for `folder`.

    The classes of val/ are those of DATA.CLASS_INDEX, else of train/, else of val/. `progress` as for `build_data`.
    """
    device = torch.device(device)
    if cfg.DATA.LOADER == "synthetic":
        if folder:
            raise ValueError(f"--val-path {folder.path} has no effect with DATA.LOADER=synthetic; set it to torch")
        return _synthetic_eval(cfg, rank, world, device)
    answers: list[int] | None = None
    notes: list[str] = []
    source: ImageSource
    if folder:
        classes, source, origin, notes = _labelled(cfg, folder)
        present = np.unique(source.labels).tolist()
        answers = present if len(present) < len(classes) and not folder.all_logits else None
    else:
        split = _open(cfg, "val", progress)
        classes = _classes(cfg, _train_or(split, cfg, progress))
        source = split.source(classes, must_hold_all=False)
        origin, notes = split.name, [*split.notes, *_missing_classes(split, source, classes)]
    _check_shared_memory(cfg, source, cfg.EVAL.BATCH, cfg.DATA.IMG_SIZE, world)
    return EvalData(
        val=_eval_loader(cfg, source, rank, world, device),
        stage=build_device_stage(cfg, len(classes), device),
        classes=classes,
        fingerprint=class_fingerprint(classes, val=source.labels),
        notes=[*notes, *_dark(rank, source, origin)],
        origin=origin,
        names=_names(source),
        transform=build_eval_transform(cfg),
        answers=answers,
    )


def _dark(rank: int, source: ImageSource, name: str) -> list[str]:
    """Return a warning if most images of a sample are nearly black; only on the process that logs it."""
    return sample_darkness(source, name) if rank == 0 else []


def _names(source: ImageSource) -> Callable[[int], str]:
    """Return a function mapping an image index to its path relative to the split folder, or in its archive."""
    return source.relative if isinstance(source, FolderSource) else source.name


def _labelled(cfg: CfgNode, folder: ValFolder) -> tuple[list[str], FolderSource, str, list[str]]:
    """Return the model's classes, the folder's images labelled with them, a description of both, and notes."""
    lists = class_names(folder.known, cfg.DATA.CLASS_INDEX, folder.num_classes or cfg.MODEL.NUM_CLASSES)
    name, classes = next(iter(lists.items()))
    _check_count(cfg, classes, name)
    return classes, *open_val_folder(folder.path, lists, cfg.DATA.VAL_LABELS)


def _open(cfg: CfgNode, split: str, progress: Progress | None) -> Split:
    return open_split(cfg.DATA.PATH, split, cfg.DATA.VAL_LABELS, progress)


def _train_or(val: Split, cfg: CfgNode, progress: Progress | None) -> Split:
    """Return the training split, which holds all classes, if there is one; else the validation split."""
    if cfg.DATA.CLASS_INDEX or not has_split(cfg.DATA.PATH, "train"):
        return val
    try:
        return _open(cfg, "train", progress)
    except NoImagesError:  # an archive that holds val/ only
        return val


def _classes(cfg: CfgNode, split: Split) -> list[str]:
    """Return the classes in label order, their number checked against MODEL.NUM_CLASSES."""
    if cfg.DATA.CLASS_INDEX:
        classes, name = read_class_index(cfg.DATA.CLASS_INDEX), cfg.DATA.CLASS_INDEX
    else:
        classes = split.classes()
        name = split.name
    if split.location.split == "train" and (problem := single_class(split, classes)):
        raise ValueError(problem)
    _check_count(cfg, classes, name)
    return classes


def _check_count(cfg: CfgNode, classes: list[str], name: str) -> None:
    wanted = cfg.MODEL.NUM_CLASSES
    if wanted not in (0, len(classes)):
        raise ValueError(
            f"MODEL.NUM_CLASSES={wanted} but {name} holds {len(classes)} classes; "
            f"set MODEL.NUM_CLASSES to {len(classes)}, or to 0 to take the number from the data"
        )


def _missing_classes(split: Split, source: ImageSource, classes: list[str]) -> list[str]:
    """Return a note on classes without validation images; an empty list if there are none."""
    held = len(np.unique(source.labels))
    if held == len(classes):
        return []
    return [f"{split.name} has images of {held} of the {len(classes)} classes; the others are not evaluated"]


def _sampler(cfg: CfgNode, num_samples: int, storage: np.ndarray | None = None) -> Sampler:
    return Sampler(
        num_samples,
        seed=cfg.TRAIN.SEED,
        global_batch=cfg.TRAIN.GLOBAL_BATCH,
        micro_batch=cfg.TRAIN.MICRO_BATCH,
        repeats=cfg.AUG.REPEATS,
        block=cfg.DATA.BLOCK_SHUFFLE,
        storage=storage,
    )


def _storage_order(cfg: CfgNode, source: ImageSource) -> np.ndarray | None:
    """Return the storage order of images in archives for a block shuffle, and switch on reading ahead by its blocks."""
    if not (cfg.DATA.BLOCK_SHUFFLE and isinstance(source, ArchiveSource)):
        return None
    source.read_ahead(cfg.DATA.BLOCK_SHUFFLE)
    return source.storage_order()


def _train_loader(
    cfg: CfgNode, source: ImageSource, sampler: Sampler, rank: int, world: int, device: torch.device
) -> TrainLoader | DaliTrainLoader:
    images = {"source": source, "transform": build_train_transform(cfg), "sampler": sampler}
    shared: dict[str, Any] = {**images, "rank": rank, "world": world, **_worker_options(cfg)}
    if cfg.DATA.LOADER == "dali":
        return DaliTrainLoader(**shared, device=device, backend=cfg.DATA.DALI_DEVICE)
    return TrainLoader(**shared, pin_memory=device.type == "cuda")


def _eval_loader(
    cfg: CfgNode, source: ImageSource, rank: int, world: int, device: torch.device
) -> EvalLoader | DaliEvalLoader:
    images = {"source": source, "transform": build_eval_transform(cfg), "batch_size": cfg.EVAL.BATCH}
    shared: dict[str, Any] = {**images, "rank": rank, "world": world, **_worker_options(cfg)}
    if cfg.DATA.LOADER == "dali":
        return DaliEvalLoader(**shared, device=device, backend=cfg.DATA.DALI_DEVICE)
    return EvalLoader(**shared, pin_memory=device.type == "cuda")


def _worker_options(cfg: CfgNode) -> dict[str, int]:
    return {"workers": _workers(cfg), "prefetch": cfg.DATA.PREFETCH}


def _workers(cfg: CfgNode) -> int:
    """Return the number of loader processes of this training process."""
    return cfg.DATA.WORKERS if cfg.DATA.WORKERS >= 0 else default_workers()


def _largest_size(cfg: CfgNode) -> int:
    sizes = size_timeline(cfg)
    return max(cfg.DATA.IMG_SIZE, *(int(size) for size in sizes.values)) if sizes else cfg.DATA.IMG_SIZE


def _check_shared_memory(cfg: CfgNode, source: ImageSource, batch: int, size: int, world: int) -> None:
    """Check that the prefetched batches fit into shared memory: of crops of `size` pixels, for DALI of files."""
    share = -(-len(source) // world)  # in training a little less: AUG.REPEATS and updates leave some out
    batch, batches = min(batch, share), -(-share // batch)
    workers, image = _workers(cfg), 3 * size * size
    readers = workers
    if cfg.DATA.LOADER == "dali":
        readers = readers_of(workers)
        sample = np.linspace(0, len(source) - 1, min(len(source), FILE_SAMPLE)).astype(np.int64)
        image = math.ceil(np.percentile(file_sizes(source, sample), LARGE_PERCENTILE))
    check_shared_memory(workers, cfg.DATA.PREFETCH, batch * image, batches, readers)


def _synthetic_eval(cfg: CfgNode, rank: int, world: int, device: torch.device) -> EvalData:
    num_classes = cfg.DATA.SYNTHETIC_CLASSES
    counts = {"train": cfg.DATA.SYNTHETIC_TRAIN, "val": cfg.DATA.SYNTHETIC_VAL, "classes": num_classes}
    return EvalData(
        val=SyntheticEval(
            num_images=cfg.DATA.SYNTHETIC_VAL,
            size=cfg.DATA.IMG_SIZE,
            num_classes=num_classes,
            batch_size=cfg.EVAL.BATCH,
            seed=cfg.TRAIN.SEED,
            rank=rank,
            world=world,
        ),
        stage=build_device_stage(cfg, num_classes, device),
        classes=[f"class {i}" for i in range(num_classes)],
        fingerprint={"synthetic": True, **counts},
    )


def _synthetic(cfg: CfgNode, rank: int, world: int, device: torch.device) -> Data:
    sampler = _sampler(cfg, cfg.DATA.SYNTHETIC_TRAIN)
    evaluation = _synthetic_eval(cfg, rank, world, device)
    return Data(
        val=evaluation.val,
        stage=evaluation.stage,
        classes=evaluation.classes,
        fingerprint=evaluation.fingerprint,
        train=SyntheticTrain(
            sampler,
            size=cfg.DATA.IMG_SIZE,
            num_classes=cfg.DATA.SYNTHETIC_CLASSES,
            erase=build_random_erasing(cfg),
            seed=cfg.TRAIN.SEED,
            rank=rank,
            world=world,
            pin_memory=device.type == "cuda",
            sizes=size_timeline(cfg),
        ),
        sampler=sampler,
        bad=BadImages(sampler.num_samples, cfg.DATA.MAX_BAD_SHARE),
    )
