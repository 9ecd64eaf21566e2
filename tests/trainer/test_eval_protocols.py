"""eval.py's protocols as a user runs them: flip, folders of other data sets, ReaL, both weights, tables and JSON."""

import csv
import json
import sys

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file

import config
import eval as eval_script
import train as train_script
from data.augment.transforms import EvalTransform
from data.build import build_data, build_eval_data
from data.stores.class_labels import imagenet_wnids
from engine.result_files import write_table
from tests.helpers.data_doubles import picture
from tests.helpers.small_models import scrambled

WNIDS = imagenet_wnids()


def tensor(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def cfg_of(*opts):
    return config.load(opts=["DATA.WORKERS", "0", *map(str, opts)])


def draw(root, counts, start=0):
    """Write root/<class>/*.jpg: as many pictures a class as `counts` says."""
    for number, (name, count) in enumerate(counts.items(), start):
        (root / name).mkdir(parents=True)
        for i in range(count):
            rng = np.random.RandomState([number, i])
            picture(rng, *rng.randint(30, 60, size=2)).save(root / name / f"{name}_{i:02d}.jpg")
    return root


def weights_of(num_classes, seed):
    """Return random weights whose answers differ from image to image."""
    torch.manual_seed(seed)
    model = timm.create_model("test_efficientnet", num_classes=num_classes)
    pictures = [tensor(picture(np.random.RandomState([99, i]), 36, 36))[:, 2:34, 2:34] for i in range(24)]
    images = (torch.stack(pictures) / 255 - 0.45) / 0.225
    with torch.no_grad():
        model.train()
        for _ in range(30):  # statistics of batch norm that fit the pictures
            model(images)
        model.eval()
        model.classifier.weight.normal_(std=0.5)
        model.classifier.bias -= model(images).mean(0)
    return model.state_dict()


def checkpoint(path, classes, seed=0, names=True, **metadata):
    """Write best_raw-like safetensors; without names a plain file of weights."""
    weights = {k: v.contiguous() for k, v in weights_of(len(classes), seed).items()}
    known = {"model": "test_efficientnet", "num_classes": len(classes), "classes": list(classes), **metadata}
    save_file(weights, path, {"retoken": json.dumps(known)} if names else None)
    return path


SMALL = "DEVICE cpu MODEL.NAME test_efficientnet DATA.IMG_SIZE 32 DATA.EVAL_RESIZE 36 DATA.WORKERS 0 EVAL.BATCH 4"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    path = tmp_path_factory.mktemp("cfg") / "eval.yaml"
    path.write_text("TRAIN: {AMP: 'off'}\nEVAL: {BATCH: 4}\n")
    return path


def argv_of(base, *more):
    more = [str(part) for part in more]
    where = more.index("--opts") if "--opts" in more else len(more)
    return ["--cfg", str(base), *more[:where], "--opts", *SMALL.split()[:-2], *more[where + 1 :]]


def run(base, capsys, *more):
    assert eval_script.main(argv_of(base, *more)) == 0
    return capsys.readouterr().out


def fails(base, capsys, *more):
    with pytest.raises(SystemExit) as caught:
        eval_script.main(argv_of(base, *more))
    assert caught.value.code == 2
    return capsys.readouterr().err


def table(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


TWELVE = [f"class{n}" for n in range(12)]


@pytest.fixture(scope="module")
def twelve(tmp_path_factory):
    """Number folders 0 .. 11 in the form of ImageNet-V2, and a checkpoint of twelve classes."""
    root = tmp_path_factory.mktemp("twelve")
    draw(root / "v2", {str(n): 1 + n % 3 + (n == 0) for n in range(12)})
    return root / "v2", checkpoint(root / "w.safetensors", TWELVE)


def answers_by_hand(path, images, flip=False, size=32, resize=36):
    """Return the logits of image files, computed without the loader."""
    from safetensors.torch import load_file

    weights = load_file(path)
    model = timm.create_model("test_efficientnet", num_classes=len(weights["classifier.bias"]))
    model.load_state_dict(weights)
    model.eval()
    transform, rows = EvalTransform(size, resize), []
    mean, std = (torch.tensor(cfg_of().DATA[key]).view(3, 1, 1) for key in ("MEAN", "STD"))
    for image in images:
        x = ((transform(tensor(Image.open(image))) / 255 - mean) / std)[None]
        with torch.inference_mode():
            rows.append((model(x) + model(x.flip(-1))) / 2 if flip else model(x))
    return torch.cat(rows)


@pytest.mark.parametrize("flip", [False, True])
def test_number_folders_are_evaluated_by_number(base, twelve, tmp_path, capsys, flip):
    folder, path = twelve
    rows_to, classes_to = tmp_path / "p.csv", tmp_path / "c.csv"
    more = ("--opts", "EVAL.FLIP", "true") if flip else ()
    argv = ("--checkpoint", path, "--val-path", folder, "--predictions", rows_to, "--per-class", classes_to, *more)
    out = run(base, capsys, *argv)
    files = [f for n in range(12) for f in sorted((folder / str(n)).iterdir())]
    labels = torch.tensor([int(f.parent.name) for f in files])
    logits = answers_by_hand(path, files, flip)
    correct = logits.argmax(1) == labels
    assert len(set(logits.argmax(1).tolist())) > 3  # or the test would see nothing
    assert f"({correct.sum()}/25)" in out
    assert "12 folders read as class numbers" in out
    assert "32 px: shorter side to 36 (bicubic), centre crop" in out
    assert ("mean of image and mirror image" if flip else "no flip") in out
    assert "raw weights" in out
    assert "answers among all 12 classes" in out
    rows = table(rows_to)
    assert [r["file"] for r in rows] == [f.relative_to(folder).as_posix() for f in files]
    assert [int(r["label"]) for r in rows] == labels.tolist()
    assert [int(r["correct"]) for r in rows] == correct.int().tolist()
    top = logits.softmax(1).topk(5)
    assert [[int(r[f"class{k + 1}"]) for k in range(5)] for r in rows] == top.indices.tolist()
    found = torch.tensor([[float(r[f"probability{k + 1}"]) for k in range(5)] for r in rows])
    torch.testing.assert_close(found, top.values, rtol=1e-4, atol=1e-6)
    classes = table(classes_to)
    assert [(int(r["class"]), r["name"]) for r in classes] == list(enumerate(TWELVE))
    for r in classes:
        mine = labels == int(r["class"])
        hits = (top.indices == labels[:, None])[mine]
        assert [int(r[k]) for k in ("images", "correct1", "correct5")] == [mine.sum(), hits[:, 0].sum(), hits.sum()]
        assert float(r["top1"]) == pytest.approx(100 * int(r["correct1"]) / int(r["images"]), abs=1e-4)
        assert float(r["top5"]) == pytest.approx(100 * int(r["correct5"]) / int(r["images"]), abs=1e-4)


def test_subset_restricts_the_answers_unless_told_not_to(base, tmp_path, capsys):
    path = checkpoint(tmp_path / "w.safetensors", TWELVE)
    chosen = [2, 3, 7, 8, 9, 11]
    folder = draw(tmp_path / "r", {TWELVE[n]: 3 for n in chosen})
    (folder / "README.txt").write_text("not a class")
    files = sorted(folder.glob("*/*.jpg"), key=lambda f: (TWELVE.index(f.parent.name), f.name))
    labels = torch.tensor([TWELVE.index(f.parent.name) for f in files])
    logits = answers_by_hand(path, files)
    argv = ("--checkpoint", path, "--val-path", folder, "--json")
    out = run(base, capsys, *argv, tmp_path / "a.json")
    assert "answers restricted to 6 of 12 classes" in out
    inside = torch.tensor(chosen)[logits[:, chosen].argmax(1)]
    assert f"top-1 {100 * (inside == labels).float().mean():.3f} ({(inside == labels).sum()}/18)" in out
    assert not torch.equal(inside, logits.argmax(1))  # the restriction changes answers
    out = run(base, capsys, *argv, tmp_path / "b.json", "--all-logits")
    assert "answers among all 12 classes" in out
    assert f"({(logits.argmax(1) == labels).sum()}/18)" in out
    a, b = (json.loads((tmp_path / name).read_text()) for name in ("a.json", "b.json"))
    assert a["protocol"]["answers"] == [TWELVE[n] for n in chosen]
    assert b["protocol"]["answers"] is None
    assert a["results"]["raw"]["loss"] == pytest.approx(
        F.cross_entropy(logits[:, chosen], torch.tensor([chosen.index(y) for y in labels.tolist()])).item(), rel=1e-4
    )
    assert b["results"]["raw"]["loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-4)


def test_model_without_names_has_imagenets(base, tmp_path, capsys):
    path = checkpoint(tmp_path / "w.safetensors", WNIDS, names=False)
    folder = draw(tmp_path / "a", {WNIDS[950]: 2, WNIDS[3]: 2})
    out = run(base, capsys, "--checkpoint", path, "--val-path", folder, "--per-class", tmp_path / "c.csv")
    assert "2 folders named by ImageNet-1k's list" in out
    assert "answers restricted to 2 of 1000 classes" in out
    assert [(r["class"], r["name"]) for r in table(tmp_path / "c.csv")] == [("3", WNIDS[3]), ("950", WNIDS[950])]
    (folder / WNIDS[3]).rename(folder / "n99999999")
    text = fails(base, capsys, "--checkpoint", path, "--val-path", folder)
    assert "'n99999999' (nearest: n" in text


def test_weights_for_other_classes_name_the_keys(base, twelve, tmp_path, capsys):
    path = checkpoint(tmp_path / "w.safetensors", TWELVE, names=False)
    text = fails(base, capsys, "--checkpoint", path, "--val-path", twelve[0])
    assert "of another shape: classifier.weight" in text
    assert "MODEL.NUM_CLASSES, DATA.CLASS_INDEX" in text
    out = run(base, capsys, "--checkpoint", path, "--val-path", twelve[0], "--opts", "MODEL.NUM_CLASSES", 12)
    assert "12 folders named by the checkpoint, which has no names but numbers" in out


def test_wrong_flags_are_messages(base, twelve, tmp_path, capsys):
    folder, path = twelve
    plain = ("--checkpoint", path, "--val-path", folder)
    cases = [
        (("--checkpoint", path, "--val-path", tmp_path / "gone"), ["--val-path", "gone", "is not a folder"]),
        ((*plain, "--data-path", tmp_path), ["--val-path", "--data-path", "give one of them"]),
        (("--checkpoint", path, "--data-path", tmp_path, "--all-logits"), ["--all-logits has no effect without"]),
        ((*plain, "--opts", "DATA.LOADER", "synthetic"), ["--val-path", "DATA.LOADER=synthetic"]),
        ((*plain, "--opts", "MODEL.NUM_CLASSES", 5), ["MODEL.NUM_CLASSES=5", "12 classes"]),
        ((*plain, "--weights", "all"), ["--weights", "'all'", "both"]),
        ((*plain, "--predictons", "p.csv"), ["'--predictons'", "did you mean --predictions"]),
        ((*plain, "--predictions", tmp_path / "p.txt"), ["--predictions", "p.txt", ".csv or .parquet"]),
        ((*plain, "--per-class", tmp_path / "no" / "p.csv"), ["--per-class", "there is no folder"]),
        ((*plain, "--json", tmp_path / "a.csv"), ["--json", "a.csv", ".json"]),
        ((*plain, "--per-class", "p.csv", "--predictions", "p.csv"), ["--per-class and --predictions name the same"]),
        ((*plain, "--real-labels", tmp_path / "real.json"), ["--real-labels", "real.json", "is not a file"]),
        ((*plain, "--weights", "both"), ["--weights both", "holds raw weights only"]),
    ]
    for more, parts in cases:
        text = fails(base, capsys, *more)
        for part in parts:
            assert part in text, text
    (tmp_path / "d.csv").mkdir()
    assert "is a folder" in fails(base, capsys, *plain, "--predictions", tmp_path / "d.csv")
    (tmp_path / "flat").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "flat" / "a.jpg")
    assert "no class folders" in fails(base, capsys, "--checkpoint", path, "--val-path", tmp_path / "flat")


def test_real_accuracy_is_printed_beside_top1(base, tmp_path, capsys):
    classes = [WNIDS[n] for n in (5, 0, 900, 33)]
    path, val = checkpoint(tmp_path / "w.safetensors", classes), tmp_path / "data/val"
    numbers = iter([4, 9, 2, 7, 1, 6, 3, 8])
    for n, name in enumerate(classes):
        (val / name).mkdir(parents=True)
        for i in range(2):
            picture(np.random.RandomState([n, i]), 40, 50).save(val / name / f"ILSVRC2012_val_{next(numbers):08d}.JPEG")
    (tmp_path / "index.txt").write_text("\n".join(classes))
    files = [f for name in classes for f in sorted((val / name).iterdir())]
    answers = answers_by_hand(path, files).argmax(1).tolist()
    entries = [[0] for _ in range(9)]
    wanted = {0: True, 3: True, 6: False, 7: None}  # by place: right, right, wrong, no label
    for place, right in wanted.items():
        number = [5, 0, 900, 33][answers[place] if right else (answers[place] + 1) % 4]
        entries[int(files[place].stem[-8:]) - 1] = [number, 999] if right is not None else []
    hits = sum([5, 0, 900, 33][a] in entries[int(f.stem[-8:]) - 1] for a, f in zip(answers, files, strict=True))
    (tmp_path / "real.json").write_text(json.dumps(entries))
    argv = ("--checkpoint", path, "--data-path", tmp_path / "data", "--real-labels", tmp_path / "real.json")
    argv = (*argv, "--json", tmp_path / "r.json", "--opts", "DATA.CLASS_INDEX", tmp_path / "index.txt")
    out = run(base, capsys, *argv)
    assert f"ReaL top-1 {100 * hits / 7:.3f} ({hits}/7)" in out
    real = json.loads((tmp_path / "r.json").read_text())["results"]["raw"]["real"]
    assert (real["correct1"], real["images"], real["top1"]) == (hits, 7, pytest.approx(100 * hits / 7))


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """A checkpoint of a run, with raw and EMA weights, of three classes."""
    path = tmp_path_factory.mktemp("both") / "update-00000001.pt"
    metadata = {"model": "test_efficientnet", "num_classes": 3, "classes": ["blue", "green", "red"], "seed": 4}
    torch.save({"format": 1, "model": weights_of(3, 0), "ema": weights_of(3, 1), "facts": metadata}, path)
    return path


def test_both_weights_are_evaluated(base, both, pictures, tmp_path, capsys):
    argv = ("--checkpoint", both, "--data-path", pictures)
    lines = {}
    for which in ("raw", "ema"):
        out = run(base, capsys, *argv, "--weights", which)
        lines[which] = next(line for line in out.splitlines() if "top-1" in line)
    files = ("--json", tmp_path / "b.json", "--per-class", tmp_path / "c.csv", "--predictions", tmp_path / "p.csv")
    out = run(base, capsys, *argv, "--weights", "both", *files)
    found = [line for line in out.splitlines() if "top-1" in line]
    assert [line.split()[1] for line in found] == ["raw", "ema"]
    for line, which in zip(found, ("raw", "ema"), strict=True):
        assert f"{which} weights" in line
        assert line.split()[2:10] == lines[which].split()[2:10]
    assert lines["raw"].split()[2:10] != lines["ema"].split()[2:10]
    assert {p.name for p in tmp_path.iterdir()} == {"b.json", "c_raw.csv", "c_ema.csv", "p_raw.csv", "p_ema.csv"}
    report = json.loads((tmp_path / "b.json").read_text())
    for which in ("raw", "ema"):
        rows, result = table(tmp_path / f"p_{which}.csv"), report["results"][which]
        assert sum(int(r["correct"]) for r in rows) == result["correct1"]
        classes = table(tmp_path / f"c_{which}.csv")
        assert sum(int(r["correct1"]) for r in classes) == result["correct1"]
        assert sum(int(r["images"]) for r in classes) == result["images"] == 15
        assert result["top1"] == pytest.approx(100 * result["correct1"] / 15)
    assert report["facts"]["seed"] == 4
    assert report["facts"]["classes"] == ["blue", "green", "red"]
    assert report["checkpoint"] == str(both)
    protocol = report["protocol"]
    assert (protocol["crop"], protocol["resize"], protocol["mode"], protocol["flip"]) == (32, 36, "center", False)


def test_default_is_the_raw_weights(base, both, pictures, capsys):
    argv = ("--checkpoint", both, "--data-path", pictures)
    strip = [
        line.split()[1:10]
        for out in (run(base, capsys, *argv), run(base, capsys, *argv, "--weights", "raw"))
        for line in out.splitlines()
        if "top-1" in line
    ]
    assert strip[0] == strip[1]


def test_both_weights_of_a_run_without_ema_are_refused(base, pictures, tmp_path, capsys):
    path = tmp_path / "update-00000001.pt"
    torch.save({"format": 1, "model": weights_of(3, 0), "ema": None, "facts": {"num_classes": 3}}, path)
    text = fails(base, capsys, "--checkpoint", path, "--data-path", pictures, "--weights", "both")
    assert "holds raw weights only" in text
    assert "EMA.DECAY" in text


@pytest.mark.slow
def test_predictions_of_two_processes_equal_those_of_one(base, twelve, tmp_path, capsys, run_script):
    folder, path = twelve

    def argv(name):
        files = ("--predictions", tmp_path / f"p{name}.csv", "--per-class", tmp_path / f"c{name}.csv")
        return ("--checkpoint", path, "--val-path", folder, *files)

    run(base, capsys, *argv("one"))
    run_script("eval.py", *argv_of(base, *argv("two")), processes=2)
    assert table(tmp_path / "cone.csv") == table(tmp_path / "ctwo.csv")
    rows, more = table(tmp_path / "pone.csv"), table(tmp_path / "ptwo.csv")
    assert len(rows) == len(more) == 25  # which two cannot share evenly
    for a, b in zip(rows, more, strict=True):
        assert all(a[key] == b[key] for key in a if not key.startswith("probability"))
        for key in (key for key in a if key.startswith("probability")):
            assert float(a[key]) == pytest.approx(float(b[key]), rel=1e-4)


def test_parquet_reads_back(base, twelve, tmp_path, capsys):
    parquet = pytest.importorskip("pyarrow.parquet")
    folder, path = twelve
    argv = ("--checkpoint", path, "--val-path", folder, "--predictions")
    run(base, capsys, *argv, tmp_path / "p.parquet")
    run(base, capsys, *argv, tmp_path / "p.csv")
    rows, wanted = parquet.read_table(tmp_path / "p.parquet").to_pylist(), table(tmp_path / "p.csv")
    assert [list(row) for row in rows] == [list(row) for row in wanted]
    assert [str(row["label"]) + row["file"] for row in rows] == [row["label"] + row["file"] for row in wanted]
    assert [row["probability1"] for row in rows] == pytest.approx([float(row["probability1"]) for row in wanted])
    write_table(tmp_path / "odd.parquet", {"file": ["a\udcff.jpg"]})
    assert parquet.read_table(tmp_path / "odd.parquet").to_pylist() == [{"file": "a\\xff.jpg"}]


def test_parquet_without_pyarrow_names_the_remedy(base, twelve, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    argv = ("--checkpoint", twelve[1], "--val-path", twelve[0], "--predictions", tmp_path / "p.parquet")
    text = fails(base, capsys, *argv)
    assert "pip install pyarrow" in text
    assert "p.csv" in text
    assert list(tmp_path.iterdir()) == []


def test_training_evaluates_by_the_same_keys(small_cfg, pictures, tmp_path, capsys):
    opts = ["EVAL.FLIP", "true", "EVAL.MODE", "border", "EVAL.CROP_PCT", "0.9", "TRAIN.EPOCHS", "1"]
    argv = ["--cfg", str(small_cfg), "--output", str(tmp_path), "--opts", *opts]
    assert train_script.main(argv) == 0
    row = json.loads((tmp_path / "small/metrics.jsonl").read_text().splitlines()[-1])
    argv = ["--cfg", str(small_cfg), "--checkpoint", str(tmp_path / "small/best_ema.safetensors"), "--opts", *opts]
    capsys.readouterr()
    assert eval_script.main(argv) == 0
    assert f"loss {row['loss']:.4f}" in capsys.readouterr().out
    assert eval_script.main([*argv, "EVAL.FLIP", "false"]) == 0
    assert f"loss {row['loss']:.4f}" not in capsys.readouterr().out
    cfg = config.load(str(small_cfg), opts)
    data = build_data(cfg, 0, 1, "cpu")
    assert data.val._loader.dataset.transform == build_eval_data(cfg, 0, 1, "cpu").transform
    assert data.val._loader.dataset.transform.mode == "border"


def test_plain_folder_is_evaluated_as_before_and_says_what_it_misses(base, tmp_path, capsys):
    path = checkpoint(tmp_path / "w.safetensors", ["a", "b", "c"])
    draw(tmp_path / "data/train", {"a": 1, "b": 1, "c": 1})
    draw(tmp_path / "data/val", {"a": 2, "c": 2})
    out = run(base, capsys, "--checkpoint", path, "--data-path", tmp_path / "data")
    assert "has images of 2 of the 3 classes" in out
    assert "answers among all 3 classes" in out


def test_synthetic_images_are_evaluated_and_listed(base, both, tmp_path, capsys):
    more = ("DATA.LOADER", "synthetic", "DATA.SYNTHETIC_CLASSES", 3, "DATA.SYNTHETIC_VAL", 10)
    out = run(base, capsys, "--checkpoint", both, "--predictions", tmp_path / "p.csv", "--opts", *more)
    assert "10 images of synthetic images" in out
    assert [r["file"] for r in table(tmp_path / "p.csv")] == [str(n) for n in range(10)]


def test_folded_evaluation_counts_what_the_plain_one_does(base, twelve, tmp_path, capsys):
    folder, _ = twelve
    torch.manual_seed(0)
    model = scrambled(timm.create_model("groupmixformer_mobile", num_classes=12))
    known = {"model": "groupmixformer_mobile", "num_classes": 12, "classes": TWELVE}
    path = tmp_path / "w.safetensors"
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, path, {"retoken": json.dumps(known)})
    results = {}
    for flags in ((), ("--fold",)):
        argv = ("--checkpoint", path, "--val-path", folder, *flags, "--json", tmp_path / "r.json")
        out = run(base, capsys, *argv, "--opts", "MODEL.NAME", "groupmixformer_mobile")
        results[flags] = json.loads((tmp_path / "r.json").read_text())
        assert (", folded" in out) == bool(flags)
        assert results[flags]["protocol"]["folded"] == bool(flags)
    plain, folded = (found["results"]["raw"] for found in results.values())
    assert folded["loss"] == pytest.approx(plain["loss"], rel=1e-3)
    assert folded["loss"] != plain["loss"]
    assert (folded["correct1"], folded["images"]) == (plain["correct1"], plain["images"])


def test_folding_a_model_of_timm_is_refused(base, twelve, capsys):
    folder, path = twelve
    err = fails(base, capsys, "--checkpoint", path, "--val-path", folder, "--fold")
    assert "--fold knows SG-Former, GroupMixFormer and STViT, not MODEL.NAME=test_efficientnet; leave it out" in err
