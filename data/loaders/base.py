"""Base classes of the torch and the DALI loader: constructor arguments, a rank's share, iteration over epochs."""

from collections.abc import Iterator
from dataclasses import dataclass

from data.augment.transforms import EvalTransform, TrainTransform
from data.loaders.batch import Batch
from data.loaders.image_source import ImageSource
from data.loaders.sampler import MicroBatchSampler, Sampler, evaluation_batches


@dataclass(eq=False, repr=False)
class BaseTrainLoader:
    """One rank's augmented micro-batches, epoch by epoch."""

    source: ImageSource
    transform: TrainTransform
    sampler: Sampler
    rank: int = 0
    world: int = 1
    workers: int = 0  # processes or, with DALI, decoding threads; 0 for none
    prefetch: int = 4  # batches prefetched by each process

    def __post_init__(self) -> None:
        self._keys = MicroBatchSampler(self.sampler, self.rank, self.world)

    @property
    def updates_per_epoch(self) -> int:
        """Number of updates in an epoch; each takes micro_batches_per_update / world batches from this loader."""
        return self.sampler.updates_per_epoch

    def epoch(self, epoch: int, first_update: int = 0) -> Iterator[Batch]:
        """Yield the micro-batches of updates first_update .. end, without reading those before.

        One epoch at a time: starting another ends the previous one.
        """
        self._keys.start(epoch, first_update)
        yield from self._batches()

    def _batches(self) -> Iterator[Batch]:
        """Yield a batch for each element of `_keys`."""
        raise NotImplementedError


@dataclass(eq=False, repr=False)
class BaseEvalLoader:
    """One rank's share of a split, each image once over all ranks; the last batch may be smaller."""

    source: ImageSource
    transform: EvalTransform
    batch_size: int
    rank: int = 0
    world: int = 1
    workers: int = 0
    prefetch: int = 4

    def __post_init__(self) -> None:
        self.num_images = len(self.source)
        self._indices = evaluation_batches(self.num_images, self.batch_size, self.rank, self.world)

    def __len__(self) -> int:
        return len(self._indices)

    def __iter__(self) -> Iterator[Batch]:
        """Yield the batches of the rank."""
        raise NotImplementedError
