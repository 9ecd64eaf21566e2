"""tools.predict: the classes that the model names, for files and folders, with the evaluation's crop."""

import csv
import re
from dataclasses import asdict

import numpy as np
import pytest
import timm
import torch
from PIL import Image, ImageOps

import train as training
from data.augment.transforms import EvalTransform
from data.stores.class_labels import readable_names
from engine.checkpoint.files import save_weights
from models.weights import load_weights
from tools.classifier import find_images, load_classifier, read_image
from tools.predict import main

CLASSES = ["n01440764", "n02106662", "cat"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Weights of a small model of timm's, as train.py writes them."""
    torch.manual_seed(0)
    model = timm.create_model("test_efficientnet", num_classes=3)
    metadata = {
        "model": "test_efficientnet",
        "num_classes": 3,
        "classes": CLASSES,
        "img_size": 32,
        "mean": [0.4, 0.5, 0.6],
        "std": [0.2, 0.3, 0.4],
        "evaluation": asdict(EvalTransform(32, 40, "bilinear", "squash", (1, 2, 3))),
        "weights": "raw",
    }
    path = tmp_path_factory.mktemp("checkpoint") / "best_raw.safetensors"
    save_weights(path, model.state_dict(), metadata)
    return path


def test_probabilities_are_those_of_the_evaluation_crop(checkpoint, pictures, tmp_path):
    file = pictures / "val/red/001.jpg"
    assert main([str(checkpoint), str(file), "--csv", str(tmp_path / "a.csv"), "--top", "9", "--device", "cpu"]) == 0
    with (tmp_path / "a.csv").open() as table:
        (row,) = csv.DictReader(table)
    model = timm.create_model("test_efficientnet", num_classes=3).eval()
    model.load_state_dict(load_weights(checkpoint)[0])
    x = EvalTransform(32, 40, "bilinear", "squash")(read_image(file)).float() / 255
    x = (x - torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1)) / torch.tensor([0.2, 0.3, 0.4]).view(3, 1, 1)
    want = model(x[None]).detach().softmax(1)[0].sort(descending=True)
    assert row["image"] == str(file)
    for rank in range(3):
        assert float(row[f"probability_{rank + 1}"]) == pytest.approx(float(want.values[rank]), abs=1e-5)
        name = CLASSES[int(want.indices[rank])]
        assert row[f"class_{rank + 1}"] == name
        assert row[f"name_{rank + 1}"] == {"n01440764": "tench", "n02106662": "German shepherd", "cat": "cat"}[name]
    assert "class_4" not in row


@pytest.mark.parametrize("orientation", range(1, 10))  # 9 is none that EXIF knows
def test_photograph_stands_upright(orientation, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "telephone.png"
    Image.fromarray(np.random.RandomState(0).randint(0, 255, (5, 7, 3), dtype=np.uint8)).save(path, exif=exif)
    with Image.open(path) as image:
        want = np.asarray(ImageOps.exif_transpose(image))
    np.testing.assert_array_equal(read_image(path).permute(1, 2, 0), want)


def test_folders_are_searched_and_damaged_files_listed(checkpoint, pictures, tmp_path, capsys):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep/broken.jpg").write_bytes(b"no image")
    (tmp_path / "notes.txt").write_text("not looked at")
    assert main([str(checkpoint), str(pictures / "val"), str(tmp_path), "--top", "2", "--batch-size", "4"]) == 0
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert lines[::3] == [
        str(pictures / "val" / name / f"{i:03d}.jpg") for name in ("blue", "green", "red") for i in range(5)
    ]
    assert all("%" in line for i, line in enumerate(lines) if i % 3)
    assert "not read" in printed.err
    assert "deep/broken.jpg" in printed.err
    assert "notes.txt" not in printed.err
    assert main([str(checkpoint), str(tmp_path)]) == 1


def test_file_without_a_crop_takes_timms_with_a_note(checkpoint, tmp_path, pictures):
    weights, metadata = load_weights(checkpoint)
    del metadata["evaluation"], metadata["layout"], metadata["holds"]
    save_weights(tmp_path / "old.safetensors", weights, metadata)
    old = load_classifier(tmp_path / "old.safetensors")
    assert (old.transform.crop, old.transform.resize) == (32, 33)  # 0.95 of the shorter side
    assert "does not state the evaluation crop" in old.notes[0]
    other = load_classifier(tmp_path / "old.safetensors", size=64, crop_pct=0.5)
    assert (other.transform.crop, other.transform.resize, other.notes) == (64, 128, ())
    assert load_classifier(checkpoint, size=64).transform == EvalTransform(64, 80, "bilinear", "squash", (1, 2, 3))


def test_crop_of_the_run_is_printed(small_cfg, tmp_path, pictures, capsys):
    argv = [
        "--cfg",
        str(small_cfg),
        "--output",
        str(tmp_path),
        "--opts",
        "TRAIN.EPOCHS",
        "1",
        "SCHEDULE.WARMUP_EPOCHS",
        "0",
    ]
    assert training.main(argv) == 0
    found = load_classifier(tmp_path / "small/best_ema.safetensors")
    assert found.transform == EvalTransform(32, 36)
    assert found.classes == ["blue", "green", "red"]
    (newest,) = list((tmp_path / "small/checkpoints").iterdir())
    assert main([str(newest), str(pictures / "val"), "--weights", "ema", "--top", "1"]) == 0
    assert len(capsys.readouterr().out.splitlines()) >= 30


def test_class_index_renames_the_classes(checkpoint, tmp_path):
    (tmp_path / "names.txt").write_text("one\ntwo\nthree\n")
    assert load_classifier(checkpoint, class_index=str(tmp_path / "names.txt")).readable == ["one", "two", "three"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "--class-index='{file}' is not a file; give its path"),
        ("one\none\n", "--class-index='{file}' names one more than once"),
        ("one\ntwo\n", "--class-index={file} names 2 classes, the model has 3"),
    ],
)
def test_class_index_error_names_the_flag(text, message, checkpoint, tmp_path):
    file = tmp_path / "names.txt"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ValueError, match=re.escape(message.format(file=file))):
        load_classifier(checkpoint, class_index=str(file))


def test_readable_names_know_all_of_imagenet():
    assert readable_names(["n01440764", "n02802215", "n99999999", "dog", "3"])[0] == "tench"
    assert readable_names(["n99999999", "dog", "3"]) == ["n99999999", "dog", "3"]
    assert readable_names(["n02084071"]) == ["dog"]  # in the full list only


def test_named_file_is_taken_whatever_its_suffix(tmp_path):
    (tmp_path / "a.jpeg2").write_bytes(b"x")
    assert find_images([str(tmp_path / "a.jpeg2")]) == [tmp_path / "a.jpeg2"]
    with pytest.raises(ValueError, match="there is no image in"):
        find_images([str(tmp_path)])
    with pytest.raises(ValueError, match=r"did you mean .*a\.jpeg2"):
        find_images([str(tmp_path / "a.jpg2")])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--model", "stvit_smal"], "did you mean stvit_small"),
        (["--model", "stvit_small"], "holds a test_efficientnet; leave --model out"),
        (["--weights", "ema"], "holds raw weights, ema were asked for"),
        (["--class-index", "{tmp}/two.txt"], "names 2 classes, the model has 3"),
        (["--size", "0"], "--size 0"),
        (["--crop-pct", "1.5"], "--crop-pct 1.5 must lie in 0 .. 1"),
        (["--top", "0"], "--top 0"),
        (["--csv", "answers.txt"], "must end in .csv"),
        (["--topp", "3"], "did you mean --top"),
    ],
)
def test_mistake_is_an_error_with_a_hint(argv, message, checkpoint, pictures, tmp_path, capsys):
    (tmp_path / "two.txt").write_text("one\ntwo\n")
    argv = [text.replace("{tmp}", str(tmp_path)) for text in argv]
    with pytest.raises(SystemExit) as stop:
        main([str(checkpoint), str(pictures / "val"), *argv])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_nothing_readable_prints_nothing(checkpoint, tmp_path, capsys):
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    assert main([str(checkpoint), str(tmp_path), "--device", "cpu"]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "broken.jpg cannot be decoded" in printed.err


def test_run_directory_is_answered_with_its_files(checkpoint, pictures, capsys):
    with pytest.raises(SystemExit):
        main([str(checkpoint.parent), str(pictures / "val")])
    message = f"checkpoint {checkpoint.parent} is a folder, name a file; {checkpoint.parent} holds best_raw.safetensors"
    assert message in capsys.readouterr().err


def test_weights_that_do_not_say_their_model_are_identified_or_refused(tmp_path):
    torch.save({"weight": torch.zeros(2)}, tmp_path / "x.pth")
    with pytest.raises(ValueError, match="does not state its model; name it with --model"):
        load_classifier(tmp_path / "x.pth")
