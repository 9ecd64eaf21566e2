"""DALI loader: the torch loader's batches, decoded and resized by DALI on the CPU or a GPU, then augmented by RandAugment.

Workers read the files and draw each sample's augmentation by the same RNG keys as the torch loader's; the main process feeds
both to a DALI pipeline. A file that DALI might not decode (not an ordinary JPEG, or truncated) is decoded by the worker as in
the torch loader and handed over as pixels, so that an unreadable one is replaced before it reaches DALI.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from data.augment.rand_augment import RandAugment
from data.augment.rand_augment_policy import Op
from data.augment.transforms import EvalTransform, TrainTransform
from data.loaders.bad_images import read_or_replace
from data.loaders.base import BaseEvalLoader, BaseTrainLoader
from data.loaders.batch import BadImage, Batch
from data.loaders.decode import decode
from data.loaders.file_limits import check_jpeg
from data.loaders.image_source import ImageSource, read
from data.loaders.jpeg_header import FrameHeader, is_ordinary
from data.loaders.sampler import SampleKey
from data.loaders.torch_loader import BatchDataset, build_dataloader, iterate_batches

if TYPE_CHECKING:
    from data.loaders.dali_pipeline import Pipeline

INSTALL = "pip install nvidia-dali-cuda130 (nvidia-dali-cuda120 for drivers before 580)"
DECODERS_PER_READER = 4  # decoding threads for which one worker reads and draws
DEVICES = ("auto", "cpu", "gpu")


@dataclass(frozen=True)
class EncodedBatch:
    """Encoded files of a batch with their drawn augmentation, from a worker for the pipeline; B images, the first axis."""

    keys: list[Any]  # SampleKeys, or indices in evaluation
    data: Tensor  # uint8, the files concatenated
    ends: np.ndarray  # int64 (B,), end of each file in `data`
    regions: np.ndarray  # int64 (B, 4), part of each image that is decoded: top, left, height, width
    sizes: np.ndarray  # int64 (B, 2), height and width that the region is resized to
    crops: np.ndarray  # int64 (B, 4), crop of the resized region: top, left, height, width
    cubic: np.ndarray  # bool (B,), resize by bicubic rather than bilinear interpolation
    flips: np.ndarray  # bool (B,)
    indices: np.ndarray  # int64 (B,)
    labels: np.ndarray  # int64 (B,)
    ops: tuple[Sequence[Op], ...] = ()  # training: RandAugment's
    erase: np.ndarray | None = None  # training: int64 (B, count, 4)
    bad: tuple[BadImage, ...] = ()
    decoded: bool = False  # the files hold pixels only, which DALI need not decode

    @property
    def inputs(self) -> dict[str, np.ndarray]:
        """Return the pipeline's inputs other than the files, by name."""
        return {name: getattr(self, name) for name in ("regions", "sizes", "crops", "cubic", "flips")}

    def files(self) -> list[np.ndarray]:
        """Return the bytes of each file, uint8."""
        return np.split(self.data.numpy(), self.ends[:-1])


File: TypeAlias = tuple[np.ndarray, int, int]  # bytes, and height and width of the image


def read_for_dali(source: ImageSource, index: int, decoded: bool = False) -> File:
    """Return an image's bytes for DALI, with its height and width; UnreadableImageError names its file.

    With `decoded` every file is decoded here and handed over as pixels.
    """
    data = read(source, index)
    header = None if decoded else _ordinary_header(data)
    if header is not None:
        return data, header.height, header.width
    image = decode(data, source.name(index))
    height, width = image.shape[-2:]
    pixels = image.permute(1, 2, 0).contiguous().numpy().tobytes()
    return np.frombuffer(b"P6\n%d %d\n255\n" % (width, height) + pixels, dtype=np.uint8), height, width


def _ordinary_header(data: np.ndarray) -> FrameHeader | None:
    """Return the header of a JPEG that any decoder accepts, within the limits on files; None for others."""
    try:
        header = check_jpeg(data)
    except ValueError:
        return None
    return header if is_ordinary(header, data) else None


class EncodedTrainDataset(BatchDataset[SampleKey, TrainTransform, EncodedBatch]):
    """Data set of encoded micro-batches."""

    def load_batch(self, keys: list[SampleKey], decoded: bool = False) -> EncodedBatch:
        """Return the micro-batch of the keys; `decoded` as for `read_for_dali`."""
        files, draws, indices, bad = [], [], [], []
        for epoch, position, index in keys:
            (data, height, width), loaded, replaced = read_or_replace(
                index, len(self), lambda i: read_for_dali(self.source, i, decoded), self.source.name
            )
            files.append(data)
            indices.append(loaded)
            bad += replaced
            draws.append(self.transform.draw(epoch, position, height, width))
        sides = np.array([drawn.size for drawn in draws], dtype=np.int64)
        return EncodedBatch(
            keys,
            *_concatenate(files),
            regions=np.array([drawn.crop for drawn in draws], dtype=np.int64),
            sizes=np.stack([sides, sides], 1),
            crops=np.stack([0 * sides, 0 * sides, sides, sides], 1),
            cubic=np.array([drawn.interpolation == "bicubic" for drawn in draws]),
            flips=np.array([drawn.flip for drawn in draws]),
            indices=np.array(indices, dtype=np.int64),
            labels=self.source.labels[indices],
            ops=tuple(drawn.ops for drawn in draws),
            erase=np.stack([drawn.erase for drawn in draws]),
            bad=tuple(bad),
            decoded=decoded,
        )


class EncodedEvalDataset(BatchDataset[int, EvalTransform, EncodedBatch]):
    """Data set of encoded evaluation batches."""

    def load_batch(self, keys: list[int], decoded: bool = False) -> EncodedBatch:
        """Return the batch of the indices; `decoded` as for `read_for_dali`."""
        files = [read_for_dali(self.source, index, decoded) for index in keys]
        geometry = [self.transform.geometry(height, width) for _, height, width in files]
        return EncodedBatch(
            keys,
            *_concatenate([data for data, _, _ in files]),
            regions=np.array([(0, 0, height, width) for _, height, width in files], dtype=np.int64),
            sizes=np.array([size for size, _ in geometry], dtype=np.int64),
            crops=np.array([crop for _, crop in geometry], dtype=np.int64),
            cubic=np.full(len(files), self.transform.interpolation == "bicubic"),
            flips=np.zeros(len(files), dtype=bool),
            indices=np.array(keys, dtype=np.int64),
            labels=self.source.labels[keys],
            decoded=decoded,
        )


@dataclass(eq=False, repr=False)
class DaliTrainLoader(BaseTrainLoader):
    """One rank's augmented micro-batches, epoch by epoch, from DALI."""

    device: torch.device | str = "cpu"  # of the batches
    backend: str = "auto"  # of DALI: auto (that of `device`), cpu or gpu

    def __post_init__(self) -> None:
        super().__post_init__()
        self._device = torch.device(self.device)
        dataset = EncodedTrainDataset(self.source, self.transform)
        loader = build_dataloader(dataset, self._keys, readers_of(self.workers), self.prefetch, pin_memory=False)
        self._decoder = _Decoder(
            dataset,
            loader,
            batch_size=self.sampler.micro_batch_size,
            threads=self.workers,
            device=self._device,
            backend=self.backend,
        )
        self._augment = RandAugment(self.transform.fill, self._device)

    def _batches(self) -> Iterator[Batch]:
        for encoded, images in self._decoder:
            images = self._augment(images.to(self._device, non_blocking=True), encoded.ops)
            yield _build_batch(encoded, images)


@dataclass(eq=False, repr=False)
class DaliEvalLoader(BaseEvalLoader):
    """One rank's share of a split, each image once over all ranks, from DALI."""

    device: torch.device | str = "cpu"
    backend: str = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._device = torch.device(self.device)
        dataset = EncodedEvalDataset(self.source, self.transform)
        loader = build_dataloader(dataset, self._indices, readers_of(self.workers), self.prefetch, pin_memory=False)
        self._decoder = _Decoder(
            dataset,
            loader,
            batch_size=self.batch_size,
            threads=self.workers,
            device=self._device,
            backend=self.backend,
        )

    def __iter__(self) -> Iterator[Batch]:
        for encoded, images in self._decoder:
            yield _build_batch(encoded, images.to(self._device, non_blocking=True))


def readers_of(workers: int) -> int:
    """Return the number of reader processes for `workers` decoding threads."""
    return -(-workers // DECODERS_PER_READER)


def check_dali(backend: str, device: torch.device) -> None:
    """Raise ValueError if DALI is not installed or its backend cannot run on the device."""
    assert backend in DEVICES, backend
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
        dataset: EncodedTrainDataset | EncodedEvalDataset,
        loader: DataLoader,
        *,
        batch_size: int,
        threads: int,
        device: torch.device,
        backend: str,
    ) -> None:
        check_dali(backend, device)
        on_gpu = backend == "gpu" or (backend == "auto" and device.type == "cuda")
        self._gpu = (torch.cuda.current_device() if device.index is None else device.index) if on_gpu else None
        self._dataset, self._loader, self._batch_size, self._threads = dataset, loader, batch_size, threads
        self._pipeline: Pipeline | None = None

    def __iter__(self) -> Iterator[tuple[EncodedBatch, Tensor]]:
        """Yield each batch with its crops, uint8 (B, 3, S, S), on the device of the backend.

        A file that DALI cannot decode breaks its pipeline. The batches in flight are then decoded as in the torch loader,
        which replaces or names the file, and a new pipeline continues with them.
        """
        batches = iterate_batches(self._loader)
        again = iter([first]) if (first := next(batches, None)) else iter(())  # starts the workers before any thread
        while True:
            in_flight: deque[EncodedBatch] = deque()
            try:
                for encoded, images in self._start_pipeline().run(_recorded(chain(again, batches), in_flight)):
                    in_flight.popleft()
                    yield encoded, images
                return
            except RuntimeError:
                if self._pipeline is None or not self._pipeline.broken:
                    raise
                self._pipeline = None
                if any(batch.decoded for batch in in_flight):
                    raise
            again = iter([self._dataset.load_batch(batch.keys, decoded=True) for batch in in_flight])

    def _start_pipeline(self) -> "Pipeline":
        if self._pipeline is None:
            from data.loaders.dali_pipeline import Pipeline

            self._pipeline = Pipeline(self._batch_size, self._threads, self._gpu)
        return self._pipeline


def _recorded(batches: Iterable[EncodedBatch], in_flight: deque[EncodedBatch]) -> Iterator[EncodedBatch]:
    for batch in batches:
        in_flight.append(batch)
        yield batch


def _concatenate(files: list[np.ndarray]) -> tuple[Tensor, np.ndarray]:
    return torch.from_numpy(np.concatenate(files)), np.cumsum([len(data) for data in files])


def _build_batch(encoded: EncodedBatch, images: Tensor) -> Batch:
    """Return the batch; the small tensors page-locked if the images are on a GPU, so that nothing synchronises with it."""
    pinned = images.device.type == "cuda"
    labels, indices = (_tensor(array, pinned) for array in (encoded.labels, encoded.indices))
    erase = None if encoded.erase is None else _tensor(encoded.erase, pinned)
    return Batch(images, labels, indices, erase, encoded.bad)


def _tensor(array: np.ndarray, pinned: bool) -> Tensor:
    return torch.from_numpy(array).pin_memory() if pinned else torch.from_numpy(array)
