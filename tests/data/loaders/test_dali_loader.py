"""DALI loader: the torch loader's batches by RNG key, its pixels within a level, its treatment of bad files."""

import os
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import config
from data.augment.rand_augment import RandAugment
from data.augment.rand_augment_policy import parse_policy
from data.augment.transforms import EvalTransform, TrainTransform
from data.loaders.dali_loader import DaliEvalLoader, DaliTrainLoader, check_dali
from data.loaders.decode import UnreadableImageError
from data.loaders.image_source import load
from data.loaders.sampler import Sampler
from data.loaders.torch_loader import EvalLoader, TrainLoader
from data.stores.folder import SUFFIXES, class_folders, scan
from tests.helpers.damaged_images import READABLE, UNREADABLE
from tests.helpers.data_doubles import picture, write_folder

pytest.importorskip("nvidia.dali", reason="DALI is not installed: pip install nvidia-dali-cuda130")
MICRO, PER_UPDATE = 4, 4
POLICY = parse_policy("rand-m9-mstd0.5-inc1")
GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def write_odd_files(folder):
    """Write readable files that are no ordinary JPEG: grey, four colours, progressive, PNG, trailing bytes, EXIF."""
    image = picture(np.random.RandomState(5), 61, 47)
    image.convert("L").save(folder / "grey.jpg")
    image.convert("CMYK").save(folder / "four.jpg")
    image.save(folder / "progressive.jpg", progressive=True)
    image.save(folder / "png.jpg", format="PNG")
    turned = Image.Exif()
    turned[274] = 6
    image.save(folder / "turned.jpg", exif=turned)
    (folder / "trailing.jpg").write_bytes((folder / "turned.jpg").read_bytes() + b"more")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = write_folder(tmp_path_factory.mktemp("pictures"), train={"cat": 20, "dog": 20, "owl": 7}) / "train"
    write_odd_files(folder / "owl")
    return scan(folder, class_folders(folder), must_hold_all=True)


def loader(
    kind, source, rank=0, world=1, workers=0, repeats=1, policy=POLICY, interpolation="random", size=24, **options
):
    sampler = Sampler(len(source), 1, MICRO * PER_UPDATE, MICRO, repeats=repeats)
    transform = TrainTransform(size, 1, policy=policy, interpolation=interpolation)
    return kind(source, transform, sampler, rank, world, workers, prefetch=2, **options)


def assert_same(found, wanted):
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.indices, other.indices)
        assert torch.equal(one.labels, other.labels)
        assert (one.erase is None) == (other.erase is None)
        assert one.erase is None or torch.equal(one.erase, other.erase)


def difference(found, wanted):
    """Return the mean and the largest difference of images of two lists of batches."""
    found, wanted = (torch.cat([batch.images.cpu() for batch in batches]).int() for batches in (found, wanted))
    return (found - wanted).abs().float().mean().item(), (found - wanted).abs().max().item()


@pytest.fixture(scope="module")
def reference(source):
    return list(loader(DaliTrainLoader, source).epoch(1))


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "random"])
def test_dali_loader_gives_the_torch_loaders_batches(source, interpolation):
    found, wanted = (
        list(loader(kind, source, policy=None, interpolation=interpolation).epoch(1))
        for kind in (DaliTrainLoader, TrainLoader)
    )
    assert len(found) == len(wanted) == 12
    for one, other in zip(found, wanted, strict=True):
        assert one.images.shape == (MICRO, 3, 24, 24)
        assert one.images.dtype == torch.uint8
        assert torch.equal(one.indices, other.indices)
        assert torch.equal(one.labels, other.labels)
        assert torch.equal(one.erase, other.erase)
    mean, largest = difference(found, wanted)
    assert mean < 0.3
    assert largest <= 6


def test_dali_loader_crops_and_flips_where_the_torch_loader_does(source):
    """Each crop is nearer to its counterpart than to its mirror image and to shifts by a pixel."""
    found, wanted = (list(loader(kind, source, policy=None).epoch(0)) for kind in (DaliTrainLoader, TrainLoader))
    ours, theirs = (torch.cat([batch.images for batch in batches]).float() for batches in (found, wanted))
    own = (ours - theirs).abs().mean((1, 2, 3))
    for other in (theirs.flip(-1), theirs.roll(1, -1), theirs.roll(1, -2)):
        assert (own < (ours - other).abs().mean((1, 2, 3))).all()


def test_dali_loader_augments_its_crops_as_drawn(source):
    plain = list(loader(DaliTrainLoader, source, policy=None).epoch(1))
    full = list(loader(DaliTrainLoader, source).epoch(1))
    transform = TrainTransform(24, 1, policy=POLICY, interpolation="random")
    changed = 0
    indices = torch.cat([batch.indices for batch in plain]).tolist()
    images = [torch.cat([batch.images for batch in batches]) for batches in (plain, full)]
    for position, (index, before, after) in enumerate(zip(indices, *images, strict=True)):
        ops = transform.draw(1, position, *load(source, index).shape[-2:]).ops
        wanted = RandAugment(transform.fill)(before.unsqueeze(0), [ops])[0]
        assert torch.equal(after, wanted)
        changed += not torch.equal(after, before)
    assert changed > 15


@pytest.mark.parametrize(("world", "workers"), [(1, 1), (2, 0), (4, 5)])
def test_dali_loader_workers_and_world_size_change_nothing(source, reference, world, workers):
    ranks = [list(loader(DaliTrainLoader, source, rank, world, workers).epoch(1)) for rank in range(world)]
    assert_same([ranks[i % world][i // world] for i in range(len(reference))], reference)


@pytest.mark.parametrize("workers", [0, 1])
def test_dali_loader_resumes_within_an_epoch(source, reference, workers):
    own = loader(DaliTrainLoader, source, workers=workers)
    abandoned = own.epoch(0)
    next(abandoned)
    assert_same(list(own.epoch(1, first_update=1)), reference[4:])
    assert_same(list(own.epoch(1)), reference)
    assert list(own.epoch(1, first_update=3)) == []
    with pytest.raises(ValueError, match=r"first_update=4 must lie in 0 \.\. 3"):
        next(own.epoch(1, first_update=4))


def test_dali_loader_repeats_images(source):
    batches = list(loader(DaliTrainLoader, source, repeats=3).epoch(0))
    wanted = list(loader(TrainLoader, source, repeats=3).epoch(0))
    assert [b.indices.tolist() for b in batches] == [b.indices.tolist() for b in wanted]
    assert len({image.numpy().tobytes() for batch in batches for image in batch.images}) == 48


@pytest.mark.parametrize(
    ("crop", "resize", "interpolation"), [(24, 28, "bicubic"), (24, 0, "bilinear"), (40, 40, "bicubic")]
)
def test_dali_loader_evaluates_each_image_once(source, crop, resize, interpolation):
    transform = EvalTransform(crop, resize, interpolation)
    for world in (1, 3):
        seen = []
        for rank in range(world):
            own = DaliEvalLoader(source, transform, 8, rank, world)
            wanted = list(EvalLoader(source, transform, 8, rank, world))
            assert own.num_images == 53
            for _ in range(2):
                found = list(own)
                assert len(found) == len(own) == len(wanted)
            for one, other in zip(found, wanted, strict=True):
                assert one.erase is None
                assert torch.equal(one.indices, other.indices)
                assert torch.equal(one.labels, other.labels)
            mean, largest = difference(found, wanted)
            assert mean < 0.25
            assert largest <= 4
            seen += torch.cat([batch.indices for batch in found]).tolist()
        assert sorted(seen) == list(range(53))


def broken_tables(data):
    """Return a JPEG with a valid header and broken Huffman tables, which only DALI itself detects."""
    at = data.index(b"\xff\xc4")
    return data[: at + 4] + b"\xff" * 26 + data[at + 30 :]


@pytest.mark.parametrize("workers", [0, 1])
def test_dali_loader_replaces_corrupt_files_as_the_torch_loader_does(tmp_path, workers):
    folder = write_folder(tmp_path, train={"cat": 20}) / "train"
    good = (folder / "cat" / "000.jpg").read_bytes()
    for number, data in {3: good[: len(good) // 2], 7: b"", 8: b"<html>", 15: broken_tables(good)}.items():
        (folder / "cat" / f"{number:03d}.jpg").write_bytes(data)
    (folder / "cat" / "011.jpg").unlink()
    (folder / "cat" / "011.jpg").mkdir()
    source = scan(folder, ["cat"], must_hold_all=True)
    found, wanted = (list(loader(kind, source, workers=workers).epoch(0)) for kind in (DaliTrainLoader, TrainLoader))
    assert [batch.bad for batch in found] == [batch.bad for batch in wanted]
    assert sum(len(batch.bad) for batch in found) > 2
    assert any("015" in bad.path for batch in found for bad in batch.bad)
    assert [batch.indices.tolist() for batch in found] == [batch.indices.tolist() for batch in wanted]
    transform = EvalTransform(24, 28)
    for kind in (DaliEvalLoader, EvalLoader):
        with pytest.raises(UnreadableImageError, match=r"003\.jpg: cannot be decoded"):
            list(kind(source, transform, 8, workers=workers))


def test_dali_loader_goes_on_after_a_file_that_stops_dali(tmp_path):
    folder = write_folder(tmp_path, train={"cat": 20}) / "train"
    path = folder / "cat" / "009.jpg"
    path.write_bytes(broken_tables(path.read_bytes()))
    source = scan(folder, ["cat"], must_hold_all=True)
    own, other = (loader(kind, source, policy=None) for kind in (DaliTrainLoader, TrainLoader))
    for epoch in range(3):
        mean, _ = difference(list(own.epoch(epoch)), list(other.epoch(epoch)))
        assert mean < 0.3
    with pytest.raises(UnreadableImageError, match=r"009\.jpg: cannot be decoded"):
        list(DaliEvalLoader(source, EvalTransform(24, 28), 8))


@pytest.mark.parametrize("kinds", [READABLE, UNREADABLE], ids=["readable", "unreadable"])
@pytest.mark.parametrize("workers", [0, 1])
def test_dali_loader_treats_damaged_and_odd_files_as_the_torch_loader_does(tmp_path, kinds, workers):
    folder = write_folder(tmp_path, train={"cat": 40}) / "train"
    for number, data in enumerate(kinds.values()):
        (folder / "cat" / f"{3 * number:03d}.jpg").write_bytes(data)
    source = scan(folder, ["cat"], must_hold_all=True)
    found, wanted = (
        [batch for epoch in range(2) for batch in loader(kind, source, workers=workers, policy=None).epoch(epoch)]
        for kind in (DaliTrainLoader, TrainLoader)
    )
    assert [batch.indices.tolist() for batch in found] == [batch.indices.tolist() for batch in wanted]
    assert [batch.bad for batch in found] == [batch.bad for batch in wanted]
    replaced = {bad.path for batch in found for bad in batch.bad}
    assert len(replaced) == (0 if kinds is READABLE else len(kinds))
    assert difference(found, wanted)[0] < 0.3
    transform = EvalTransform(24, 28)
    if kinds is READABLE:
        found, wanted = (list(kind(source, transform, 8, workers=workers)) for kind in (DaliEvalLoader, EvalLoader))
        assert difference(found, wanted)[0] < 0.3
        return
    for kind in (DaliEvalLoader, EvalLoader):
        with pytest.raises(UnreadableImageError, match=r"000\.jpg: cannot be decoded"):
            list(kind(source, transform, 8, workers=workers))


def test_dali_loader_evaluates_photographs_as_the_torch_loader_does(tmp_path):
    """Photographs have other spectra than drawn pictures; the archive is not part of the repository."""
    archive = Path(os.environ.get("RETOKEN_PHOTOGRAPHS", ""))
    if not archive.is_file():
        pytest.skip("RETOKEN_PHOTOGRAPHS names no tar of photographs")
    (tmp_path / "val/all").mkdir(parents=True)
    with tarfile.open(archive) as tar:
        members = [member for member in tar if member.isfile() and member.name.lower().endswith(SUFFIXES)]
        for number, member in enumerate(members[::4]):
            data = tar.extractfile(member).read()
            (tmp_path / f"val/all/{number:05d}.jpg").write_bytes(data)
    source = scan(tmp_path / "val", ["all"], must_hold_all=True)
    transform = EvalTransform(224, 256)
    own, other = DaliEvalLoader(source, transform, 25), EvalLoader(source, transform, 25)
    total = [difference([one], [two])[0] * len(one) for one, two in zip(own, other, strict=True)]
    assert 0 < sum(total) / len(source) < 0.2


def resident_bytes():
    with open("/proc/self/statm") as file:  # noqa: PTH123
        return int(file.read().split()[1]) * 4096


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_dali_loader_memory_stays_flat_over_epochs(source):
    own = loader(DaliTrainLoader, source, policy=None, size=224)
    val = DaliEvalLoader(source, EvalTransform(224, 256), 8)
    sizes = []
    for cycle in range(5):
        for epoch in range(3):
            assert len(list(own.epoch(3 * cycle + epoch))) == 12
            next(own.epoch(epoch))  # abandoned
        assert len(list(val)) == 7
        sizes.append(resident_bytes())
    assert sizes[-1] - sizes[1] < 20e6  # the batches of one cycle take 30 MB


def test_dali_that_is_missing_is_an_error_with_the_way_out(monkeypatch, source):
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    message = r"DATA\.LOADER=dali needs .*pip install nvidia-dali-cuda130 .*or set DATA\.LOADER to torch"
    with pytest.raises(ValueError, match=message):
        loader(DaliTrainLoader, source)
    with pytest.raises(ValueError, match=message):
        DaliEvalLoader(source, EvalTransform(24, 28), 8)


def test_dali_on_a_gpu_that_is_missing_is_an_error_with_the_way_out(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(
        ValueError, match=r"DATA\.DALI_DEVICE=gpu but there is no CUDA device; set DATA\.DALI_DEVICE to auto"
    ):
        check_dali("gpu", torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ValueError, match=r"DATA\.DALI_DEVICE=gpu but this run is on cpu"):
        check_dali("gpu", torch.device("cpu"))
    with pytest.raises(ValueError, match=r"DATA\.DALI_DEVICE must be one of auto, cpu, gpu, got 'tpu'"):
        config.load(opts=["DATA.LOADER", "dali", "DATA.DALI_DEVICE", "tpu"])
    check_dali("auto", torch.device("cpu"))


def test_dali_is_imported_by_its_loader_alone(run_script):
    done = run_script("-c", "import sys, data.build; print('nvidia.dali' in sys.modules)")
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=GPU)])
def test_dali_loader_on_a_gpu_is_near_the_torch_loader(source, device):
    wanted = list(loader(TrainLoader, source, policy=None).epoch(1))
    for backend in ("auto", "cpu", "gpu"):
        found = list(loader(DaliTrainLoader, source, policy=None, device=device, backend=backend).epoch(1))
        assert {batch.images.device.type for batch in found} == {"cuda"}
        mean, _ = difference(found, wanted)
        assert mean < 1
    plain = EvalTransform(24, 28)
    mean, _ = difference(list(DaliEvalLoader(source, plain, 8, device=device)), list(EvalLoader(source, plain, 8)))
    assert mean < 1
