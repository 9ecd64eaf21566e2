"""The index stream: which image stands at which position of which epoch, and which micro-batch it falls into.

An epoch is one global order of sample indices, a pure function of (seed, epoch). Update u learns from the contiguous
piece [u * global_batch, (u + 1) * global_batch) of it, and every update falls into the same micro-batches whatever the
number of processes: rank r of world W takes micro-batches r, r + W, ... . The last incomplete update is dropped.

With repeated augmentation the copies of an image stand next to each other in the order. DeiT's sampler deals such an
order to its ranks like cards, so that the copies fall on different ranks; here micro-batch j of an update takes every
A-th position of the update's piece from j on, A being the micro-batches of an update. For A = published ranks
(1024 images in 8 x 128) these are DeiT's batches. Copies share a micro-batch only where A is smaller than `repeats`.

For storage that is slow at random reads, a block shuffle takes the images in the order in which they are stored, cuts
that into blocks, shuffles the blocks, and then the images inside windows of WINDOW_BLOCKS blocks or a few more: at any
time only the blocks of one window are read. It costs randomness. An image can only meet those of its window, and the
images of a block always come together; where images are stored class by class, a block is of one class or two. With
ImageNet so stored and blocks of 64, a window holds 16,400 images, and a batch of 1024 has 231 classes on average instead
of 641; blocks of 1024 bring 370, for windows of 320,000 images. Shards written in random order have no such limit.
"""

import numpy as np

from common.rng import keyed_generator

# DeiT cuts a repeated epoch to a multiple of this many positions, whatever the batch.
REPEATED_EPOCH_MULTIPLE = 256
WINDOW_BLOCKS = 256


class Sampler:
    """The order of all samples of every epoch, cut into updates and micro-batches."""

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
        """`block` images a block of the block shuffle, 0 for a full one; `storage` the indices as they are stored."""
        if global_batch < 1 or micro_batch < 1 or global_batch % micro_batch:
            raise ValueError(
                f"TRAIN.GLOBAL_BATCH={global_batch} must be a positive multiple of TRAIN.MICRO_BATCH={micro_batch}"
            )
        if repeats < 1:
            raise ValueError(f"AUG.REPEATS={repeats} must be at least 1")
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
        """Whole updates in an epoch; the incomplete last one is dropped."""
        return self.epoch_length // self.global_batch

    @property
    def micro_batches_per_update(self) -> int:
        """Micro-batches of an update, over all processes and accumulation steps together."""
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


def evaluation_indices(num_samples: int, rank: int, world: int) -> np.ndarray:
    """Return this rank's share of 0 .. num_samples - 1, every world-th index, without padding; int64."""
    if not 0 <= rank < world:
        raise ValueError(f"rank {rank} must lie in 0 .. {world - 1}, the processes there are")
    return np.arange(rank, num_samples, world, dtype=np.int64)
