"""Stores: the same images in the same order from folders, tars, tars in tars, shards and zips; what cannot be told is refused."""

import os
import pickle
import tarfile
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

import config
from data.archive import list_archive
from data.build import build_data, build_eval_data
from data.store import OPEN_FILES, open_store
from tests.archives import (
    as_class_tars,
    as_official,
    as_one_tar,
    as_shards,
    as_tar,
    as_zip,
    files_of,
    write_tar,
)
from tests.data_doubles import write_folder

# Names whose order tells a careless sort: by stem, by natural number, by case, by bytes.
WNIDS = ("n01440764", "n01443537", "n02119789")
SMALL = "DATA.IMG_SIZE 24 DATA.EVAL_RESIZE 28 TRAIN.GLOBAL_BATCH 8 TRAIN.MICRO_BATCH 4 EVAL.BATCH 5"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Keep the tests out of the user's cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three ImageNet classes with names as there: <wnid>_<number> in train, numbered files in val."""
    root = write_folder(tmp_path_factory.mktemp("folder"), train=dict.fromkeys(WNIDS, 16), val=dict.fromkeys(WNIDS, 3))
    for path in sorted(root.glob("train/*/*.jpg")):
        number = int(path.stem)
        path.rename(path.with_name(f"{path.parent.name}_{number * number * 7 + 2}.jpg"))
    pictures = sorted(root.glob("val/*/*.jpg"))
    for number, i in enumerate(np.random.RandomState(0).permutation(len(pictures)), 1):
        pictures[i].rename(pictures[i].with_name(f"ILSVRC2012_val_{number:08d}.jpg"))
    return root


def val_classes(folder):
    return {name: cls for cls, name, _ in sorted(files_of(folder, "val"), key=lambda file: file[1])}


def official(folder, root):
    as_official(folder, root)
    lines = [f"{name} {cls}" for name, cls in val_classes(folder).items()]
    (root / "val_map.txt").write_text("\n".join(lines))
    return root


def swin(folder, root):
    """Swin's zipped ImageNet: val flat, with numbers."""
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
    "shards in folders": lambda folder, root: as_shards(folder, root, place="{split}"),
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
def test_store_gives_the_folders_batches(kind, folder, from_folder, tmp_path):
    data = build_data(cfg_of(STORES[kind](folder, tmp_path / "store")), 0, 1, "cpu", quiet)
    assert data.classes == list(WNIDS)
    assert data.fingerprint == from_folder.fingerprint  # so that a run can be continued on another store
    assert data.notes == []
    assert len(list(from_folder.train.epoch(3))) == 12
    assert_same_batches(data.train.epoch(3), from_folder.train.epoch(3))
    assert_same_batches(data.val, from_folder.val)


@pytest.mark.parametrize("kind", ["tar", "shards with numbers", "tars in tars", "zip"])
def test_store_reads_in_loader_processes(kind, folder, from_folder, tmp_path):
    root = STORES[kind](folder, tmp_path / "store")
    data = build_data(cfg_of(root, "DATA.WORKERS", "2"), 0, 1, "cpu", quiet)
    assert_same_batches(data.train.epoch(0), from_folder.train.epoch(0))
    assert_same_batches(data.val, from_folder.val)


def test_name_tells_archive_and_path(folder, tmp_path):
    source = open_store(official(folder, tmp_path), "train", say=quiet).source(WNIDS, True)
    assert source.name(0).startswith(f"{tmp_path}/ILSVRC2012_img_train.tar:n01440764.tar/n01440764_")
    source = open_store(tmp_path, "val", say=quiet).source(WNIDS, True)
    assert source.name(0).startswith(f"{tmp_path}/ILSVRC2012_img_val.tar:ILSVRC2012_val_0000000")


def test_source_survives_pickling_and_is_read_by_many_threads(folder, tmp_path):
    source = open_store(as_tar(folder, tmp_path), "train", say=quiet).source(WNIDS, True)
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


def test_many_shards_keep_few_files_open(tmp_path):
    before = open_files()
    for i in range(OPEN_FILES + 20):
        write_tar(tmp_path / f"train/s-{i:05d}.tar", [(f"{i}.jpg", b"x%d" % i), (f"{i}.cls", b"0")])
    source = open_store(tmp_path, "train", say=quiet).source(["a"], True)
    assert sorted(source.read(i).tobytes() for i in range(len(source))) == sorted(
        b"x%d" % i for i in range(OPEN_FILES + 20)
    )
    assert open_files() == before + OPEN_FILES
    del source
    assert open_files() == before


def test_archive_cut_off_while_training_is_an_unreadable_image(folder, tmp_path):
    root = as_tar(folder, tmp_path)
    source = open_store(root, "train", say=quiet).source(WNIDS, True)
    os.truncate(root / "train.tar", 5000)
    last = int(source.storage_order()[-1])
    with pytest.raises(OSError, match="the archive ends within it, at byte"):
        source.read(last)


def test_block_shuffle_follows_the_archives_and_reads_ahead(folder, tmp_path, monkeypatch):
    data = build_data(cfg_of(as_shards(folder, tmp_path), "DATA.BLOCK_SHUFFLE", "6"), 0, 1, "cpu", quiet)
    source = data.train._loader.dataset.source
    names = [source.name(i) for i in source.storage_order()]
    assert names == sorted(names, key=lambda name: name.split(":")[0])  # 16 images a shard
    assert np.array_equal(data.stream.storage, source.storage_order())
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
    assert plain.fingerprint != data.fingerprint  # another order: not to be continued on the other store
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


# The index


def heard(root, split="train", **options):
    said = []
    store = open_store(root, split, say=said.append, **options)
    return store, said


def test_index_is_built_once_and_said(folder, tmp_path):
    root = as_tar(folder, tmp_path)
    store, said = heard(root)
    assert said == [
        f"indexing train of {root} (1 archives)",
        f"indexed 48 images; the index is kept in {root}/retoken-index-train.npz",
    ]
    assert store.file == root / "retoken-index-train.npz"
    assert sorted(p.name for p in root.iterdir()) == ["retoken-index-train.npz", "train.tar", "val.tar"]
    assert heard(root)[1] == []


def test_index_of_a_single_archive_lies_beside_it(folder, tmp_path):
    archive = as_one_tar(folder, tmp_path)
    heard(archive)
    heard(archive, "val")
    names = ["pictures.tar", "pictures.tar.retoken-index-train.npz", "pictures.tar.retoken-index-val.npz"]
    assert sorted(p.name for p in tmp_path.iterdir()) == names


@pytest.mark.parametrize("change", ["time", "size", "another shard", "garbage", "cut off"])
def test_index_that_does_not_fit_is_built_again_and_said(folder, tmp_path, change):
    root = as_shards(folder, tmp_path)
    index = heard(root)[0].file
    shard = root / "imagenet-train-000001.tar"
    if change == "time":
        os.utime(shard, (1, 1))
    elif change == "size":
        times = shard.stat()
        with shard.open("ab") as file:
            file.write(bytes(10240))
        os.utime(shard, ns=(times.st_atime_ns, times.st_mtime_ns))
    elif change == "another shard":
        write_tar(root / "imagenet-train-000003.tar", [("n01440764_9.jpg", b"x"), ("n01440764_9.cls", b"0")])
    else:
        index.write_bytes(b"PK\x03\x04 what" if change == "garbage" else index.read_bytes()[:700])
    store, said = heard(root)
    again = " again: its files have changed" if change not in ("garbage", "cut off") else ""
    assert said[0] == f"indexing train of {root} ({4 if change == 'another shard' else 3} archives){again}"
    assert len(store.index) == 49 if change == "another shard" else 48
    assert heard(root)[1] == []


def test_read_only_folder_keeps_its_index_in_the_cache(folder, tmp_path, monkeypatch):
    root = as_tar(folder, tmp_path / "store")
    real = Path.touch

    def touch(path, *args, **kwargs):
        if path.parent == root:
            raise OSError(30, "Read-only file system")
        real(path, *args, **kwargs)

    monkeypatch.setattr(Path, "touch", touch)  # the owner of everything cannot be stopped by permissions
    store, said = heard(root)
    assert store.file.parent == tmp_path / "cache" / "retoken"
    assert said[-1].endswith(f"the index is kept in {store.file} because {root} cannot be written")
    assert heard(root)[1] == []
    assert sorted(p.name for p in root.iterdir()) == ["train.tar", "val.tar"]
    monkeypatch.setattr(
        Path, "touch", lambda *args, **kwargs: (_ for _ in ()).throw(OSError(30, "Read-only file system"))
    )
    os.utime(root / "train.tar", (1, 1))
    with pytest.raises(ValueError, match=r"neither .*/store nor .*/cache/retoken can be written.*set XDG_CACHE_HOME"):
        heard(root)


def test_processes_that_start_together_build_one_index(folder, tmp_path):
    root = as_tar(folder, tmp_path)
    said, stores = [], []
    threads = [
        threading.Thread(target=lambda: stores.append(open_store(root, "train", say=said.append))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(stores) == 4
    assert sum(line.startswith("indexed") for line in said) == 1


@pytest.mark.slow
def test_processes_of_a_run_build_one_index_and_train(small_cfg, pictures, tmp_path, run_script):
    root = as_tar(pictures, tmp_path / "store")
    argv = ("--cfg", str(small_cfg), "--data-path", str(root), "--output", str(tmp_path), "--opts", "TRAIN.EPOCHS", "1")
    done = run_script("train.py", *argv, processes=2)
    assert (done.stdout + done.stderr).count(f"indexing train of {root}") == 1
    assert (done.stdout + done.stderr).count(f"indexing val of {root}") == 1
    assert "data       48 training and 15 validation images, 3 classes" in done.stdout


def test_lock_of_a_process_that_died_is_taken_over(folder, tmp_path):
    root = as_tar(folder, tmp_path)
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    lock = root / "retoken-index-train.npz.lock"
    lock.write_text(f"{os.uname().nodename} {pid}")
    said = heard(root)[1]
    assert said[0] == f"taking over from {os.uname().nodename} {pid}, which left {lock}"
    assert not lock.exists()


def test_lock_of_another_machine_is_waited_for_until_nobody_touches_it(folder, tmp_path, monkeypatch):
    root = as_tar(folder, tmp_path)
    monkeypatch.setattr("data.build_once.POLL_S", 0.0)
    monkeypatch.setattr("data.build_once.STALE_S", 0.05)
    (root / "retoken-index-train.npz.lock").write_text("elsewhere 1")
    said = heard(root)[1]
    assert said[0] == f"waiting for process elsewhere 1 to write {root}/retoken-index-train.npz"
    assert said[1].startswith("taking over from elsewhere 1")


def test_index_left_half_built_by_an_error_leaves_no_lock(tmp_path):
    write_tar(tmp_path / "train.tar", [("readme.txt", b"x")])
    with pytest.raises(ValueError, match="holds no images of train"):
        heard(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["train.tar"]


def test_duplicates_and_a_missing_end_mark_are_noted(tmp_path):
    path = write_tar(tmp_path / "train.tar", [("a/1.jpg", b"1"), ("a/2.jpg", b"2"), ("a/1.jpg", b"3")])
    os.truncate(path, 3 * 1024)
    store, _ = heard(tmp_path)
    assert len(store.index) == 3
    assert store.notes == [
        f"{path} has no end mark after 3 files; is it whole?",
        f"{path} holds 1 images twice, a/1.jpg the first",
    ]


# What is refused


def message(root, split="train", **options):
    with pytest.raises(ValueError, match=r".") as caught:
        open_store(root, split, say=quiet, **options)
    return str(caught.value)


def assert_says(text, *parts):
    for part in parts:
        assert part in text, text


def test_nothing_found_says_what_is_there_and_what_is_expected(tmp_path):
    (tmp_path / "notes.txt").touch()
    (tmp_path / "images").mkdir()
    text = message(tmp_path)
    assert_says(
        text,
        f"DATA.PATH='{tmp_path}' has no folder train/, it holds images/, notes.txt",
        "expected one of",
        "train.tar",
    )
    assert_says(message(tmp_path / "notes.txt"), "is a file but no .tar or .zip", "expected a folder or an archive")
    assert_says(message(""), "DATA.PATH is not set")


@pytest.mark.parametrize("name", ["train.tar.gz", "train.tgz", "ILSVRC2012_img_train.tar.xz"])
def test_compressed_tar_is_refused_with_the_remedy(tmp_path, name):
    (tmp_path / name).touch()
    assert_says(message(tmp_path), name, "unpack the compression")
    assert_says(message(tmp_path / name), "is a file", "unpack the compression")


def test_compressed_tar_under_another_name_is_refused(tmp_path):
    with tarfile.open(tmp_path / "train.tar", "w:gz"):
        pass
    assert_says(message(tmp_path), "train.tar is compressed", "gunzip")


def test_deflated_zip_is_refused_with_the_remedy(folder, tmp_path):
    root = as_zip(folder, tmp_path, method=zipfile.ZIP_DEFLATED)
    assert_says(message(root), "train.zip holds 48 compressed files of 48", "zip -0 -r")


@pytest.mark.parametrize(
    "what", ["cut in a file", "cut in a header", "damaged header", "garbage", "empty", "garbage zip"]
)
def test_damaged_archive_is_named(folder, tmp_path, what):
    root = as_tar(folder, tmp_path)
    path = root / "train.tar"
    members = list_archive(path).members
    at = members[30].offset
    if what == "cut in a file":
        os.truncate(path, at + 700)
    elif what == "cut in a header":
        os.truncate(path, at - 100)
    elif what == "damaged header":
        with path.open("r+b") as file:
            file.seek(at - 512)
            file.write(b"\xff" * 512)
    elif what == "garbage zip":
        path.unlink()
        path = root / "train.zip"
        path.write_bytes(b"PK\x05\x06 not really")
    else:
        path.write_bytes(np.random.RandomState(0).bytes(4096) if what == "garbage" else b"")
    assert_says(message(root), str(path), "checksums" if what != "empty" else "train")


def test_links_are_refused(tmp_path):
    with tarfile.open(tmp_path / "train.tar", "w") as tar:
        for name, kind in (("a/README", tarfile.SYMTYPE), ("a/1.jpg", tarfile.LNKTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "a/0.jpg"
            tar.addfile(info)
    assert_says(message(tmp_path), "a/1.jpg, which is a link", "--hard-dereference")


def test_split_held_twice_is_refused(folder, tmp_path):
    as_zip(folder, as_tar(folder, tmp_path))
    assert_says(message(tmp_path), "holds train more than once: train.tar, train.zip", "move all but one away")


def test_archive_beside_its_unpacked_folder_is_noted(folder, tmp_path):
    root = write_folder(as_tar(folder, tmp_path), train={"cat": 8}, val={"cat": 2})
    data = build_data(cfg_of(root), 0, 1, "cpu", quiet)
    assert data.notes == [f"{root}/{split} is read; {split}.tar beside it is not" for split in ("train", "val")]


def test_folder_with_archives_and_classes_is_refused(folder, tmp_path):
    root = as_class_tars(folder, tmp_path)
    (root / "train" / "cat").mkdir()
    assert_says(message(root), "holds archives (n01440764.tar, ...) and folders (cat/, ...)")


@pytest.mark.parametrize(
    ("files", "parts"),
    [
        ([("a/1.jpg", b""), ("2.jpg", b"")], ["in folders (a/1.jpg) and beside them (2.jpg)"]),
        ([("1.jpg", b""), ("1.cls", b"3"), ("2.jpg", b"")], ["labels for 1 of 2 images; 2.jpg has none"]),
        ([("1.jpg", b""), ("1.cls", b"")], ["1.cls tells no class"]),
        ([("1.jpg", b""), ("1.cls", b"0"), ("1.jpg", b""), ("1.cls", b"1")], ["1.cls twice", "keys of their own"]),
        ([("1.jpg", b""), ("1.json", b"{")], ["1.json is no JSON"]),
        ([("1.jpg", b""), ("1.json", b'{"caption": "cat"}')], ["1.json tells no class", "label, cls"]),
        ([("1.jpg", b""), ("1.cls", b"cat"), ("2.jpg", b""), ("2.cls", b"7")], ["by number for some"]),
        ([("1.jpg", b""), ("2.jpg", b"")], ["holds images without classes"]),
        ([("a.tar", b""), ("2.jpg", b"")], ["tars and images side by side"]),
        ([("notes.txt", b"")], ["holds no images of train: their names end in .jpg"]),
    ],
)
def test_layout_that_tells_no_classes_is_refused(tmp_path, files, parts):
    write_tar(tmp_path / "train.tar", files)
    assert_says(message(tmp_path), str(tmp_path / "train.tar"), *parts)


def test_mixed_layouts_are_refused(tmp_path):
    write_tar(tmp_path / "train/x.tar", [("a/1.jpg", b"")])
    write_tar(tmp_path / "train/y.tar", [("1.jpg", b""), ("1.cls", b"2")])
    assert_says(message(tmp_path), "different layouts (x.tar: folders, y.tar: shards)")


def test_shards_without_labels_are_refused(tmp_path):
    for i in range(2):
        write_tar(tmp_path / f"train-{i:06d}.tar", [(f"{i}.jpg", b"")])
    assert_says(message(tmp_path), "images without labels", "named like a shard")


def test_label_number_out_of_range_is_refused(folder, tmp_path):
    root = as_shards(folder, tmp_path)
    (tmp_path / "classes.txt").write_text("a\nb\n")
    with pytest.raises(ValueError, match=r"images of class number 2, but there are 2 classes.*DATA\.CLASS_INDEX"):
        build_data(cfg_of(root, "DATA.CLASS_INDEX", str(tmp_path / "classes.txt")), 0, 1, "cpu", quiet)
    (tmp_path / "classes.txt").write_text("\n".join(reversed(WNIDS)))
    with pytest.raises(
        ValueError, match=r"another order: number 0 is n01440764 there and n02119789 in DATA\.CLASS_INDEX"
    ):
        build_data(cfg_of(root, "DATA.CLASS_INDEX", str(tmp_path / "classes.txt")), 0, 1, "cpu", quiet)


def test_unknown_and_missing_classes_are_named(tmp_path):
    write_tar(tmp_path / "train.tar", [("cat/1.jpg", b""), ("owl/1.jpg", b"")])
    store, _ = heard(tmp_path)
    with pytest.raises(
        ValueError, match=r"train\.tar has 1 classes that are not among the 1 classes: owl; remove them"
    ):
        store.source(["cat"], False)
    with pytest.raises(ValueError, match=r"train\.tar has no classe? for 1 of the 3 classes: dog; add their images"):
        store.source(["cat", "dog", "owl"], True)
    assert store.source(["owl", "dog", "cat"], False).labels.tolist() == [0, 2]


def test_class_index_orders_an_archives_labels(folder, tmp_path):
    (tmp_path / "classes.txt").write_text("\n".join(reversed(WNIDS)))
    opts = ("DATA.CLASS_INDEX", str(tmp_path / "classes.txt"))
    wanted = build_data(cfg_of(folder, *opts), 0, 1, "cpu")
    data = build_data(cfg_of(as_tar(folder, tmp_path / "store"), *opts), 0, 1, "cpu", quiet)
    assert data.fingerprint == wanted.fingerprint
    assert_same_batches(data.train.epoch(0), wanted.train.epoch(0))


def test_evaluation_takes_classes_of_the_train_archives_where_they_are(tmp_path):
    write_tar(tmp_path / "train.tar", [("ant/1.jpg", b""), ("cat/1.jpg", b""), ("dog/1.jpg", b"")])
    write_tar(tmp_path / "val.tar", [("dog/1.jpg", b"")])
    assert build_eval_data(cfg_of(tmp_path), 0, 1, "cpu", quiet).classes == ["ant", "cat", "dog"]
    (tmp_path / "train.tar").unlink()
    assert build_eval_data(cfg_of(tmp_path), 0, 1, "cpu", quiet).classes == ["dog"]


def test_single_archive_without_train_is_evaluated_on(tmp_path):
    archive = write_tar(tmp_path / "x.tar", [("val/dog/1.jpg", b""), ("val/cat/1.jpg", b"")])
    data = build_eval_data(cfg_of(archive), 0, 1, "cpu", quiet)
    assert data.classes == ["cat", "dog"]
    with pytest.raises(ValueError, match=r"holds no images of train.*begin with train/"):
        build_data(cfg_of(archive), 0, 1, "cpu", quiet)
