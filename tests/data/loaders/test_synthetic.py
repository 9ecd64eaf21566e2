"""Synthetic loader: interface and numbering of the torch loader, without files."""

import pytest
import torch

from data.augment.random_erasing import RandomErasing
from data.loaders.sampler import Sampler
from data.loaders.synthetic import POOL, SyntheticEval, SyntheticTrain


def loader(rank=0, world=1, seed=0):
    return SyntheticTrain(Sampler(40, seed, 12, 3), 16, 7, RandomErasing(prob=1.0), seed, rank, world)


def by_number(world):
    found = {}
    for rank in range(world):
        own = loader(rank, world)
        batches = own.epoch(1)
        for update in range(own.updates_per_epoch):
            for j in range(rank, 4, world):
                found[update, j] = next(batches)
        assert next(batches, None) is None
    return found


def test_batches_have_the_torch_loaders_form():
    batches = list(loader().epoch(0))
    assert len(batches) == 3 * 4
    for batch in batches:
        assert batch.images.shape == (3, 3, 16, 16)
        assert batch.images.dtype == torch.uint8
        assert batch.labels.dtype == batch.indices.dtype == batch.erase.dtype == torch.int64
        assert batch.erase.shape == (3, 1, 4)
        assert batch.labels.min() >= 0
        assert batch.labels.max() < 7
    assert torch.cat([batch.indices for batch in batches]).tolist() == Sampler(40, 0, 12, 3).order(0)[:36].tolist()
    assert len({batch.images.numpy().tobytes() for batch in batches}) == POOL


@pytest.mark.parametrize("world", [2, 4])
def test_world_size_changes_nothing(world):
    wanted, found = by_number(1), by_number(world)
    assert found.keys() == wanted.keys()
    for number, batch in wanted.items():
        assert torch.equal(found[number].images, batch.images)
        assert torch.equal(found[number].labels, batch.labels)
        assert torch.equal(found[number].indices, batch.indices)


def test_epoch_from_an_update_on_is_the_tail_of_the_whole():
    whole, tail = list(loader().epoch(2)), list(loader().epoch(2, first_update=1))
    assert len(tail) == 8
    for one, other in zip(tail, whole[4:], strict=True):
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.indices, other.indices)


def test_images_come_from_the_seed():
    assert not torch.equal(next(loader(seed=1).epoch(0)).images, next(loader().epoch(0)).images)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_evaluation_gives_each_image_once_and_the_same(world):
    whole = next(iter(SyntheticEval(100, 8, 7, 100, seed=0)))
    seen = []
    for rank in range(world):
        own = SyntheticEval(100, 8, 7, 9, seed=0, rank=rank, world=world)
        assert own.num_images == 100
        batches = list(own)
        assert len(batches) == len(own)
        for batch in batches:
            seen += batch.indices.tolist()
            assert torch.equal(batch.images, whole.images[batch.indices])
            assert torch.equal(batch.labels, whole.labels[batch.indices])
    assert sorted(seen) == list(range(100))
    assert len(whole.labels.unique()) == 7


def test_evaluation_rank_without_images_is_empty():
    own = SyntheticEval(2, 8, 7, 9, seed=0, rank=2, world=3)
    assert len(own) == 0
    assert list(own) == []
