"""Torch loader: micro-batches bit-identical for any workers and world size, resumable, exact in evaluation."""

import threading
import warnings

import numpy as np
import pytest
import torch

from data.augment.device_stage import DeviceStage
from data.augment.mixup import Mixup
from data.augment.rand_augment_policy import parse_policy
from data.augment.transforms import EvalTransform, TrainTransform
from data.loaders.sampler import Sampler
from data.loaders.torch_loader import EvalLoader, TrainLoader
from data.stores.folder import class_folders, scan
from tests.helpers.data_doubles import write_folder

MICRO, PER_UPDATE = 4, 4


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = write_folder(tmp_path_factory.mktemp("pictures"), train={"cat": 20, "dog": 20, "owl": 13}) / "train"
    return scan(folder, class_folders(folder), must_hold_all=True)


class Recorded:
    """Image source that records the indices read."""

    def __init__(self, source):
        self.source, self.labels, self.name, self.seen = source, source.labels, source.name, []

    def __len__(self):
        return len(self.source)

    def read(self, index):
        self.seen.append(index)
        return self.source.read(index)


def loader(source, rank=0, world=1, workers=0, repeats=1):
    sampler = Sampler(len(source), 1, MICRO * PER_UPDATE, MICRO, repeats=repeats)
    transform = TrainTransform(24, 1, policy=parse_policy("rand-m9-mstd0.5-inc1"), interpolation="random")
    return TrainLoader(source, transform, sampler, rank, world, workers, prefetch=2)


def by_number(source, world, workers=0, repeats=1, epochs=(0, 1)):
    """Return {(epoch, update, micro-batch): batch tensors, images and targets of the device stage}, over all ranks."""
    stage = DeviceStage(Mixup(3), (0.5, 0.5, 0.5), (0.2, 0.2, 0.2), seed=1)
    found = {}
    for rank in range(world):
        own = loader(source, rank, world, workers, repeats)
        assert own.updates_per_epoch == 3
        for epoch in epochs:
            batches = own.epoch(epoch)
            for update in range(own.updates_per_epoch):
                for j in range(rank, PER_UPDATE, world):
                    batch = next(batches)
                    images, targets = stage.train(batch, update, j, epoch)
                    found[epoch, update, j] = (batch.images, batch.labels, batch.indices, batch.erase, images, targets)
            assert next(batches, None) is None
    return found


def assert_same(found, wanted):
    assert found.keys() == wanted.keys()
    for number, tensors in wanted.items():
        assert all(torch.equal(one, other) for one, other in zip(found[number], tensors, strict=True)), number


@pytest.fixture(scope="module")
def reference(source):
    return by_number(source, world=1)


def test_batches_hold_the_samplers_images(source, reference):
    order = Sampler(len(source), 1, MICRO * PER_UPDATE, MICRO).order(1)
    images, labels, indices, erase, *_ = reference[1, 2, 3]
    assert images.shape == (MICRO, 3, 24, 24)
    assert images.dtype == torch.uint8
    assert erase.shape == (MICRO, 1, 4)
    assert indices.tolist() == order[44:48].tolist()
    assert labels.tolist() == source.labels[order[44:48]].tolist()
    boxes = torch.cat([tensors[3] for tensors in reference.values()])
    assert 0 < (boxes[:, 0, 2] > 0).float().mean() < 0.5


def test_epochs_differ(reference):
    assert not torch.equal(reference[0, 0, 0][0], reference[1, 0, 0][0])


@pytest.mark.parametrize(("world", "workers"), [(1, 1), (1, 2), (2, 0), (2, 1), (4, 0), (4, 2)])
def test_workers_and_world_size_change_nothing(source, reference, world, workers):
    assert_same(by_number(source, world, workers), reference)


def test_world_size_changes_nothing_with_repeated_augmentation(source):
    wanted = by_number(source, world=1, repeats=3, epochs=(0,))
    assert_same(by_number(source, world=4, repeats=3, epochs=(0,)), wanted)
    indices = torch.stack([torch.cat([wanted[0, u, j][2] for j in range(4)]) for u in range(3)])
    assert all(torch.unique(row, return_counts=True)[1].max() == 3 for row in indices)
    copies = [t[0] for t in wanted.values()]
    assert len({image.numpy().tobytes() for image in torch.cat(copies)}) == 48  # copies differ in their augmentation


@pytest.mark.parametrize("workers", [0, 2])
def test_epoch_from_an_update_on_is_the_tail_of_the_whole(source, reference, workers):
    own = loader(source, workers=workers)
    list(own.epoch(0, first_update=2))
    batches = list(own.epoch(1, first_update=1))
    wanted = [reference[1, update, j] for update in (1, 2) for j in range(PER_UPDATE)]
    assert len(batches) == len(wanted)
    for batch, (images, labels, indices, erase, *_) in zip(batches, wanted, strict=True):
        assert torch.equal(batch.images, images)
        assert torch.equal(batch.labels, labels)
        assert torch.equal(batch.indices, indices)
        assert torch.equal(batch.erase, erase)


def test_skipped_updates_are_not_read(source):
    recorded = Recorded(source)
    batches = list(loader(recorded).epoch(1, first_update=2))
    assert recorded.seen == torch.cat([batch.indices for batch in batches]).tolist()
    assert len(recorded.seen) == MICRO * PER_UPDATE
    assert list(loader(recorded).epoch(0, first_update=3)) == []


@pytest.mark.parametrize("workers", [0, 2])
def test_abandoned_epoch_does_not_change_the_next(source, reference, workers):
    own = loader(source, workers=workers)
    abandoned = own.epoch(0)
    next(abandoned)
    batches = list(own.epoch(1))
    assert torch.equal(batches[0].images, reference[1, 0, 0][0])
    assert len(batches) == 12


@pytest.mark.parametrize("workers", [0, 1])
def test_loading_leaves_the_default_generators_alone(source, workers):
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    list(loader(source, workers=workers).epoch(0))
    list(EvalLoader(source, EvalTransform(24, 28), 8, workers=workers))
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)


def test_starting_workers_beside_threads_warns_of_nothing(source):
    done = threading.Event()
    thread = threading.Thread(target=done.wait)
    thread.start()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")  # as an error, Python 3.12 would drop its warning of forks
        list(loader(source, workers=1).epoch(0, first_update=2))
    done.set()
    thread.join()
    assert [str(warning.message) for warning in caught if "fork" in str(warning.message)] == []


@pytest.mark.parametrize(("world", "workers"), [(1, 0), (1, 2), (2, 0), (2, 1), (3, 0), (3, 2)])
def test_evaluation_gives_each_image_once(source, world, workers):
    wanted = EvalTransform(24, 28)
    seen = []
    for rank in range(world):
        own = EvalLoader(source, wanted, 8, rank, world, workers)
        assert own.num_images == 53
        for _ in range(2):
            batches = list(own)
            assert len(batches) == len(own)
        for batch in batches:
            assert batch.erase is None
            assert batch.labels.tolist() == source.labels[batch.indices.numpy()].tolist()
        seen += torch.cat([batch.indices for batch in batches]).tolist()
    assert sorted(seen) == list(range(53))


def test_evaluation_pixels_depend_on_the_image_alone(source):
    pixels = {}
    for world, workers, size in [(1, 0, 8), (3, 1, 5)]:
        for rank in range(world):
            for batch in EvalLoader(source, EvalTransform(24, 28), size, rank, world, workers):
                for index, image in zip(batch.indices.tolist(), batch.images, strict=True):
                    assert torch.equal(pixels.setdefault(index, image), image)
    assert len(pixels) == 53


def test_more_ranks_than_images_leave_some_without():
    assert [len(EvalLoader(range(2), EvalTransform(24), 8, rank, 3)) for rank in range(3)] == [1, 1, 0]


def error_of(batches):
    """Return the message; `pytest.raises() as error` would tie loader and traceback into a cycle that is slow to break."""
    try:
        list(batches)
    except ValueError as error:
        return str(error)
    return None


@pytest.mark.parametrize("workers", [0, 1])
def test_folder_without_a_readable_file_is_an_error_that_names_one(tmp_path, workers):
    folder = write_folder(tmp_path, train={"cat": 16}) / "train"
    for path in folder.glob("cat/*"):
        path.write_bytes(b"\xff\xd8 not a picture")
    source = scan(folder, ["cat"], must_hold_all=True)
    first = Sampler(16, 1, MICRO * PER_UPDATE, MICRO).order(0)[0]
    reason = "cannot be decoded (16 bytes; no image format that is read)"
    found = error_of(loader(source, workers=workers).epoch(0))  # and no traceback of another process
    assert found.startswith(f"{source.name(first)}: {reason}, and neither can the 15 images after it be read")
    found = error_of(EvalLoader(source, EvalTransform(24, 28), 8, workers=workers))
    assert found == f"{source.name(0)}: {reason}; restore the file or take it out of the folder"


def test_impossible_shares_are_refused(source):
    with pytest.raises(AssertionError, match="4, 3"):  # BatchPlan states the valid ones
        loader(source, world=3)
    with pytest.raises(ValueError, match=r"rank 2 must lie in 0 \.\. 1"):
        loader(source, rank=2, world=2)
    with pytest.raises(ValueError, match=r"first_update=4 must lie in 0 \.\. 3"):
        list(loader(source).epoch(0, first_update=4))
