"""Synthetic loader: random images without decoding, an upper bound on the speed of every other loader.

A few random micro-batches are generated once and yielded in turn. Which one depends on the micro-batch's number alone, so
that the world size does not matter.
"""

import functools
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch

from common.rng import keyed_generator
from common.timeline import Timeline
from data.augment.random_erasing import RandomErasing
from data.loaders.batch import Batch
from data.loaders.sampler import MicroBatchSampler, Sampler, evaluation_indices

POOL = 4  # micro-batches generated for training
EVAL_POOL = 64  # images generated for evaluation


class SyntheticTrain:
    """Random micro-batches with the interface of TrainLoader; the indices are the sampler's."""

    def __init__(
        self,
        sampler: Sampler,
        size: int,
        num_classes: int,
        erase: RandomErasing,
        seed: int,
        rank: int = 0,
        world: int = 1,
        pin_memory: bool = False,
        sizes: Timeline | None = None,
    ) -> None:
        self._micro_batches = MicroBatchSampler(sampler, rank, world)
        self._size, self._sizes, self._pin_memory = size, sizes, pin_memory
        self._random_batch = functools.partial(_random_batch, seed, num_classes=num_classes, erase=erase)
        self._pool: list[Batch] = []

    @property
    def updates_per_epoch(self) -> int:
        """Number of updates in an epoch."""
        return self._micro_batches.sampler.updates_per_epoch

    def epoch(self, epoch: int, first_update: int = 0) -> Iterator[Batch]:
        """Yield this rank's micro-batches of updates first_update .. end; their images are shared and must not be modified."""
        sampler = self._micro_batches.sampler
        self._micro_batches.start(epoch, first_update)
        size = int(self._sizes.at(epoch)) if self._sizes else self._size
        if not self._pool or self._pool[0].images.shape[-1] != size:
            self._pool = [self._random_batch(k, sampler.micro_batch_size, size) for k in range(POOL)]
            if self._pin_memory:
                self._pool = [batch.pin_memory() for batch in self._pool]
        for update, j in self._micro_batches.numbers():
            batch = self._pool[(update * sampler.micro_batches_per_update + j) % POOL]
            yield replace(batch, indices=torch.from_numpy(sampler.micro_batch(epoch, update, j)[1]))


class SyntheticEval:
    """Random images, each once over all ranks; image and label are functions of the index."""

    def __init__(
        self, num_images: int, size: int, num_classes: int, batch_size: int, seed: int, rank: int = 0, world: int = 1
    ) -> None:
        self.num_images = num_images
        self._images = _random_batch(seed, POOL, EVAL_POOL, size, num_classes, RandomErasing(prob=0)).images
        self._labels = torch.from_numpy(keyed_generator(seed, "synthetic labels").randint(num_classes, size=num_images))
        self._own = torch.from_numpy(evaluation_indices(num_images, rank, world))
        self._batch_size = batch_size

    def __len__(self) -> int:
        return -(-len(self._own) // self._batch_size)

    def __iter__(self) -> Iterator[Batch]:
        for indices in self._own.split(self._batch_size) if len(self._own) else ():
            yield Batch(self._images[indices % EVAL_POOL], self._labels[indices], indices)


def _random_batch(seed: int, number: int, batch: int, size: int, num_classes: int, erase: RandomErasing) -> Batch:
    """Return the batch of an RNG key `number`."""
    rng = keyed_generator(seed, "synthetic", number)
    images = np.frombuffer(bytearray(rng.bytes(batch * 3 * size * size)), dtype=np.uint8).reshape(batch, 3, size, size)
    labels = rng.randint(num_classes, size=batch)
    boxes = np.stack([erase.draw(rng, size) for _ in range(batch)])
    indices = torch.arange(batch)
    return Batch(torch.from_numpy(images), torch.from_numpy(labels), indices, torch.from_numpy(boxes))
