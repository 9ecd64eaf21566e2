"""Beginning of the classes in a split: extra folders, one class, flat validation images and their label files."""

import numpy as np
import pytest

from data.build import ValFolder
from data.stores.split import open_split
from tests.helpers.archives import write_tar
from tests.helpers.data_doors import PICTURE, evaluate, refused_everywhere, run_index, train, two_classes, write

pytestmark = pytest.mark.usefixtures("own_cache")
FLAT = [f"val/ILSVRC2012_val_{i:08d}.JPEG" for i in range(1, 5)]
STEMS = [path.removeprefix("val/").removesuffix(".JPEG") for path in FLAT]
CLASSES = ["dog", "cat", "cat", "dog"]


def lines(*texts):
    return "".join(f"{text}\n" for text in texts).encode()


@pytest.mark.parametrize(
    ("inner", "val"),
    [("train/images", "val"), ("train/train", "val/val"), ("train/a/b", "val/images"), ("train", "val/x")],
)
def test_folder_that_holds_one_folder_of_classes_is_passed_through(tmp_path, capsys, inner, val):
    plain, root = two_classes(tmp_path / "plain"), two_classes(tmp_path / "root", inner, val)
    found, wanted = train(root), train(plain)
    assert found.classes == ["cat", "dog"]
    assert found.fingerprint == wanted.fingerprint
    assert found.names(0) == wanted.names(0) == "cat/9.jpg"
    read = [path for path in (inner, val) if "/" in path]
    top = {path: path.split("/")[0] for path in read}
    assert found.notes == [f"{root}/{path} is read: {root}/{top[path]} holds nothing but this folder" for path in read]
    assert evaluate(root).fingerprint["val"] == 2
    status, printed = run_index(root, capsys)
    assert status == 0
    assert f"store {root}/{inner} (folder)" in printed


def test_class_folder_with_folders_in_it_stays_a_class(tmp_path):
    root = two_classes(tmp_path)
    write(tmp_path, "val/cat/a/1.jpg", "val/cat/b/1.jpg")
    (tmp_path / "val/cat/9.jpg").unlink()
    (tmp_path / "val/dog/9.jpg").unlink()
    (tmp_path / "val/dog").rmdir()
    assert train(root).val._loader.dataset.source.labels.tolist() == [0, 0]


def test_class_named_like_the_folder_around_it_is_found(tmp_path):
    root = two_classes(tmp_path, train="train/cat")
    assert train(root).classes == ["cat", "dog"]


@pytest.mark.parametrize(
    ("paths", "hint"),
    [
        (["train/cat/1.jpg"], ""),
        (["train/cat/1.jpg", "train/.cache/x.jpg", "train/__MACOSX/cat/._1.jpg"], ""),
        (["train/images/cat/1.jpg"], ""),
        (["train/images/cat/1.jpg", "train/images/dog/1.jpg", "train/images/x.jpg"], "did you mean {}/train/images?"),
    ],
)
def test_single_class_is_refused_with_the_folder_that_may_be_meant(tmp_path, capsys, paths, hint):
    text = refused_everywhere(write(tmp_path, "val/cat/1.jpg", "val/dog/1.jpg", *paths), capsys)
    assert "holds one class only" in text
    assert "MODEL.NUM_CLASSES" in text
    assert (hint.format(tmp_path) if hint else "expected <class>/<image>") in text
    assert ("did you mean" in text) == bool(hint)


def test_single_class_in_an_archive_is_refused(tmp_path, capsys):
    write_tar(tmp_path / "train.tar", [("cat/1.jpg", PICTURE), ("cat/2.jpg", PICTURE)])
    write_tar(tmp_path / "val.tar", [("cat/1.jpg", PICTURE)])
    assert "train.tar holds one class only, cat" in refused_everywhere(tmp_path, capsys)


def test_single_class_of_a_known_model_is_evaluated(tmp_path):
    data = evaluate(tmp_path, folder=ValFolder(str(write(tmp_path, "dog/1.jpg")), ["cat", "dog"], 2))
    assert data.answers == [1]


def tiny_imagenet(root, val="val/images"):
    for name in ("n02", "n01"):
        write(root, *(f"train/{name}/images/{name}_{i}.JPEG" for i in range(3)))
        write(root, f"train/{name}/{name}_boxes.txt", data=lines("n02_0.JPEG\t0\t0\t62\t63"))
    write(root, *(f"{val}/val_{i}.JPEG" for i in range(3)), "test/images/test_0.JPEG")
    write(
        root, "val/val_annotations.txt", data=lines(*(f"val_{i}.JPEG\tn0{2 - i % 2}\t0\t32\t44\t62" for i in range(3)))
    )
    write(root, "wnids.txt", data=lines("n02", "n01"))
    return write(root, "words.txt", data=lines("n02\tray", "n01\ttench"))


def test_tiny_imagenet_is_read_as_downloaded(tmp_path, capsys):
    data = train(tiny_imagenet(tmp_path))
    assert data.classes == ["n01", "n02"]
    assert data.fingerprint["train"] == 6
    assert [data.names(i) for i in range(3)] == ["val_1.JPEG", "val_0.JPEG", "val_2.JPEG"]
    assert data.val._loader.dataset.source.labels.tolist() == [0, 1, 1]
    assert evaluate(tmp_path).fingerprint["val"] == 3
    status, printed = run_index(tmp_path, capsys)
    assert status == 0
    assert f"(folder, classes from {tmp_path}/val/val_annotations.txt)" in printed
    assert "passed over 2 files that are no images (n01/n01_boxes.txt, n02/n02_boxes.txt)" in printed


def test_validation_images_without_their_file_are_never_removed(tmp_path, capsys):
    (tiny_imagenet(tmp_path) / "val/val_annotations.txt").unlink()
    text = refused_everywhere(tmp_path, capsys)
    assert f"{tmp_path}/val/images holds 3 images but no class folders, so their classes are unknown" in text
    assert "val_annotations.txt" in text
    assert "DATA.VAL_LABELS" in text
    assert "remove" not in text


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("LOC_val_solution.csv", ["ImageId,PredictionString", *(f"{s},{c} 1 2 3 4 " for s, c in zip(STEMS, CLASSES, strict=True))]),
        ("val_map.txt", [f"{s}.JPEG\t{int(c == 'dog')}" for s, c in zip(STEMS, CLASSES, strict=True)]),
        ("val.txt", [f"{s}.JPEG {c}" for s, c in zip(STEMS, CLASSES, strict=True)]),
        ("valprep.sh", [f"mv {s}.JPEG {c}/" for s, c in zip(STEMS, CLASSES, strict=True)]),
        ("val/val.txt", [f"{s}.JPEG {c}" for s, c in zip(STEMS, CLASSES, strict=True)]),
        ("imagenet_2012_validation_synset_labels.txt", CLASSES),
    ],
)  # fmt: skip
def test_flat_validation_images_use_the_label_files_of_archives(tmp_path, file, text):
    root = write(two_classes(tmp_path / "root", val="elsewhere"), *FLAT)
    write(root, file, data=lines(*text))
    data = train(root)
    assert data.val._loader.dataset.source.labels.tolist() == [0, 0, 1, 1]
    assert [data.names(i)[-6:] for i in range(4)] == ["2.JPEG", "3.JPEG", "1.JPEG", "4.JPEG"]
    assert data.notes == []
    archive = two_classes(tmp_path / "archive", val="elsewhere")
    write_tar(archive / "val.tar", [(path.removeprefix("val/"), PICTURE) for path in FLAT])
    write(archive, file.removeprefix("val/"), data=lines(*text))
    assert train(archive).fingerprint == data.fingerprint


def test_kaggles_download_is_read_with_its_solution(tmp_path):
    root = write(two_classes(tmp_path / "ILSVRC/Data/CLS-LOC", val="x"), *FLAT)
    with pytest.raises(ValueError, match=r"LOC_val_solution\.csv"):
        train(root)
    rows = (f"{stem},{name} 1 2 3 4" for stem, name in zip(STEMS, CLASSES, strict=True))
    write(tmp_path, "LOC_val_solution.csv", data=lines("ImageId,PredictionString", *rows))
    assert train(root).val._loader.dataset.source.labels.tolist() == [0, 0, 1, 1]
    with pytest.raises(ValueError, match=r"did you mean DATA.PATH='.*ILSVRC/Data/CLS-LOC'\?$"):
        train(tmp_path)


def test_given_label_file_is_used_for_flat_images_and_refused_for_class_folders(tmp_path):
    root = write(two_classes(tmp_path, val="elsewhere"), *FLAT)
    rows = (f"{stem}.JPEG,{name}" for stem, name in zip(STEMS, CLASSES, strict=True))
    opts = ("DATA.VAL_LABELS", str(write(tmp_path, "mine.csv", data=lines("filename,label", *rows)) / "mine.csv"))
    assert train(root, *opts).val._loader.dataset.source.labels.tolist() == [0, 0, 1, 1]
    with pytest.raises(ValueError, match=r"DATA.VAL_LABELS=.* has no effect"):
        train(two_classes(tmp_path / "other"), *opts)


def test_flat_folder_of_val_path_uses_label_files(tmp_path):
    write(tmp_path, "set/a.jpg", "set/b.jpg")
    for text, wanted in ((["a.jpg dog", "b.jpg cat"], [0, 1]), (["a.jpg 1", "b.jpg 0"], [0, 1])):
        write(tmp_path, "set/val.txt", data=lines(*text))
        data = evaluate(tmp_path, folder=ValFolder(str(tmp_path / "set"), ["cat", "dog"], 2))
        assert data.val._loader.dataset.source.labels.tolist() == wanted
        assert [data.names(i) for i in range(2)] == ["b.jpg", "a.jpg"]
        assert "val.txt" in data.origin
    (tmp_path / "set/val.txt").unlink()
    with pytest.raises(ValueError, match="2 images but no class folders"):
        evaluate(tmp_path, folder=ValFolder(str(tmp_path / "set"), ["cat", "dog"], 2))


def test_val_path_is_followed_through_a_doubled_folder(tmp_path):
    write(tmp_path, "imagenetv2/imagenetv2-val/0/1.jpg", "imagenetv2/imagenetv2-val/7/1.jpg")
    data = evaluate(tmp_path, folder=ValFolder(str(tmp_path / "imagenetv2"), [], 10))
    assert data.answers == [0, 7]
    assert "holds nothing but this folder" in data.notes[0]


def test_validation_images_of_an_archive_in_one_folder_use_label_files(tmp_path):
    two_classes(tmp_path, val="elsewhere")
    write_tar(tmp_path / "val.tar", [(f"images/{i}.jpg", PICTURE) for i in range(3)])
    with pytest.raises(ValueError, match="no file tells their classes"):
        open_split(tmp_path, "val", progress=lambda text: None)
    write(tmp_path, "val_annotations.txt", data=lines("0.jpg dog", "1.jpg cat", "2.jpg dog"))
    source = open_split(tmp_path, "val", progress=lambda text: None).source(["cat", "dog"], False)
    assert np.array_equal(source.labels, [0, 1, 1])


def test_flat_training_images_are_refused(tmp_path, capsys):
    text = refused_everywhere(write(tmp_path, "train/1.jpg", "val/cat/1.jpg", "val.txt"), capsys)
    assert f"move each into a folder of its class, {tmp_path}/train/<class>/<image>" in text


@pytest.mark.parametrize("below", ["imagenet", "a/b/imagenet"])
def test_data_path_above_or_below_the_right_one_is_corrected(tmp_path, capsys, below):
    right = two_classes(tmp_path / below)
    assert refused_everywhere_suffix(tmp_path, capsys) == f"did you mean DATA.PATH='{right}'?"
    assert refused_everywhere_suffix(right / "train", capsys) == f"did you mean DATA.PATH='{right}'?"


def refused_everywhere_suffix(root, capsys):
    with pytest.raises(ValueError, match="has no folder train/") as caught:
        train(root)
    assert run_index(root, capsys)[0] == 2
    return str(caught.value).split("; ")[-1]


@pytest.mark.parametrize("outer", [("images", "masks"), ("day", "night", "rain")])
def test_folders_that_all_class_folders_share_are_noted(tmp_path, capsys, outer):
    root = write(
        tmp_path,
        *(f"{s}/{a}/{b}/{i}.jpg" for s in ("train", "val") for a in outer for b in ("cat", "dog") for i in "12"),
    )
    note = f"did you mean {root}/train/{outer[0]}?"
    assert [note in text for text in train(root).notes] == [True, False]
    assert note in run_index(root, capsys)[1]


@pytest.mark.parametrize(
    "paths", [("a/x/1.jpg", "b/y/1.jpg"), ("a/images/1.jpg", "b/images/1.jpg"), ("a/1.jpg", "a/x/1.jpg", "b/x/1.jpg")]
)
def test_folders_in_class_folders_are_not_noted_otherwise(tmp_path, paths):
    root = write(tmp_path, *(f"{split}/{path}" for split in ("train", "val") for path in paths))
    write(root, *(f"train/{path}".replace("1.jpg", f"{i}.jpg") for path in paths for i in "234"))
    assert train(root).notes == []


@pytest.mark.parametrize("kind", ["link", "link of each class", "archive"])
def test_validation_images_that_are_the_training_images_are_noted(tmp_path, capsys, kind):
    root = two_classes(tmp_path / "root", val="train")
    if kind == "archive":
        (root / "train").rename(tmp_path / "away")
        write_tar(root / "train.tar", [(f"{name}/{i}.jpg", PICTURE) for name in ("cat", "dog") for i in range(4)])
        (root / "val.tar").symlink_to("train.tar")
    elif kind == "link":
        (root / "val").symlink_to("train")
    else:
        (root / "val").mkdir()
        for name in ("cat", "dog"):
            (root / "val" / name).symlink_to(f"../train/{name}")
    text = "has 2 links into" if kind == "link of each class" else "is the same place as"
    assert text in "".join(train(root).notes)
    status, printed = run_index(root, capsys)
    assert (status, text in printed) == (1, True)


@pytest.mark.parametrize(
    ("split", "name"), [("train", "Train"), ("train", "training"), ("val", "valid"), ("val", "VAL"), ("val", "test")]
)
def test_split_of_another_name_is_named(tmp_path, split, name):
    root = two_classes(tmp_path)
    (root / split).rename(root / name)
    with pytest.raises(ValueError, match=rf"did you mean {name}/\? Rename it to {split}/"):
        train(root)


def test_given_label_file_beside_the_images_is_not_passed_over(tmp_path):
    root = write(
        tmp_path, *(f"train/{name}/{i}.jpg" for name in ("cat", "dog") for i in "12"), "val/1.jpg", "val/2.jpg"
    )
    write(root, "val/my.csv", data=lines("1.jpg,cat", "2.jpg,dog"))
    write(root, "val/other.csv", data=b"x")
    data = train(root, "DATA.VAL_LABELS", f"{root}/val/my.csv")
    assert data.notes == [f"{root}/val: passed over 1 file that is no image (other.csv)"]
