"""Sampler: the order of a training epoch's images, cut into updates and micro-batches, and the share of each rank.

An epoch is one global order of sample indices, a pure function of (seed, epoch). Update u trains on the contiguous
piece [u * global_batch, (u + 1) * global_batch) of it, and every update has the same micro-batches for any world size:
rank r of world size W takes micro-batches r, r + W, ... . The last incomplete update is dropped.

With repeated augmentation the copies of an image are adjacent in the order. DeiT's sampler distributes such an order
round-robin over its ranks, so that the copies are on different ranks; here micro-batch j of an update takes every A-th
position of the update's piece from j on, A being the micro-batches of an update. For A = published ranks
(1024 images in 8 x 128) these are DeiT's batches. Copies share a micro-batch only where A is smaller than `repeats`.

For storage that is slow at random reads, a block shuffle takes the images in storage order, cuts that into blocks,
shuffles the blocks, and then the images inside windows of WINDOW_BLOCKS blocks or a few more: at any time only the
blocks of one window are read. It costs randomness. An image is shuffled only with those of its window, and the images
of a block are always in the same window; where images are stored class by class, a block is of one class or two. With
ImageNet so stored and blocks of 64, a window holds 16,400 images, and a batch of 1024 has 231 classes on average instead
of 641; blocks of 1024 bring 370, for windows of 320,000 images. Shards written in random order have no such limit.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from common.rng import keyed_generator

# DeiT cuts a repeated epoch to a multiple of this many positions, whatever the batch.
REPEATED_EPOCH_MULTIPLE = 256
WINDOW_BLOCKS = 256


class Sampler:
    """Order of all samples of every epoch, cut into updates and micro-batches."""

    def __init__(
        self,
        num_samples: int,
        seed: int,
        global_batch: int,
        micro_batch: int,
        repeats: int = 1,
        shuffle: bool = True,
        block: int = 0,
        storage: np.ndarray | None = None,
    ) -> None:
        """`block` is the block shuffle's block size in images, 0 for a full shuffle; `storage` the indices in storage order."""
        assert min(global_batch, micro_batch, repeats) > 0, (global_batch, micro_batch, repeats)
        assert global_batch % micro_batch == 0, (global_batch, micro_batch)
        self.num_samples, self.seed, self.repeats, self.shuffle = num_samples, seed, repeats, shuffle
        self.block, self.storage = block, storage
        self.global_batch, self.micro_batch_size = global_batch, micro_batch
        self.epoch_length = num_samples
        if repeats > 1 and num_samples >= REPEATED_EPOCH_MULTIPLE:
            self.epoch_length = num_samples // REPEATED_EPOCH_MULTIPLE * REPEATED_EPOCH_MULTIPLE
        if self.epoch_length < global_batch:
            raise ValueError(
                f"TRAIN.GLOBAL_BATCH={global_batch} is larger than the epoch of {self.epoch_length} positions "
                f"({num_samples} training images); lower it to {self.epoch_length} or less, or add images"
            )
        self._cached: tuple[int, np.ndarray] | None = None

    @property
    def updates_per_epoch(self) -> int:
        """Number of whole updates in an epoch; the incomplete last one is dropped."""
        return self.epoch_length // self.global_batch

    @property
    def micro_batches_per_update(self) -> int:
        """Number of micro-batches in an update, over all processes and accumulation steps together."""
        return self.global_batch // self.micro_batch_size

    def order(self, epoch: int) -> np.ndarray:
        """Return the epoch's sample indices by position, int64, read-only."""
        if self._cached is None or self._cached[0] != epoch:
            indices = np.arange(self.num_samples, dtype=np.int64)
            if self.shuffle and self.block:
                indices = self._block_shuffled(epoch)
            elif self.shuffle:
                keyed_generator(self.seed, "order", epoch).shuffle(indices)
            if self.repeats > 1:
                distinct = -(-self.epoch_length // self.repeats)
                indices = indices[:distinct].repeat(self.repeats)[: self.epoch_length]
            indices.flags.writeable = False
            self._cached = (epoch, indices)
        return self._cached[1]

    def _block_shuffled(self, epoch: int) -> np.ndarray:
        """Return the indices with their blocks shuffled, then shuffled inside windows of blocks; int64."""
        rng = keyed_generator(self.seed, "block order", epoch)
        stored = np.arange(self.num_samples, dtype=np.int64) if self.storage is None else self.storage
        blocks = np.split(stored, range(self.block, self.num_samples, self.block))
        order = rng.permutation(len(blocks))
        windows = np.array_split(order, max(1, len(order) // WINDOW_BLOCKS))
        pieces = [np.concatenate([blocks[i] for i in window]) for window in windows]
        for piece in pieces:
            rng.shuffle(piece)
        return np.concatenate(pieces)

    def micro_batch(self, epoch: int, update: int, j: int) -> tuple[np.ndarray, np.ndarray]:
        """Return (positions, indices) of micro-batch j of the epoch's update, both int64 (micro_batch,)."""
        if not (0 <= update < self.updates_per_epoch and 0 <= j < self.micro_batches_per_update):
            raise ValueError(
                f"update {update}, micro-batch {j} is outside the epoch's {self.updates_per_epoch} updates "
                f"of {self.micro_batches_per_update} micro-batches"
            )
        start = update * self.global_batch
        if self.repeats > 1:
            positions = np.arange(start + j, start + self.global_batch, self.micro_batches_per_update, dtype=np.int64)
        else:
            start += j * self.micro_batch_size
            positions = np.arange(start, start + self.micro_batch_size, dtype=np.int64)
        return positions, self.order(epoch)[positions]


class SampleKey(NamedTuple):
    """A training sample: the RNG key of its augmentation (epoch, position) and its image."""

    epoch: int
    position: int
    image: int  # index in the data set


class MicroBatchSampler:
    """Samples of one rank's micro-batches, from an update of an epoch on; the batch sampler of DataLoader."""

    def __init__(self, sampler: Sampler, rank: int, world: int) -> None:
        assert sampler.micro_batches_per_update % world == 0, (sampler.micro_batches_per_update, world)
        _check_rank(rank, world)
        self.sampler, self.rank, self.world = sampler, rank, world
        self.epoch, self.first_update = 0, 0

    def start(self, epoch: int, first_update: int) -> None:
        """Set the epoch and update that the next iteration starts at; ValueError if the epoch has no such update."""
        last = self.sampler.updates_per_epoch
        if not 0 <= first_update <= last:
            raise ValueError(f"first_update={first_update} must lie in 0 .. {last}, the epoch's updates")
        self.epoch, self.first_update = epoch, first_update

    def numbers(self) -> Iterator[tuple[int, int]]:
        """Yield (update, micro-batch number) in the order of training."""
        for update in range(self.first_update, self.sampler.updates_per_epoch):
            for j in range(self.rank, self.sampler.micro_batches_per_update, self.world):
                yield update, j

    def __iter__(self) -> Iterator[list[SampleKey]]:
        epoch = self.epoch
        for update, j in self.numbers():
            positions, indices = self.sampler.micro_batch(epoch, update, j)
            yield [SampleKey(epoch, *pair) for pair in zip(positions.tolist(), indices.tolist(), strict=True)]

    def __len__(self) -> int:
        per_update = self.sampler.micro_batches_per_update // self.world
        return (self.sampler.updates_per_epoch - self.first_update) * per_update


def evaluation_indices(num_samples: int, rank: int, world: int) -> np.ndarray:
    """Return the indices of a rank, every world-th of 0 .. num_samples - 1, without padding; int64."""
    _check_rank(rank, world)
    return np.arange(rank, num_samples, world, dtype=np.int64)


def evaluation_batches(num_samples: int, batch_size: int, rank: int, world: int) -> list[list[int]]:
    """Return the indices of a rank's evaluation batches; the last batch may be smaller."""
    own = evaluation_indices(num_samples, rank, world).tolist()
    return [own[start : start + batch_size] for start in range(0, len(own), batch_size)]


def _check_rank(rank: int, world: int) -> None:
    if not 0 <= rank < world:
        raise ValueError(f"rank {rank} must lie in 0 .. {world - 1}, the processes there are")
