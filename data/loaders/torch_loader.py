"""The CPU loader: DataLoader workers decode, crop, flip and RandAugment whole micro-batches of uint8 images.

The index stream decides what each micro-batch holds and each sample's address decides its augmentation, so the number of
workers changes the speed and nothing else. The main process sends a worker the addresses of one micro-batch and gets a
`Batch` back, or the message of an UnreadableImageError: raised here, it carries no traceback of another process.
"""

import gc
import warnings
from collections.abc import Iterator
from functools import partial
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from data.augment.transforms import EvalTransform, TrainDraw, TrainTransform
from data.loaders.bad_images import BadImage, read_or_replace
from data.loaders.batch import Batch
from data.loaders.decode import MAX_PIXELS, UnreadableImageError, decode
from data.loaders.decode_top import decode_top
from data.loaders.jpeg import ordinary
from data.loaders.sampler import Sampler, evaluation_indices
from data.loaders.workers import Workers, ignore_signals

Address = tuple[int, int, int]  # epoch, position in it, index in the data set
Asked = TypeVar("Asked", Address, int)
Transform = TypeVar("Transform", TrainTransform, EvalTransform)
Made = TypeVar("Made")


class ImageSource(Protocol):
    """Where a loader's bytes come from."""

    labels: np.ndarray  # int64 (n,)

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """Return what an error calls the image."""

    def read(self, index: int) -> np.ndarray:
        """Return the bytes of the image's file, uint8 (n,), writable."""


def read(source: ImageSource, index: int) -> np.ndarray:
    """Return the bytes of an image's file, uint8 (n,); UnreadableImageError names it."""
    try:
        return source.read(index)
    except OSError as error:
        raise UnreadableImageError(
            source.name(index), f"cannot be read ({error})", "see whether the storage is still there"
        ) from error


def load(source: ImageSource, index: int) -> Tensor:
    """Return an image, uint8 (3, H, W); UnreadableImageError names its file."""
    return decode(read(source, index), source.name(index))


class Batches(Dataset, Generic[Asked, Transform, Made]):
    """What workers do: `batch` makes a batch of what is asked for; of an UnreadableImageError only the message travels."""

    def __init__(self, source: ImageSource, transform: Transform) -> None:
        self.source = source
        self.transform: Transform = transform

    def __len__(self) -> int:
        return len(self.source)

    def __getitems__(self, asked: list[Asked]) -> Made | str:
        try:
            return self.batch(asked)
        except UnreadableImageError as error:
            return str(error)

    def batch(self, asked: list[Asked]) -> Made:
        """Return the batch of the addresses or indices; raises UnreadableImageError."""
        raise NotImplementedError


class TrainImages(Batches[Address, TrainTransform, Batch]):
    """Addresses to augmented micro-batches."""

    def batch(self, addresses: list[Address]) -> Batch:
        size = self.transform.size_in(addresses[0][0])
        images = torch.empty(len(addresses), 3, size, size, dtype=torch.uint8)
        erase = np.zeros((len(addresses), self.transform.erase.slots, 4), dtype=np.int64)
        indices = np.array([index for _, _, index in addresses], dtype=np.int64)
        bad: list[BadImage] = []
        for row, (epoch, position, index) in enumerate(addresses):
            load_drawn = partial(self._load, epoch, position)
            (image, drawn), indices[row], replaced = read_or_replace(index, len(self), load_drawn, self.source.name)
            bad += replaced
            images[row].copy_(self.transform.apply(image, drawn))
            erase[row] = drawn.erase
        labels = self.source.labels[indices]
        return Batch(images, torch.from_numpy(labels), torch.from_numpy(indices), torch.from_numpy(erase), tuple(bad))

    def _load(self, epoch: int, position: int, index: int) -> tuple[Tensor, TrainDraw]:
        """Return an image and its choices; of a JPEG, where a loader process decodes it, no rows below the crop."""
        data, name = read(self.source, index), self.source.name(index)
        found = ordinary(data) if get_worker_info() else None
        if found is not None and found.height * found.width <= MAX_PIXELS:
            drawn = self.transform.draw(epoch, position, found.height, found.width)
            return decode_top(data, found, drawn.crop.top + drawn.crop.height, name), drawn
        image = decode(data, name)
        return image, self.transform.draw(epoch, position, image.shape[-2], image.shape[-1])


class EvalImages(Batches[int, EvalTransform, Batch]):
    """Indices to evaluation batches."""

    def batch(self, indices: list[int]) -> Batch:
        images = torch.empty(len(indices), 3, self.transform.crop, self.transform.crop, dtype=torch.uint8)
        for row, index in enumerate(indices):
            images[row].copy_(self.transform(load(self.source, index)))
        chosen = np.array(indices, dtype=np.int64)
        return Batch(images, torch.from_numpy(self.source.labels[chosen]), torch.from_numpy(chosen))


class MicroBatches:
    """The addresses of a rank's micro-batches, from an update of an epoch on; DataLoader's batch sampler."""

    def __init__(self, sampler: Sampler, rank: int, world: int) -> None:
        if sampler.micro_batches_per_update % world:
            raise ValueError(
                f"{world} processes cannot share the {sampler.micro_batches_per_update} micro-batches of an update evenly; "
                "choose TRAIN.GLOBAL_BATCH = TRAIN.MICRO_BATCH x processes x accumulation"
            )
        if not 0 <= rank < world:
            raise ValueError(f"rank {rank} must lie in 0 .. {world - 1}, the processes there are")
        self.sampler, self.rank, self.world = sampler, rank, world
        self.epoch, self.first_update = 0, 0

    def begin(self, epoch: int, first_update: int) -> None:
        """Start at an update of an epoch; ValueError if the epoch has no such update."""
        last = self.sampler.updates_per_epoch
        if not 0 <= first_update <= last:
            raise ValueError(f"first_update={first_update} must lie in 0 .. {last}, the epoch's updates")
        self.epoch, self.first_update = epoch, first_update

    def numbers(self) -> Iterator[tuple[int, int]]:
        """Yield (update, micro-batch number) in the order of training."""
        for update in range(self.first_update, self.sampler.updates_per_epoch):
            for j in range(self.rank, self.sampler.micro_batches_per_update, self.world):
                yield update, j

    def __iter__(self) -> Iterator[list[Address]]:
        epoch = self.epoch
        for update, j in self.numbers():
            positions, indices = self.sampler.micro_batch(epoch, update, j)
            yield [(epoch, p, i) for p, i in zip(positions.tolist(), indices.tolist(), strict=True)]

    def __len__(self) -> int:
        per_update = self.sampler.micro_batches_per_update // self.world
        return (self.sampler.updates_per_epoch - self.first_update) * per_update


class TrainLoader:
    """This rank's augmented micro-batches, epoch by epoch."""

    def __init__(
        self,
        source: ImageSource,
        transform: TrainTransform,
        sampler: Sampler,
        rank: int = 0,
        world: int = 1,
        workers: int = 0,
        prefetch: int = 4,
        pin_memory: bool = False,
    ) -> None:
        self._addresses = MicroBatches(sampler, rank, world)
        self._loader = start_workers(TrainImages(source, transform), self._addresses, workers, prefetch, pin_memory)

    @property
    def updates_per_epoch(self) -> int:
        """Updates in an epoch; each takes micro_batches_per_update / world batches from this loader."""
        return self._addresses.sampler.updates_per_epoch

    def epoch(self, epoch: int, first_update: int = 0) -> Iterator[Batch]:
        """Yield the micro-batches of updates first_update .. end; what is skipped is not read.

        One epoch at a time: starting another ends the one before.
        """
        self._addresses.begin(epoch, first_update)
        yield from batches_of(self._loader)


class EvalLoader:
    """This rank's share of a split, each image once over all ranks, the last batch as short as it comes."""

    def __init__(
        self,
        source: ImageSource,
        transform: EvalTransform,
        batch_size: int,
        rank: int = 0,
        world: int = 1,
        workers: int = 0,
        prefetch: int = 4,
        pin_memory: bool = False,
    ) -> None:
        self.num_images = len(source)
        self._batches = evaluation_batches(len(source), batch_size, rank, world)
        self._loader = start_workers(EvalImages(source, transform), self._batches, workers, prefetch, pin_memory)

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Batch]:
        yield from batches_of(self._loader)


def evaluation_batches(num_images: int, batch_size: int, rank: int, world: int) -> list[list[int]]:
    """Return the indices of a rank's evaluation batches, the last as short as it comes."""
    own = evaluation_indices(num_images, rank, world).tolist()
    return [own[start : start + batch_size] for start in range(0, len(own), batch_size)]


def _as_it_is(batch: Any) -> Any:
    return batch


def start_workers(images: Dataset, batches: Any, workers: int, prefetch: int, pin_memory: bool) -> DataLoader:
    """Return a DataLoader of whole batches: `images` makes one of what `batches` yields."""
    return DataLoader(
        images,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=_as_it_is,
        pin_memory=pin_memory,
        prefetch_factor=prefetch if workers else None,
        persistent_workers=workers > 0,
        multiprocessing_context=Workers() if workers else None,
        worker_init_fn=_begin_worker if workers else None,
        generator=torch.Generator(),  # its own: DataLoader would draw from the global stream at each epoch
    )


def _begin_worker(number: int) -> None:
    ignore_signals(number)
    _keep_inherited()


def _keep_inherited() -> None:
    """Never collect what a worker inherits: a destructor of the main process's might wait for threads that are not here."""
    gc.freeze()
    gc.enable()


def batches_of(loader: DataLoader) -> Iterator[Any]:
    """Yield what the workers made of each batch; UnreadableImageError for the message of one."""
    with warnings.catch_warnings():
        # Python 3.12 warns of any fork while threads run; workers use nothing that another thread could hold locked.
        warnings.filterwarnings(
            "ignore", message=".*use of fork\\(\\) may lead to deadlocks", category=DeprecationWarning
        )
        collecting = gc.isenabled()
        gc.disable()  # until the workers keep what they inherit
        try:
            iterator = iter(loader)
        finally:
            if collecting:
                gc.enable()
    for batch in iterator:
        if isinstance(batch, str):
            raise UnreadableImageError(batch)
        yield batch
