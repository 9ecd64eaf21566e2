"""Torch loader: DataLoader workers decode, crop, flip and RandAugment whole micro-batches of uint8 images.

The sampler decides which images a micro-batch holds, and each sample's RNG key its augmentation, so that the number of
workers changes nothing but the speed. The main process sends a worker the SampleKeys of one micro-batch and receives a
`Batch`, or the message of an UnreadableImageError, which it raises without the traceback of another process.
"""

import gc
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from data.augment.transforms import EvalTransform, TrainTransform
from data.loaders.bad_images import read_or_replace
from data.loaders.base import BaseEvalLoader, BaseTrainLoader
from data.loaders.batch import BadImage, Batch
from data.loaders.decode import UnreadableImageError
from data.loaders.image_source import ImageSource, load
from data.loaders.sampler import SampleKey
from data.loaders.workers import Workers, ignore_signals

Key = TypeVar("Key", SampleKey, int)
Transform = TypeVar("Transform", TrainTransform, EvalTransform)
Loaded = TypeVar("Loaded")


class BatchDataset(Dataset, Generic[Key, Transform, Loaded]):
    """Data set of whole batches, loaded by workers from a list of SampleKeys or, in evaluation, of indices.

    Where `load_batch` raises UnreadableImageError, the worker returns its message, see `iterate_batches`.
    """

    def __init__(self, source: ImageSource, transform: Transform) -> None:
        self.source = source
        self.transform: Transform = transform

    def __len__(self) -> int:
        return len(self.source)

    def __getitems__(self, keys: list[Key]) -> Loaded | str:
        try:
            return self.load_batch(keys)
        except UnreadableImageError as error:
            return str(error)

    def load_batch(self, keys: list[Key]) -> Loaded:
        """Return the batch of the keys; raises UnreadableImageError."""
        raise NotImplementedError


class TrainDataset(BatchDataset[SampleKey, TrainTransform, Batch]):
    """Data set of augmented micro-batches."""

    def load_batch(self, keys: list[SampleKey]) -> Batch:
        size = self.transform.size_in(keys[0].epoch)
        images = torch.empty(len(keys), 3, size, size, dtype=torch.uint8)
        erase = np.zeros((len(keys), self.transform.erase.slots, 4), dtype=np.int64)
        indices = np.array([key.image for key in keys], dtype=np.int64)
        bad: list[BadImage] = []
        for row, (epoch, position, index) in enumerate(keys):
            image, indices[row], replaced = read_or_replace(
                index, len(self), partial(load, self.source), self.source.name
            )
            bad += replaced
            drawn = self.transform.draw(epoch, position, image.shape[-2], image.shape[-1])
            images[row].copy_(self.transform.apply(image, drawn))
            erase[row] = drawn.erase
        labels = self.source.labels[indices]
        return Batch(images, torch.from_numpy(labels), torch.from_numpy(indices), torch.from_numpy(erase), tuple(bad))


class EvalDataset(BatchDataset[int, EvalTransform, Batch]):
    """Data set of evaluation batches."""

    def load_batch(self, keys: list[int]) -> Batch:
        images = torch.empty(len(keys), 3, self.transform.crop, self.transform.crop, dtype=torch.uint8)
        for row, index in enumerate(keys):
            images[row].copy_(self.transform(load(self.source, index)))
        indices = np.array(keys, dtype=np.int64)
        return Batch(images, torch.from_numpy(self.source.labels[indices]), torch.from_numpy(indices))


@dataclass(eq=False, repr=False)
class TrainLoader(BaseTrainLoader):
    """One rank's augmented micro-batches, epoch by epoch, from DataLoader workers."""

    pin_memory: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        dataset = TrainDataset(self.source, self.transform)
        self._loader = build_dataloader(dataset, self._keys, self.workers, self.prefetch, self.pin_memory)

    def _batches(self) -> Iterator[Batch]:
        yield from iterate_batches(self._loader)


@dataclass(eq=False, repr=False)
class EvalLoader(BaseEvalLoader):
    """One rank's share of a split, each image once over all ranks, from DataLoader workers."""

    pin_memory: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        dataset = EvalDataset(self.source, self.transform)
        self._loader = build_dataloader(dataset, self._indices, self.workers, self.prefetch, self.pin_memory)

    def __iter__(self) -> Iterator[Batch]:
        yield from iterate_batches(self._loader)


def _unchanged(batch: Any) -> Any:
    """Return the batch; the collate_fn of data sets of whole batches."""
    return batch


def build_dataloader(
    dataset: BatchDataset, batch_sampler: Any, workers: int, prefetch: int, pin_memory: bool
) -> DataLoader:
    """Return a DataLoader that yields the data set's batch for each list of keys in `batch_sampler`."""
    return DataLoader(
        dataset,
        batch_sampler=batch_sampler,
        num_workers=workers,
        collate_fn=_unchanged,
        pin_memory=pin_memory,
        prefetch_factor=prefetch if workers else None,
        persistent_workers=workers > 0,
        multiprocessing_context=Workers() if workers else None,
        worker_init_fn=_init_worker if workers else None,
        generator=torch.Generator(),  # otherwise DataLoader draws from the default generator at each epoch
    )


def _init_worker(number: int) -> None:
    ignore_signals(number)
    _freeze_inherited()


def _freeze_inherited() -> None:
    """Exclude inherited objects from garbage collection: their destructors might wait for threads of the main process."""
    gc.freeze()
    gc.enable()


def iterate_batches(loader: DataLoader) -> Iterator[Any]:
    """Yield the workers' batches; UnreadableImageError where a worker returned its message."""
    with warnings.catch_warnings():
        # Python 3.12 warns of any fork while threads run; workers use no lock that another thread could hold.
        warnings.filterwarnings(
            "ignore", message=".*use of fork\\(\\) may lead to deadlocks", category=DeprecationWarning
        )
        collecting = gc.isenabled()
        gc.disable()  # until the workers have frozen the objects that they inherit
        try:
            iterator = iter(loader)
        finally:
            if collecting:
                gc.enable()
    for batch in iterator:
        if isinstance(batch, str):
            raise UnreadableImageError(batch)
        yield batch
