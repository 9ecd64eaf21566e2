"""Image folders: torchvision's order, class-index files, errors with the remedy."""

import json
from pathlib import Path

import numpy as np
import pytest
from torchvision.datasets import ImageFolder

from data.stores.folder import class_folders, read_class_index, scan, split_folder
from tests.helpers.data_doubles import write_folder


def touch(root, *paths):
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(path.encode())
    return root


def test_scan_equals_torchvision(tmp_path):
    write_folder(tmp_path, train={"cat": 3, "ant": 2})
    touch(
        tmp_path / "train",
        "cat/b/x.JPEG",
        "cat/a-b/x.png",
        "cat/a/y.jpg",
        "cat/a/z/y.jpg",
        "cat/notes.txt",
        "ant/É.jpg",
    )
    folder = tmp_path / "train"
    source = scan(folder, class_folders(folder), must_hold_all=True)
    wanted = ImageFolder(str(folder)).samples
    assert len(wanted) == 10
    assert [(source.name(i), label) for i, label in enumerate(source.labels.tolist())] == wanted
    assert source.labels.dtype == np.int64


def test_source_reads_the_bytes_of_each_file(tmp_path):
    touch(tmp_path, "b/2.jpg", "a/1.jpg", "b/1.jpg")
    source = scan(tmp_path, ["b", "a"], must_hold_all=True)
    assert source.labels.tolist() == [0, 0, 1]
    assert [source.read(i).tobytes() for i in range(len(source))] == [b"b/1.jpg", b"b/2.jpg", b"a/1.jpg"]


def test_hidden_files_and_folders_are_skipped(tmp_path):
    touch(tmp_path, "a/1.jpg", "a/._1.jpg", ".cache/1.jpg", "a/.thumbs/1.jpg")
    source = scan(tmp_path, class_folders(tmp_path), must_hold_all=True)
    assert [source.name(i) for i in range(len(source))] == [str(tmp_path / "a" / "1.jpg")]


@pytest.mark.parametrize(
    "text",
    [
        json.dumps({"1": ["n02", "ray"], "0": ["n03", "tench"], "2": ["n01", "owl"]}),
        json.dumps(["n03", "n02", "n01"]),
        json.dumps({"n01": 2, "n03": 0, "n02": 1}),
        json.dumps({"0": "n03", "1": "n02", "2": "n01"}),
        "n03\nn02\r\nn01\n\n",
    ],
)
def test_class_index_file_fixes_the_order(tmp_path, text):
    file = tmp_path / "classes"
    file.write_text(text)
    assert read_class_index(file) == ["n03", "n02", "n01"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"0": ["a", "b"], "2": ["c", "d"]}', r"its indices are not 0 \.\. 1"),
        ('{"a": 0, "b": 0}', r"its indices are not 0 \.\. 1"),
        ('{"0": ', "is not understood .*text with a name a line"),
        ('[["a", "b"]]', "neither an object nor a list of names"),
        ('{"x": ["a", "b"]}', "is not understood"),
        ("a\nb\na\n", "names a more than once"),
        ("\n\n", "holds no class"),
    ],
)
def test_wrong_class_index_file_is_refused(tmp_path, text, message):
    file = tmp_path / "classes"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_class_index(file)


def test_missing_class_index_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"DATA.CLASS_INDEX='.*none.json' is not a file"):
        read_class_index(tmp_path / "none.json")


def test_missing_root_is_refused_with_its_siblings(tmp_path):
    touch(tmp_path, "imagenet/x", "tiny/x")
    with pytest.raises(ValueError, match=r"DATA.PATH='.*imagnet' is not a folder; .* holds imagenet/, tiny/"):
        split_folder(tmp_path / "imagnet", "train")


def test_unset_root_names_the_key():
    with pytest.raises(ValueError, match=r"DATA.PATH is not set; .*--data-path"):
        split_folder("", "train")


def test_root_may_be_the_current_folder(tmp_path, monkeypatch):
    touch(tmp_path, "val/cat/1.jpg")
    monkeypatch.chdir(tmp_path)
    assert split_folder(".", "val") == Path("val")
    with pytest.raises(ValueError, match=r"DATA.PATH='\.' has no folder train/, it holds val/"):
        split_folder(".", "train")


def test_missing_split_is_refused_with_the_contents(tmp_path):
    touch(tmp_path, "cat/1.jpg", "dog/1.jpg")
    with pytest.raises(
        ValueError, match="has no folder val/, it holds cat/, dog/; give the folder that holds train/ and val/"
    ):
        split_folder(tmp_path, "val")


def test_missing_split_is_suggested_one_folder_deeper(tmp_path):
    touch(tmp_path, "imagenet/train/cat/1.jpg")
    with pytest.raises(ValueError, match=r"did you mean DATA.PATH='.*/imagenet'"):
        split_folder(tmp_path, "train")


def test_flat_val_names_the_remedy(tmp_path):
    touch(tmp_path, "ILSVRC2012_val_00000001.JPEG", "ILSVRC2012_val_00000002.JPEG")
    with pytest.raises(ValueError, match=r"holds 2 images but no class folders.*move each into a folder of its class"):
        class_folders(tmp_path)


def test_folder_without_classes_or_images_is_refused(tmp_path):
    touch(tmp_path, "readme.txt")
    with pytest.raises(ValueError, match=r"holds no class folders, it holds readme.txt; expected"):
        class_folders(tmp_path)


def test_empty_class_is_named(tmp_path):
    touch(tmp_path, "a/1.jpg", "b/notes.txt")
    with pytest.raises(
        ValueError,
        match=r"no images in 1 of its 2 class folders: b [(]they hold 1 file that is no image [(]b/notes.txt[)][)]; fill them or",
    ):
        scan(tmp_path, ["a", "b"], must_hold_all=True)


def test_unknown_classes_are_named(tmp_path):
    touch(tmp_path, *(f"c{i}/1.jpg" for i in range(9)))
    with pytest.raises(
        ValueError, match="8 class folders that are not among the 1 classes: c1, c2, c3, c4, c5 and 3 more"
    ):
        scan(tmp_path, ["c0"], must_hold_all=False)


def test_missing_class_is_an_error_only_with_must_hold_all(tmp_path):
    touch(tmp_path, "b/1.jpg")
    with pytest.raises(ValueError, match="has no folder for 1 of the 2 classes: a;"):
        scan(tmp_path, ["a", "b"], must_hold_all=True)
    assert scan(tmp_path, ["a", "b"], must_hold_all=False).labels.tolist() == [1]
