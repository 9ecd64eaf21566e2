"""Ambiguous, unreadable and unlabelled stores are refused with their contents and the remedy."""

import os
import tarfile
import zipfile

import numpy as np
import pytest
import torch

import config
from data.build import build_data, build_eval_data
from data.stores.archive_members import list_archive
from data.stores.split import open_split
from tests.helpers.archives import (
    WNIDS,
    as_class_tars,
    as_shards,
    as_tar,
    as_zip,
    imagenet_like,
    open_logged,
    write_tar,
)
from tests.helpers.data_doubles import write_folder

pytestmark = pytest.mark.usefixtures("own_cache")

SMALL = "DATA.IMG_SIZE 24 DATA.EVAL_RESIZE 28 TRAIN.GLOBAL_BATCH 8 TRAIN.MICRO_BATCH 4 EVAL.BATCH 5"


def cfg_of(root, *opts):
    return config.load(opts=[*SMALL.split(), "DATA.WORKERS", "0", "DATA.PATH", str(root), *opts])


def quiet(text):
    pass


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return imagenet_like(tmp_path_factory.mktemp("folder"))


def assert_same_batches(found, wanted):
    for own, other in zip(found, wanted, strict=True):
        for name in ("indices", "labels", "images", "erase"):
            a, b = getattr(own, name), getattr(other, name)
            assert (a is None and b is None) or torch.equal(a, b), name


def message(root, split="train", **options):
    with pytest.raises(ValueError, match=r".") as caught:
        open_split(root, split, progress=quiet, **options)
    return str(caught.value)


def assert_contains(text, *parts):
    for part in parts:
        assert part in text, text


def test_missing_split_is_refused_with_contents_and_expectation(tmp_path):
    (tmp_path / "notes.txt").touch()
    (tmp_path / "images").mkdir()
    text = message(tmp_path)
    assert_contains(
        text,
        f"DATA.PATH='{tmp_path}' has no folder train/, it holds images/, notes.txt",
        "expected one of",
        "train.tar",
    )
    assert_contains(message(tmp_path / "notes.txt"), "is a file but no .tar or .zip", "expected a folder or an archive")
    assert_contains(message(""), "DATA.PATH is not set")


@pytest.mark.parametrize("name", ["train.tar.gz", "train.tgz", "ILSVRC2012_img_train.tar.xz"])
def test_compressed_tar_is_refused_with_the_remedy(tmp_path, name):
    (tmp_path / name).touch()
    assert_contains(message(tmp_path), name, "unpack the compression")
    assert_contains(message(tmp_path / name), "is a file", "unpack the compression")


def test_compressed_tar_under_another_name_is_refused(tmp_path):
    with tarfile.open(tmp_path / "train.tar", "w:gz"):
        pass
    assert_contains(message(tmp_path), "train.tar is compressed", "gunzip")


def test_deflated_zip_is_refused_with_the_remedy(folder, tmp_path):
    root = as_zip(folder, tmp_path, method=zipfile.ZIP_DEFLATED)
    assert_contains(message(root), "train.zip holds 48 compressed files of 48", "zip -0 -r")


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
    assert_contains(message(root), str(path), "checksums" if what != "empty" else "train")


def test_links_are_refused(tmp_path):
    with tarfile.open(tmp_path / "train.tar", "w") as tar:
        for name, kind in (("a/README", tarfile.SYMTYPE), ("a/1.jpg", tarfile.LNKTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "a/0.jpg"
            tar.addfile(info)
    assert_contains(message(tmp_path), "a/1.jpg, which is a link", "--hard-dereference")


def test_split_held_twice_is_refused(folder, tmp_path):
    as_zip(folder, as_tar(folder, tmp_path))
    assert_contains(message(tmp_path), "holds train more than once: train.tar, train.zip", "move all but one away")


def test_archive_beside_its_unpacked_folder_is_noted(folder, tmp_path):
    root = write_folder(as_tar(folder, tmp_path), train={"cat": 8, "dog": 1}, val={"cat": 2, "dog": 1})
    data = build_data(cfg_of(root), 0, 1, "cpu", quiet)
    assert data.notes == [f"{root}/{split} is read; {split}.tar beside it is not" for split in ("train", "val")]


def test_folder_with_archives_and_classes_is_refused(folder, tmp_path):
    root = as_class_tars(folder, tmp_path)
    (root / "train" / "cat").mkdir()
    assert_contains(message(root), "holds archives (n01440764.tar, ...) and folders (cat/, ...)")


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
def test_layout_without_classes_is_refused(tmp_path, files, parts):
    write_tar(tmp_path / "train.tar", files)
    assert_contains(message(tmp_path), str(tmp_path / "train.tar"), *parts)


def test_mixed_layouts_are_refused(tmp_path):
    write_tar(tmp_path / "train/x.tar", [("a/1.jpg", b"")])
    write_tar(tmp_path / "train/y.tar", [("1.jpg", b""), ("1.cls", b"2")])
    assert_contains(message(tmp_path), "different layouts (x.tar: folders, y.tar: shards)")


def test_shards_without_labels_are_refused(tmp_path):
    for i in range(2):
        write_tar(tmp_path / f"train-{i:06d}.tar", [(f"{i}.jpg", b"")])
    assert_contains(message(tmp_path), "images without labels", "named like a shard")


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
    store, _ = open_logged(tmp_path)
    with pytest.raises(
        ValueError, match=r"train\.tar has 1 classes that are not among the 1 classes: owl; add their images to train/"
    ):
        store.source(["cat"], False)
    with pytest.raises(ValueError, match=r"train\.tar has no image for 1 of the 3 classes: dog; add their images"):
        store.source(["cat", "dog", "owl"], True)
    assert store.source(["owl", "dog", "cat"], False).labels.tolist() == [0, 2]


def test_class_index_orders_an_archives_labels(folder, tmp_path):
    (tmp_path / "classes.txt").write_text("\n".join(reversed(WNIDS)))
    opts = ("DATA.CLASS_INDEX", str(tmp_path / "classes.txt"))
    wanted = build_data(cfg_of(folder, *opts), 0, 1, "cpu")
    data = build_data(cfg_of(as_tar(folder, tmp_path / "store"), *opts), 0, 1, "cpu", quiet)
    assert data.fingerprint == wanted.fingerprint
    assert_same_batches(data.train.epoch(0), wanted.train.epoch(0))


def test_evaluation_uses_the_classes_of_train_archives(tmp_path):
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


def test_joined_tars_are_refused_with_the_remedy(folder, tmp_path):
    one, other = (as_tar(folder, tmp_path / name) / "train.tar" for name in ("a", "b"))
    size = one.stat().st_size
    with one.open("ab") as file:
        file.write(bytes(20480) + other.read_bytes())
    assert_contains(message(one.parent), f"train.tar goes on after its end mark, at byte {size + 20480}", "tar -A")


def test_zeros_after_the_end_mark_are_accepted(folder, tmp_path):
    root = as_tar(folder, tmp_path)
    with (root / "train.tar").open("ab") as file:
        file.write(bytes(3 << 20))
    assert open_logged(root)[0].index.metadata["problems"] == []


def test_ambiguous_training_split_is_refused_in_evaluation(folder, tmp_path):
    as_zip(folder, as_tar(folder, tmp_path))
    (tmp_path / "val.zip").unlink()
    with pytest.raises(ValueError, match=r"holds train more than once: train\.tar, train\.zip; move all but one away"):
        build_eval_data(cfg_of(tmp_path), 0, 1, "cpu", quiet)
