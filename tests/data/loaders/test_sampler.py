"""Sampler: a pure function of (seed, epoch), the same micro-batches for any world size, DeiT's with repeated augmentation."""

import numpy as np
import pytest

from data.loaders.sampler import Sampler, evaluation_indices

FROZEN = [63, 13, 12, 50, 26, 4]


def sampler(num_samples=1000, seed=0, global_batch=64, micro_batch=16, **options):
    return Sampler(num_samples, seed, global_batch, micro_batch, **options)


def test_order_is_a_permutation_and_pure_in_seed_and_epoch():
    asked_in_order = sampler()
    orders = [asked_in_order.order(epoch).copy() for epoch in range(3)]
    assert all(np.array_equal(np.sort(order), np.arange(1000)) for order in orders)
    assert not np.array_equal(orders[0], orders[1])
    assert np.array_equal(sampler().order(2), orders[2])  # without the epochs before
    assert np.array_equal(asked_in_order.order(0), orders[0])  # and back again
    assert not np.array_equal(sampler(seed=1).order(0), orders[0])


def test_order_is_frozen():
    """A changed number here means that every run so far would resume in another order: do not adapt the test."""
    assert sampler(num_samples=64).order(5)[:6].tolist() == [49, 48, 41, 4, 44, 10]


def test_block_order_is_a_permutation_and_pure_in_seed_and_epoch():
    orders = [sampler(100_000, block=32).order(epoch) for epoch in range(2)]
    assert all(np.array_equal(np.sort(order), np.arange(100_000)) for order in orders)
    assert not np.array_equal(orders[0], orders[1])
    assert np.array_equal(sampler(100_000, block=32).order(1), orders[1])
    assert not np.array_equal(sampler(100_000, block=32, seed=1).order(1), orders[1])
    assert sampler(num_samples=64, block=8).order(5)[:6].tolist() == FROZEN  # as above: do not adapt the test


@pytest.mark.parametrize(
    ("num_samples", "block", "windows"), [(100_000, 32, 12), (100_003, 32, 12), (1000, 32, 1), (90, 100, 1)]
)
def test_block_order_reads_the_blocks_of_one_window_at_a_time(num_samples, block, windows):
    order = sampler(num_samples, block=block).order(0)
    counts = [len(piece) for piece in np.array_split(np.arange(-(-num_samples // block)), windows)]
    start, seen = 0, []
    for count in counts:
        blocks = set()
        while len(blocks) < count or (start < num_samples and order[start] // block in blocks):
            blocks.add(order[start] // block)
            start += 1
        seen.append(blocks)
    assert start == num_samples
    assert sum(map(len, seen)) == len(set.union(*seen))  # no block is in two windows
    if windows > 1:
        assert max(seen[0]) > 2 * len(seen[0])  # the blocks of a window lie apart
        assert np.abs(np.diff(order[:2000] // block)).mean() > 100  # and their images are mixed


def test_block_order_follows_the_order_of_storage():
    stored = np.random.RandomState(0).permutation(1000)
    assert np.array_equal(sampler(block=8, storage=stored).order(3), stored[sampler(block=8).order(3)])


def test_block_order_repeats_images_as_the_full_one():
    repeated = sampler(block=8, repeats=3).order(0)
    assert np.array_equal(repeated, np.repeat(sampler(block=8).order(0)[:256], 3)[:768])


def test_order_without_shuffle_counts_up():
    assert np.array_equal(sampler(shuffle=False).order(3), np.arange(1000))


def test_micro_batches_are_contiguous_pieces_of_the_order():
    epochs = sampler()
    assert (epochs.updates_per_epoch, epochs.micro_batches_per_update) == (15, 4)
    seen = []
    for update in range(15):
        for j in range(4):
            positions, indices = epochs.micro_batch(7, update, j)
            assert positions.dtype == indices.dtype == np.int64
            assert np.array_equal(indices, epochs.order(7)[positions])
            seen.append(positions)
    assert np.array_equal(np.concatenate(seen), np.arange(960))  # the incomplete last update is dropped


def deit_rank(permutation, repeats, rank, world):
    """DeiT's RASampler (facebookresearch/deit, samplers.py) for one rank, with the permutation given."""
    per_rank = -(-len(permutation) * repeats // world)
    indices = np.repeat(permutation, repeats)
    indices = np.concatenate([indices, indices[: per_rank * world - len(indices)]])
    return indices[rank : per_rank * world : world][: len(permutation) // 256 * 256 // world]


@pytest.mark.parametrize("num_samples", [1000, 1024])
def test_repeated_augmentation_gives_deits_batches(num_samples):
    permutation = sampler(num_samples).order(4)
    repeated = sampler(num_samples, global_batch=64, micro_batch=8, repeats=3)
    for rank in range(8):
        wanted = deit_rank(permutation, 3, rank, 8)[: repeated.updates_per_epoch * 8]
        found = [repeated.micro_batch(4, update, rank)[1] for update in range(repeated.updates_per_epoch)]
        assert np.array_equal(np.concatenate(found), wanted)


def test_repeated_augmentation_of_imagenet_counts_as_deit():
    epochs = Sampler(1_281_167, 0, 1024, 128, repeats=3)
    order = epochs.order(0)
    assert (len(order), len(np.unique(order)), epochs.updates_per_epoch) == (1_281_024, 427_008, 1251)
    assert np.array_equal(order[0::3], order[1::3])
    assert np.array_equal(order[0::3], order[2::3])


@pytest.mark.parametrize(("micro_batch", "most"), [(8, 1), (16, 1), (32, 2), (64, 3)])
def test_copies_of_an_image_fall_into_different_micro_batches_where_there_are_enough(micro_batch, most):
    repeated = sampler(global_batch=64, micro_batch=micro_batch, repeats=3)
    counts = [
        np.unique(repeated.micro_batch(0, update, j)[1], return_counts=True)[1].max()
        for update in range(repeated.updates_per_epoch)
        for j in range(repeated.micro_batches_per_update)
    ]
    assert max(counts) == most


def test_repeated_augmentation_uses_each_position_once():
    repeated = sampler(global_batch=64, micro_batch=8, repeats=3)
    pieces = [repeated.micro_batch(0, u, j)[0] for u in range(repeated.updates_per_epoch) for j in range(8)]
    assert np.array_equal(np.sort(np.concatenate(pieces)), np.arange(repeated.updates_per_epoch * 64))


def test_small_repeated_epoch_keeps_its_length():
    assert len(sampler(num_samples=100, repeats=3).order(0)) == 100


def test_too_few_images_name_the_key_and_the_remedy():
    with pytest.raises(
        ValueError, match=r"TRAIN.GLOBAL_BATCH=64 .* 50 positions \(50 training images\); lower it to 50"
    ):
        sampler(num_samples=50)


def test_batch_that_does_not_divide_is_refused():
    """BatchPlan states the valid ones: tests/engine/test_batch_plan.py."""
    with pytest.raises(AssertionError, match="64, 24"):
        sampler(micro_batch=24)


@pytest.mark.parametrize(("update", "j"), [(15, 0), (0, 4), (-1, 0)])
def test_micro_batch_outside_the_epoch_is_refused(update, j):
    with pytest.raises(ValueError, match="outside the epoch's 15 updates of 4 micro-batches"):
        sampler().micro_batch(0, update, j)


@pytest.mark.parametrize("world", [1, 2, 3, 7, 12])
def test_evaluation_indices_hold_each_image_once(world):
    shares = [evaluation_indices(10, rank, world) for rank in range(world)]
    assert sorted(np.concatenate(shares).tolist()) == list(range(10))


def test_evaluation_rank_outside_the_world_is_refused():
    with pytest.raises(ValueError, match=r"rank 2 must lie in 0 \.\. 1"):
        evaluation_indices(10, 2, 2)
