"""Splits of every store: the same images in the same order from folders, tars, tars in tars, shards and zips."""

import os
import pickle
import resource
import tarfile
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

import config
from data.build import build_data
from data.stores.archive_reader import open_limit
from data.stores.split import open_split
from tests.helpers.archives import (
    WNIDS,
    as_class_tars,
    as_official,
    as_one_tar,
    as_shards,
    as_tar,
    as_zip,
    files_of,
    imagenet_like,
    write_tar,
)

pytestmark = pytest.mark.usefixtures("own_cache")

SMALL = "DATA.IMG_SIZE 24 DATA.EVAL_RESIZE 28 TRAIN.GLOBAL_BATCH 8 TRAIN.MICRO_BATCH 4 EVAL.BATCH 5"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return imagenet_like(tmp_path_factory.mktemp("folder"))


def val_classes(folder):
    return {name: cls for cls, name, _ in sorted(files_of(folder, "val"), key=lambda file: file[1])}


def official(folder, root):
    as_official(folder, root)
    lines = [f"{name} {cls}" for name, cls in val_classes(folder).items()]
    (root / "val_map.txt").write_text("\n".join(lines))
    return root


def swin(folder, root):
    """Write Swin's zipped ImageNet: val flat, with class numbers."""
    as_zip(folder, root)
    with zipfile.ZipFile(root / "val.zip", "w") as archive:
        for _, name, data in files_of(folder, "val"):
            archive.writestr(name, data)
    lines = [f"{name}\t{WNIDS.index(cls)}" for name, cls in val_classes(folder).items()]
    (root / "val_map.txt").write_text("\n".join(lines))
    return root


STORES = {
    "tar": as_tar,
    "tar with pax headers": lambda folder, root: as_tar(folder, root, tarfile.PAX_FORMAT),
    "one tar with both splits": as_one_tar,
    "shards with numbers": as_shards,
    "shards with names": lambda folder, root: as_shards(folder, root, names=True),
    "shards with json": lambda folder, root: as_shards(folder, root, label="json"),
    "shards in folders": lambda folder, root: as_shards(folder, root, subfolder="{split}"),
    "tars in tars": official,
    "tars in folders": as_class_tars,
    "zip": as_zip,
    "zip with a folder in it": lambda folder, root: as_zip(folder, root, inner="imagenet/train/"),
    "zip and map": swin,
}


def cfg_of(root, *opts):
    return config.load(opts=[*SMALL.split(), "DATA.WORKERS", "0", "DATA.PATH", str(root), *opts])


def quiet(text):
    pass


@pytest.fixture(scope="module")
def from_folder(folder):
    return build_data(cfg_of(folder), 0, 1, "cpu")


def assert_same_batches(found, wanted):
    for own, other in zip(found, wanted, strict=True):
        for name in ("indices", "labels", "images", "erase"):
            a, b = getattr(own, name), getattr(other, name)
            assert (a is None and b is None) or torch.equal(a, b), name


@pytest.mark.parametrize("kind", STORES)
def test_batches_of_a_store_equal_those_of_the_folder(kind, folder, from_folder, tmp_path):
    data = build_data(cfg_of(STORES[kind](folder, tmp_path / "store")), 0, 1, "cpu", quiet)
    assert data.classes == list(WNIDS)
    assert data.fingerprint == from_folder.fingerprint  # so that a run can be continued on another store
    assert [note for note in data.notes if "passed over" not in note] == []
    assert len(list(from_folder.train.epoch(3))) == 12
    assert_same_batches(data.train.epoch(3), from_folder.train.epoch(3))
    assert_same_batches(data.val, from_folder.val)


@pytest.mark.parametrize("kind", ["tar", "shards with numbers", "tars in tars", "zip"])
def test_store_is_read_in_loader_processes(kind, folder, from_folder, tmp_path):
    root = STORES[kind](folder, tmp_path / "store")
    data = build_data(cfg_of(root, "DATA.WORKERS", "2"), 0, 1, "cpu", quiet)
    assert_same_batches(data.train.epoch(0), from_folder.train.epoch(0))
    assert_same_batches(data.val, from_folder.val)


def test_name_is_archive_and_path(folder, tmp_path):
    source = open_split(official(folder, tmp_path), "train", progress=quiet).source(WNIDS, True)
    assert source.name(0).startswith(f"{tmp_path}/ILSVRC2012_img_train.tar:n01440764.tar/n01440764_")
    source = open_split(tmp_path, "val", progress=quiet).source(WNIDS, True)
    assert source.name(0).startswith(f"{tmp_path}/ILSVRC2012_img_val.tar:ILSVRC2012_val_0000000")


def test_source_survives_pickling_and_is_read_by_many_threads(folder, tmp_path):
    source = open_split(as_tar(folder, tmp_path), "train", progress=quiet).source(WNIDS, True)
    wanted = [source.read(i).tobytes() for i in range(len(source))]
    copy = pickle.loads(pickle.dumps(source))
    assert [copy.read(i).tobytes() for i in range(len(copy))] == wanted
    wrong = []

    def read(seed):
        for i in np.random.RandomState(seed).randint(len(source), size=300):
            if source.read(i).tobytes() != wanted[i]:
                wrong.append(i)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert source.read(0).flags.writeable


def open_files():
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.mark.parametrize(("limit", "kept"), [(1000, 84), (128, 64)])
def test_shards_stay_open_up_to_half_the_limit_of_open_files(tmp_path, monkeypatch, limit, kept):
    monkeypatch.setattr("data.stores.archive_reader.open_limit", lambda: limit)
    before = open_files()
    for i in range(84):
        write_tar(tmp_path / f"train/s-{i:05d}.tar", [(f"{i}.jpg", b"x%d" % i), (f"{i}.cls", b"0")])
    source = open_split(tmp_path, "train", progress=quiet).source(["a"], True)
    assert sorted(source.read(i).tobytes() for i in range(len(source))) == sorted(b"x%d" % i for i in range(84))
    assert open_files() == before + kept
    del source
    assert open_files() == before


@pytest.mark.parametrize(
    ("limits", "wanted", "asked"),
    [
        ((1024, 4096), 4096, [(4096, 4096)]),
        ((1024, 1 << 20), 1 << 16, [(1 << 16, 1 << 20)]),
        ((1024, resource.RLIM_INFINITY), 1 << 16, [(1 << 16, resource.RLIM_INFINITY)]),
        ((1 << 20, 1 << 20), 1 << 20, []),
        ((512, 512), 512, []),
    ],
)
def test_limit_of_open_files_is_raised_once(monkeypatch, limits, wanted, asked):
    seen = []
    monkeypatch.setattr("resource.getrlimit", lambda _: limits)
    monkeypatch.setattr("resource.setrlimit", lambda _, value: seen.append(value))
    open_limit.cache_clear()
    try:
        assert [open_limit(), open_limit()] == [wanted, wanted]
    finally:
        open_limit.cache_clear()
    assert seen == asked


def test_archive_cut_off_while_training_is_an_unreadable_image(folder, tmp_path):
    root = as_tar(folder, tmp_path)
    source = open_split(root, "train", progress=quiet).source(WNIDS, True)
    os.truncate(root / "train.tar", 5000)
    last = int(source.storage_order()[-1])
    with pytest.raises(OSError, match=r"the file ends at byte .*, within it"):
        source.read(last)


def test_block_shuffle_follows_the_archives_and_reads_ahead(folder, tmp_path, monkeypatch):
    data = build_data(cfg_of(as_shards(folder, tmp_path), "DATA.BLOCK_SHUFFLE", "6"), 0, 1, "cpu", quiet)
    source = data.train._loader.dataset.source
    names = [source.name(i) for i in source.storage_order()]
    assert names == sorted(names, key=lambda name: name.split(":")[0])  # 16 images a shard
    assert np.array_equal(data.sampler.storage, source.storage_order())
    advised = []
    monkeypatch.setattr("os.posix_fadvise", lambda fd, start, length, how: advised.append((fd, start, length)))
    batches = list(data.train.epoch(0))
    assert sorted(torch.cat([batch.indices for batch in batches]).tolist()) == list(range(48))
    wanted = {}
    for position, i in enumerate(source.storage_order().tolist()):
        start = int(source._offset[i])
        wanted.setdefault(position // 6, []).append((int(source._archive[i]), start, start + int(source._size[i])))
    whole = [block for block in wanted.values() if len({archive for archive, *_ in block}) == 1]
    assert len(whole) == 6  # of 8 blocks, two lie in two shards
    assert sorted((a, b) for _, a, b in advised) == sorted((block[0][1], block[-1][2] - block[0][1]) for block in whole)
    plain = build_data(cfg_of(folder, "DATA.BLOCK_SHUFFLE", "6"), 0, 1, "cpu")
    assert plain.fingerprint != data.fingerprint  # another order: a run cannot be continued on the other store
    class_by_class = build_data(
        cfg_of(as_zip_sorted(folder, tmp_path / "z"), "DATA.BLOCK_SHUFFLE", "6"), 0, 1, "cpu", quiet
    )
    assert class_by_class.fingerprint == plain.fingerprint
    assert_same_batches(class_by_class.train.epoch(0), plain.train.epoch(0))


def as_zip_sorted(folder, root):
    root.mkdir()
    for split in ("train", "val"):
        with zipfile.ZipFile(root / f"{split}.zip", "w") as archive:
            for path in sorted((folder / split).glob("*/*")):
                archive.write(path, f"{path.parent.name}/{path.name}")
    return root
