"""build_data and build_eval_data: loaders from a config, the check of the class count, errors that name keys."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import config
from data.build import build_data, build_eval_data
from data.loaders.synthetic import SyntheticEval, SyntheticTrain
from tests.helpers.data_doubles import write_folder

SMALL = "DATA.IMG_SIZE 32 DATA.EVAL_RESIZE 36 DATA.WORKERS 0 TRAIN.GLOBAL_BATCH 8 TRAIN.MICRO_BATCH 4 EVAL.BATCH 3"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    return write_folder(folder, train={"cat": 9, "dog": 8, "owl": 7}, val={"cat": 2, "dog": 3, "owl": 2})


def cfg_of(root, *opts):
    return config.load(opts=[*SMALL.split(), "DATA.PATH", str(root), *opts])


def test_training_data_runs_from_file_to_targets(root):
    data = build_data(cfg_of(root), rank=0, world=1, device="cpu")
    assert data.classes == ["cat", "dog", "owl"]
    assert (data.sampler.num_samples, data.train.updates_per_epoch, data.val.num_images) == (24, 3, 7)
    batches = list(data.train.epoch(0))
    assert len(batches) == 6
    images, targets = data.stage.train(batches[0].to("cpu"), 0, 0, 0)
    assert images.shape == (4, 3, 32, 32)
    assert images.dtype == torch.float32
    assert targets.shape == (4, 3)
    assert torch.allclose(targets.sum(1), torch.ones(4))
    assert sum(len(data.stage.evaluate(batch)[1]) for batch in data.val) == 7
    assert data.notes == []


@pytest.mark.parametrize("dark", [["train"], ["val"], ["train", "val"]])
def test_nearly_black_images_are_noted_by_the_process_that_logs(dark, tmp_path):
    root = write_folder(tmp_path, train={"cat": 8, "dog": 2}, val={"cat": 3, "dog": 1})
    for split in dark:
        for path in (root / split / "cat").iterdir():
            Image.fromarray(np.full((40, 40), 4095 // 16, np.uint16)).save(path, "PNG")  # 8 bits in 16
    notes = build_data(cfg_of(root), 0, 1, "cpu").notes
    assert all(f" of {root}/{split}" in note and "black" in note for split, note in zip(dark, notes, strict=True))
    assert len(build_eval_data(cfg_of(root), 0, 1, "cpu").notes) == ("val" in dark)
    assert build_data(cfg_of(root), 1, 2, "cpu").notes == []


def test_options_reach_their_objects(root):
    opts = "AUG.MIXUP 0 AUG.CUTMIX 0 AUG.LABEL_SMOOTHING 0 AUG.RAND_AUGMENT '' AUG.ERASE_PROB 1 AUG.ERASE_COUNT 2 AUG.HFLIP 0"
    opts += " AUG.ERASE_MODE const AUG.SCALE [1,1] AUG.RATIO [1,1] TRAIN.SEED 5 AUG.REPEATS 2 DATA.MEAN [0,0,0] DATA.STD [1,1,1]"
    opts += " DATA.INTERPOLATION bilinear AUG.ORDER mix_then_erase AUG.ERASE_AREA [0.1,0.2] AUG.MIX_PROB 0.5 AUG.MIX_SWITCH_PROB 0.2"
    data = build_data(cfg_of(root, *[opt.strip("'") for opt in opts.split()]), 0, 1, "cpu")
    transform = data.train._loader.dataset.transform
    assert (transform.policy, transform.hflip, transform.scale, transform.ratio) == (None, 0, (1, 1), (1, 1))
    assert (transform.seed, transform.interpolation, transform.fill, transform.size) == (5, "bilinear", (0, 0, 0), 32)
    assert (transform.erase.prob, transform.erase.count, transform.erase.area) == (1, 2, (0.1, 0.2))
    assert (data.sampler.seed, data.sampler.repeats) == (5, 2)
    assert (data.stage.erase_mode, data.stage.order, data.stage.seed) == ("const", "mix_then_erase", 5)
    assert (data.stage.mixing.prob, data.stage.mixing.switch_prob) == (0.5, 0.2)
    batch = next(data.train.epoch(0))
    images, targets = data.stage.train(batch, 0, 0, 0)
    assert batch.erase.shape == (4, 2, 4)
    assert torch.equal(targets, torch.nn.functional.one_hot(batch.labels, 3).float())
    top, left, height, width = batch.erase[0, 0].tolist()
    assert (images[0, :, top : top + height, left : left + width] == 0).all()
    kept = images != 0
    assert torch.allclose(images[kept], (batch.images / 255)[kept], atol=1e-6)


def test_fill_follows_the_mean(root):
    data = build_data(cfg_of(root), 0, 1, "cpu")
    assert data.train._loader.dataset.transform.fill == (124, 116, 104)
    assert data.train._loader.dataset.transform.policy.increasing


def test_class_count_must_match(root):
    assert build_data(cfg_of(root, "MODEL.NUM_CLASSES", "3"), 0, 1, "cpu").classes == ["cat", "dog", "owl"]
    with pytest.raises(
        ValueError, match=r"MODEL\.NUM_CLASSES=10 but .*train holds 3 classes; set MODEL\.NUM_CLASSES to 3"
    ):
        build_data(cfg_of(root, "MODEL.NUM_CLASSES", "10"), 0, 1, "cpu")
    with pytest.raises(ValueError, match=r"MODEL\.NUM_CLASSES=10 but .*train holds 3 classes"):
        build_eval_data(cfg_of(root, "MODEL.NUM_CLASSES", "10"), 0, 1, "cpu")


def test_class_index_file_orders_the_labels(root, tmp_path):
    file = tmp_path / "classes.json"
    file.write_text(json.dumps(["owl", "cat", "dog"]))
    data = build_data(cfg_of(root, "DATA.CLASS_INDEX", str(file)), 0, 1, "cpu")
    assert data.classes == ["owl", "cat", "dog"]
    assert torch.bincount(torch.cat([batch.labels for batch in data.val])).tolist() == [2, 2, 3]
    file.write_text(json.dumps(["owl", "cat"]))
    with pytest.raises(ValueError, match="1 class folders that are not among the 2 classes: dog"):
        build_data(cfg_of(root, "DATA.CLASS_INDEX", str(file)), 0, 1, "cpu")
    file.write_text(json.dumps(["owl", "cat", "dog", "yak"]))
    with pytest.raises(ValueError, match="has no folder for 1 of the 4 classes: yak"):
        build_data(cfg_of(root, "DATA.CLASS_INDEX", str(file)), 0, 1, "cpu")


def test_class_in_val_but_not_in_train_is_refused(tmp_path):
    write_folder(tmp_path, train={"cat": 8, "dog": 8}, val={"cat": 1, "wolf": 1})
    with pytest.raises(
        ValueError, match=r"val has 1 class folders that are not among the 2 classes: wolf; add their images to train/"
    ):
        build_data(cfg_of(tmp_path), 0, 1, "cpu")


def test_class_missing_in_val_is_noted(tmp_path):
    write_folder(tmp_path, train={"cat": 8, "dog": 8}, val={"dog": 1})
    data = build_data(cfg_of(tmp_path), 0, 1, "cpu")
    assert next(iter(data.val)).labels.tolist() == [1]
    assert data.notes == [f"{tmp_path}/val has images of 1 of the 2 classes; the others are not evaluated"]


def test_evaluation_needs_no_train_folder(tmp_path):
    write_folder(tmp_path, val={"cat": 2, "dog": 3})
    data = build_eval_data(cfg_of(tmp_path), 0, 1, "cpu")
    assert data.classes == ["cat", "dog"]
    assert sorted(torch.cat([batch.indices for batch in data.val]).tolist()) == [0, 1, 2, 3, 4]
    assert data.fingerprint["val"] == 5
    with pytest.raises(ValueError, match=r"has no folder train/, it holds val/"):
        build_data(cfg_of(tmp_path), 0, 1, "cpu")


def test_evaluation_uses_the_classes_of_train(tmp_path):
    write_folder(tmp_path, train={"ant": 1, "cat": 1, "dog": 1}, val={"dog": 2})
    data = build_eval_data(cfg_of(tmp_path), 0, 1, "cpu")
    assert data.classes == ["ant", "cat", "dog"]
    assert next(iter(data.val)).labels.tolist() == [2, 2]


@pytest.mark.parametrize("world", [1, 2, 3])
def test_evaluation_gives_each_image_once(root, world):
    seen = []
    for rank in range(world):
        for batch in build_eval_data(cfg_of(root), rank, world, "cpu").val:
            seen += batch.indices.tolist()
    assert sorted(seen) == list(range(7))


def test_fingerprint_distinguishes_data_sets(root, tmp_path):
    one = build_data(cfg_of(root), 0, 1, "cpu").fingerprint
    assert (one["train"], one["val"], one["classes"]) == (24, 7, 3)
    assert build_data(cfg_of(root), 0, 1, "cpu").fingerprint == one
    same_counts = write_folder(tmp_path / "b", train={"cat": 8, "dog": 9, "owl": 7}, val={"cat": 2, "dog": 3, "owl": 2})
    other = build_data(cfg_of(same_counts), 0, 1, "cpu").fingerprint
    assert {key for key in one if one[key] != other[key]} == {"train_per_class_sha256"}
    renamed = write_folder(tmp_path / "c", train={"cat": 9, "dog": 8, "yak": 7}, val={"cat": 2, "dog": 3, "yak": 2})
    other = build_data(cfg_of(renamed), 0, 1, "cpu").fingerprint
    assert {key for key in one if one[key] != other[key]} == {"classes_sha256"}
    json.dumps(one)


def test_synthetic_loader_needs_no_folder():
    opts = [
        "DATA.LOADER",
        "synthetic",
        "DATA.SYNTHETIC_TRAIN",
        "20",
        "DATA.SYNTHETIC_VAL",
        "7",
        "DATA.SYNTHETIC_CLASSES",
        "6",
    ]
    cfg = cfg_of("", *opts)
    data = build_data(cfg, 1, 2, "cpu")
    assert isinstance(data.train, SyntheticTrain)
    assert isinstance(build_eval_data(cfg, 0, 1, "cpu").val, SyntheticEval)
    assert len(build_eval_data(cfg, 2, 3, "cpu").val) == 1  # two images; the training batch need not divide by three
    assert (len(data.classes), data.train.updates_per_epoch, data.val.num_images) == (6, 2, 7)
    assert data.fingerprint["train"] == 20
    batch = next(data.train.epoch(0))
    assert data.stage.train(batch, 0, 1, 0)[1].shape == (4, 6)


def test_too_small_data_names_the_remedy(root):
    opts = ["TRAIN.GLOBAL_BATCH", "32", "TRAIN.MICRO_BATCH", "32"]
    with pytest.raises(ValueError, match=r"TRAIN\.GLOBAL_BATCH=32 is larger .*24 training images\); lower it to 24"):
        build_data(cfg_of(root, *opts), 0, 1, "cpu")


def test_unset_path_names_the_key():
    with pytest.raises(ValueError, match=r"DATA\.PATH is not set"):
        build_data(cfg_of(""), 0, 1, "cpu")


def test_default_workers_follow_cores_and_local_world_size(root, monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(12)))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    data = build_eval_data(cfg_of(root, "DATA.WORKERS", "-1"), 0, 1, "cpu")
    assert data.val._loader.num_workers == 3
