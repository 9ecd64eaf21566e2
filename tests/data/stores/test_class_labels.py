"""Labels of class folders, and ReaL labels: standard order, numbers, subsets, errors with the remedy."""

import json

import numpy as np
import pytest
import torch
from timm.data import RealLabelsImagenet

from data.stores.class_labels import class_names, imagenet_wnids, label_folders
from data.stores.real_labels import read_real_labels

WNIDS = imagenet_wnids()


def test_number_folders_are_class_numbers_in_any_order():
    lists = class_names([], "", 1000)
    numbers = [str(n) for n in range(12)]
    labels, how = label_folders(sorted(numbers), lists, "DIR")
    assert labels == {name: int(name) for name in numbers}
    assert how == "read as class numbers"
    assert label_folders(["0007", "0999"], lists, "DIR")[0] == {"0007": 7, "0999": 999}


def test_names_come_before_numbers():
    trained = sorted(str(n) for n in range(12))  # "10" is class 2 of a model trained on such folders
    labels, _ = label_folders(["10", "2"], class_names(trained, "", 12), "DIR")
    assert labels == {"10": 2, "2": 4}


def test_subset_of_wnids_finds_the_standard_classes():
    labels, how = label_folders([WNIDS[950], WNIDS[3]], class_names([], "", 0), "DIR")
    assert labels == {WNIDS[950]: 950, WNIDS[3]: 3}
    assert how == "named by ImageNet-1k's list"
    assert WNIDS[:2] == ("n01440764", "n01443537")
    assert list(WNIDS) == sorted(WNIDS)


def test_checkpoint_names_come_before_the_class_index(tmp_path):
    (tmp_path / "index.txt").write_text("red\ngreen\nblue\n")
    lists = class_names(["blue", "green", "red"], str(tmp_path / "index.txt"), 3)
    assert label_folders(["blue"], lists, "DIR")[0] == {"blue": 0}
    (tmp_path / "index.txt").write_text("bleu\nvert\nrouge\n")
    lists = class_names(["blue", "green", "red"], str(tmp_path / "index.txt"), 3)
    labels, how = label_folders(["rouge", "bleu"], lists, "DIR")
    assert labels == {"rouge": 2, "bleu": 0}
    assert "DATA.CLASS_INDEX" in how


@pytest.mark.parametrize(
    ("folders", "num_classes", "parts"),
    [
        (["n01440764", "n01443538"], 1000, ["--val-path DIR", "1 class folders of 2", "'n01443538'", "n01443537"]),
        (["train", "val"], 1000, ["'train'", "did you mean DIR/val?"]),
        (["1", "1000"], 1000, ["'1000'", "from 0 to 999"]),
        (["1", "01"], 1000, ["'01' and 1", "same class"]),
        (["cat", "7"], 10, ["'cat'", "has no names but numbers", "DATA.CLASS_INDEX"]),
    ],
)
def test_folder_without_a_class_is_refused_with_the_nearest(folders, num_classes, parts):
    with pytest.raises(ValueError, match="--val-path DIR") as caught:
        label_folders(folders, class_names([], "", num_classes), "DIR")
    for part in parts:
        assert part in str(caught.value), str(caught.value)


def test_list_of_another_length_is_refused(tmp_path):
    (tmp_path / "index.txt").write_text("red\ngreen\n")
    with pytest.raises(ValueError, match="names 2 classes, the model has 3"):
        class_names([], str(tmp_path / "index.txt"), 3)


def real_file(tmp_path, entries):
    path = tmp_path / "real.json"
    path.write_text(json.dumps(entries))
    return str(path)


def val_names(count):
    return [f"n0/ILSVRC2012_val_{i + 1:08d}.JPEG" for i in range(count)]


def test_real_accuracy_equals_timms(tmp_path):
    rng = np.random.RandomState(0)
    logits = torch.from_numpy(rng.randn(200, 1000)).float()
    entries = [sorted(set(rng.randint(1000, size=rng.randint(4)).tolist())) for _ in range(200)]
    for i in range(0, 200, 3):  # some right ones, at every rank
        entries[i].append(int(logits[i].topk(7).indices[rng.randint(7)]))
    assert any(not entry for entry in entries)
    order = rng.permutation(200)
    names = [val_names(200)[i] for i in order]
    path = real_file(tmp_path, entries)
    timms = RealLabelsImagenet(names, real_json=path)
    timms.add_result(logits[order])
    correct1, correct5, images = read_real_labels(path, names, WNIDS).count(logits[order].topk(5).indices.numpy())
    assert images == sum(bool(entry) for entry in entries)
    assert 100 * correct1 / images == pytest.approx(timms.get_accuracy(1))
    assert 100 * correct5 / images == pytest.approx(timms.get_accuracy(5))
    assert 0 < correct1 < correct5 < images


def test_real_labels_follow_the_models_own_order(tmp_path):
    path = real_file(tmp_path, [[3, 950], [], [17]])
    labels = read_real_labels(path, val_names(3), [WNIDS[950], WNIDS[3], WNIDS[0]])
    assert labels.right == [frozenset({0, 1}), frozenset(), frozenset()]
    assert labels.count(np.array([[1, 0, 2], [0, 1, 2], [0, 1, 2]])) == labels.count(np.array([[0], [2], [0]]))
    others = [f"a{n}" for n in range(1000)]
    assert read_real_labels(path, val_names(3), others).right[0] == frozenset({3, 950})


@pytest.mark.parametrize(
    ("entries", "names", "classes", "parts"),
    [
        ([[1]], ["a/cat.jpg"], WNIDS, ["'a/cat.jpg'", "ILSVRC2012_val_00000001.JPEG", "original names"]),
        ([[1]], val_names(2), WNIDS, ["val_00000002"]),
        ({"a": 1}, val_names(1), WNIDS, ["list of lists"]),
        ([1, 2], val_names(1), WNIDS, ["list of lists"]),
        ([[1000]], val_names(1), WNIDS, ["1000", "between 0 and 999"]),
        ([["n0"]], val_names(1), WNIDS, ["'n0'"]),
        ([[1]], val_names(1), ["red", "green"], ["2 classes (red, green", "WordNet"]),
        ([[]], val_names(1), WNIDS, ["no label"]),
    ],
)
def test_real_labels_that_do_not_fit_are_refused(tmp_path, entries, names, classes, parts):
    with pytest.raises(ValueError, match="--real-labels") as caught:
        read_real_labels(real_file(tmp_path, entries), names, classes)
    for part in parts:
        assert part in str(caught.value), str(caught.value)


def test_damaged_real_labels_are_refused(tmp_path):
    (tmp_path / "real.json").write_text("[[1, 2")
    with pytest.raises(ValueError, match="is not JSON"):
        read_real_labels(str(tmp_path / "real.json"), val_names(1), WNIDS)
