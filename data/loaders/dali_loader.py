"""The DALI loader: the torch loader's batches, decoded and resized by DALI on the CPU or a GPU, RandAugment after it.

Workers read the files and draw each sample's choices, by the same addresses as the torch loader's; the main process feeds
both to a DALI pipeline. A file that DALI might refuse (no ordinary JPEG, or one that is cut off) is decoded by the worker
as the torch loader does, and travels as pixels: so an unreadable one is replaced before DALI meets it.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from data.augment.rand_augment import Op
from data.augment.rand_augment_tensor import RandAugment
from data.augment.transforms import EvalTransform, TrainTransform
from data.loaders.bad_images import BadImage, read_or_replace
from data.loaders.batch import Batch
from data.loaders.decode import MAX_PIXELS, decode
from data.loaders.jpeg import ordinary
from data.loaders.sampler import Sampler
from data.loaders.torch_loader import (
    Address,
    Batches,
    ImageSource,
    MicroBatches,
    batches_of,
    evaluation_batches,
    read,
    start_workers,
)

if TYPE_CHECKING:
    from data.loaders.dali_pipeline import Pipeline

INSTALL = "pip install nvidia-dali-cuda130 (nvidia-dali-cuda120 for drivers before 580)"
DECODERS_PER_READER = 4  # a worker reads and draws for so many decoding threads, or more
DEVICES = ("auto", "cpu", "gpu")


@dataclass(frozen=True)
class Encoded:
    """A batch on its way from a worker to the pipeline; B images, the first axis everywhere."""

    asked: list[Any]  # addresses, or indices in evaluation
    data: Tensor  # uint8, the files one after the other
    ends: np.ndarray  # int64 (B,), where each ends
    windows: np.ndarray  # int64 (B, 4), what is decoded of each: top, left, height, width
    sizes: np.ndarray  # int64 (B, 2), the height and width that is resized to
    crops: np.ndarray  # int64 (B, 4), what is kept of that: top, left, height, width
    cubic: np.ndarray  # bool (B,), bicubic rather than bilinear
    flips: np.ndarray  # bool (B,)
    indices: np.ndarray  # int64 (B,)
    labels: np.ndarray  # int64 (B,)
    ops: tuple[Sequence[Op], ...] = ()  # training: RandAugment's
    erase: np.ndarray | None = None  # training: int64 (B, count, 4)
    bad: tuple[BadImage, ...] = ()
    careful: bool = False  # holds pixels only

    @property
    def numbers(self) -> dict[str, np.ndarray]:
        """What the pipeline takes beside the files, by its inputs' names."""
        return {name: getattr(self, name) for name in ("windows", "sizes", "crops", "cubic", "flips")}

    def files(self) -> list[np.ndarray]:
        """Return the bytes of each file, uint8."""
        return np.split(self.data.numpy(), self.ends[:-1])


File = tuple[np.ndarray, int, int]  # bytes, and height and width of what they decode to


def read_for_dali(source: ImageSource, index: int, careful: bool = False) -> File:
    """Return an image's bytes for DALI, with their height and width; UnreadableImageError names its file.

    `careful` hands over the pixels of every file.
    """
    data = read(source, index)
    found = None if careful else ordinary(data)
    if found is not None and found.height * found.width <= MAX_PIXELS:
        return data, found.height, found.width
    image = decode(data, source.name(index))
    height, width = image.shape[-2:]
    pixels = image.permute(1, 2, 0).contiguous().numpy().tobytes()
    return np.frombuffer(b"P6\n%d %d\n255\n" % (width, height) + pixels, dtype=np.uint8), height, width


class EncodedTrain(Batches[Address, TrainTransform, Encoded]):
    """Addresses to encoded micro-batches."""

    def batch(self, addresses: list[Address], careful: bool = False) -> Encoded:
        """Return the micro-batch of the addresses."""
        files, draws, indices, bad = [], [], [], []
        for epoch, position, index in addresses:
            (data, height, width), taken, replaced = read_or_replace(
                index, len(self), lambda i: read_for_dali(self.source, i, careful), self.source.name
            )
            files.append(data)
            indices.append(taken)
            bad += replaced
            draws.append(self.transform.draw(epoch, position, height, width))
        sides = np.array([drawn.size for drawn in draws], dtype=np.int64)
        return Encoded(
            addresses,
            *_joined(files),
            windows=np.array([drawn.crop for drawn in draws], dtype=np.int64),
            sizes=np.stack([sides, sides], 1),
            crops=np.stack([0 * sides, 0 * sides, sides, sides], 1),
            cubic=np.array([drawn.interpolation == "bicubic" for drawn in draws]),
            flips=np.array([drawn.flip for drawn in draws]),
            indices=np.array(indices, dtype=np.int64),
            labels=self.source.labels[indices],
            ops=tuple(drawn.ops for drawn in draws),
            erase=np.stack([drawn.erase for drawn in draws]),
            bad=tuple(bad),
            careful=careful,
        )


class EncodedEval(Batches[int, EvalTransform, Encoded]):
    """Indices to encoded evaluation batches."""

    def batch(self, indices: list[int], careful: bool = False) -> Encoded:
        """Return the batch of the indices."""
        files = [read_for_dali(self.source, index, careful) for index in indices]
        geometry = [self.transform.geometry(height, width) for _, height, width in files]
        return Encoded(
            indices,
            *_joined([data for data, _, _ in files]),
            windows=np.array([(0, 0, height, width) for _, height, width in files], dtype=np.int64),
            sizes=np.array([size for size, _ in geometry], dtype=np.int64),
            crops=np.array([crop for _, crop in geometry], dtype=np.int64),
            cubic=np.full(len(files), self.transform.interpolation == "bicubic"),
            flips=np.zeros(len(files), dtype=bool),
            indices=np.array(indices, dtype=np.int64),
            labels=self.source.labels[indices],
            careful=careful,
        )


class DaliTrainLoader:
    """This rank's augmented micro-batches, epoch by epoch; TrainLoader's interface."""

    def __init__(
        self,
        source: ImageSource,
        transform: TrainTransform,
        sampler: Sampler,
        rank: int = 0,
        world: int = 1,
        workers: int = 0,
        prefetch: int = 4,
        device: torch.device | str = "cpu",
        backend: str = "auto",
    ) -> None:
        """`device` is where the batches go, `backend` (auto, cpu or gpu) where DALI runs."""
        self._addresses, self._device = MicroBatches(sampler, rank, world), torch.device(device)
        images, size = EncodedTrain(source, transform), sampler.micro_batch_size
        self._decoder = _Decoder(images, self._addresses, size, workers, prefetch, self._device, backend)
        self._augment = RandAugment(transform.fill, self._device)

    @property
    def updates_per_epoch(self) -> int:
        """Updates in an epoch."""
        return self._addresses.sampler.updates_per_epoch

    def epoch(self, epoch: int, first_update: int = 0) -> Iterator[Batch]:
        """Yield the micro-batches of updates first_update .. end; what is skipped is not read."""
        self._addresses.begin(epoch, first_update)
        for encoded, images in self._decoder:
            images = self._augment(images.to(self._device, non_blocking=True), encoded.ops)
            yield _batch(encoded, images)


class DaliEvalLoader:
    """This rank's share of a split, each image once over all ranks; EvalLoader's interface."""

    def __init__(
        self,
        source: ImageSource,
        transform: EvalTransform,
        batch_size: int,
        rank: int = 0,
        world: int = 1,
        workers: int = 0,
        prefetch: int = 4,
        device: torch.device | str = "cpu",
        backend: str = "auto",
    ) -> None:
        """`device` is where the batches go, `backend` (auto, cpu or gpu) where DALI runs."""
        self.num_images, self._device = len(source), torch.device(device)
        self._batches = evaluation_batches(self.num_images, batch_size, rank, world)
        images = EncodedEval(source, transform)
        self._decoder = _Decoder(images, self._batches, batch_size, workers, prefetch, self._device, backend)

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Batch]:
        for encoded, images in self._decoder:
            yield _batch(encoded, images.to(self._device, non_blocking=True))


def readers_of(workers: int) -> int:
    """Return the processes that read for so many decoding threads."""
    return -(-workers // DECODERS_PER_READER)


def check_dali(backend: str, device: torch.device) -> None:
    """Raise ValueError where DALI is not installed, or cannot run where it is asked to."""
    if backend not in DEVICES:
        raise ValueError(f"DATA.DALI_DEVICE={backend!r} must be one of {', '.join(DEVICES)}")
    try:
        import nvidia.dali  # noqa: F401
    except ImportError as error:
        raise ValueError(
            f"DATA.LOADER=dali needs NVIDIA DALI, which cannot be imported ({error}); {INSTALL}, or set DATA.LOADER to torch"
        ) from error
    if backend == "gpu" and (device.type != "cuda" or not torch.cuda.is_available()):
        why = f"this run is on {device.type}" if torch.cuda.is_available() else "there is no CUDA device"
        raise ValueError(
            f"DATA.DALI_DEVICE=gpu but {why}; set DATA.DALI_DEVICE to auto or cpu, or DATA.LOADER to torch"
        )


class _Decoder:
    """Workers that encode batches, and the pipeline that decodes them; both start with the first batch."""

    def __init__(
        self,
        images: EncodedTrain | EncodedEval,
        batches: Any,
        size: int,
        workers: int,
        prefetch: int,
        device: torch.device,
        backend: str,
    ) -> None:
        check_dali(backend, device)
        on_gpu = backend == "gpu" or (backend == "auto" and device.type == "cuda")
        self._gpu = (torch.cuda.current_device() if device.index is None else device.index) if on_gpu else None
        self._images, self._size, self._threads = images, size, workers
        self._loader = start_workers(images, batches, readers_of(workers), prefetch, False)
        self._pipeline: Pipeline | None = None

    def __iter__(self) -> Iterator[tuple[Encoded, Tensor]]:
        """Yield each batch with its crops, uint8 (B, 3, S, S), where DALI runs.

        A file that DALI cannot decode breaks its pipeline; what was in it is then decoded as the torch loader does, which
        replaces or names the file, and a new pipeline goes on.
        """
        batches = batches_of(self._loader)
        todo = iter([first]) if (first := next(batches, None)) else iter(())  # starts the workers before any thread
        while True:
            under_way: deque[Encoded] = deque()
            try:
                for encoded, images in self._running().run(_noted(chain(todo, batches), under_way)):
                    under_way.popleft()
                    yield encoded, images
                return
            except RuntimeError:
                if self._pipeline is None or not self._pipeline.broken:
                    raise
                self._pipeline = None
                if any(batch.careful for batch in under_way):
                    raise
            todo = iter([self._images.batch(batch.asked, careful=True) for batch in under_way])

    def _running(self) -> "Pipeline":
        if self._pipeline is None:
            from data.loaders.dali_pipeline import Pipeline

            self._pipeline = Pipeline(self._size, self._threads, self._gpu)
        return self._pipeline


def _noted(batches: Iterable[Encoded], under_way: deque[Encoded]) -> Iterator[Encoded]:
    for batch in batches:
        under_way.append(batch)
        yield batch


def _joined(files: list[np.ndarray]) -> tuple[Tensor, np.ndarray]:
    return torch.from_numpy(np.concatenate(files)), np.cumsum([len(data) for data in files])


def _batch(encoded: Encoded, images: Tensor) -> Batch:
    """Return the batch; the small tensors page-locked where the images are on a GPU, so that nothing waits for it."""
    pinned = images.device.type == "cuda"
    labels, indices = (_tensor(array, pinned) for array in (encoded.labels, encoded.indices))
    erase = None if encoded.erase is None else _tensor(encoded.erase, pinned)
    return Batch(images, labels, indices, erase, encoded.bad)


def _tensor(array: np.ndarray, pinned: bool) -> Tensor:
    return torch.from_numpy(array).pin_memory() if pinned else torch.from_numpy(array)
