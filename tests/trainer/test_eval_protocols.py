"""Protocols of eval.py: flip, folders of other data sets, restricted answers, ReaL labels, folding."""

import json

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

import config
import eval as eval_script
import train as train_script
from data.build import build_data, build_eval_data
from tests.helpers.data_doubles import picture
from tests.helpers.evaluations import TWELVE, WNIDS, checkpoint, draw, eval_fails, logits_by_hand, run_eval, table
from tests.helpers.small_models import scrambled


@pytest.mark.parametrize("flip", [False, True])
def test_number_folders_are_evaluated_by_number(eval_cfg, twelve_classes, tmp_path, capsys, flip):
    folder, path = twelve_classes
    rows_to, classes_to = tmp_path / "p.csv", tmp_path / "c.csv"
    more = ("--opts", "EVAL.FLIP", "true") if flip else ()
    argv = ("--checkpoint", path, "--val-path", folder, "--predictions", rows_to, "--per-class", classes_to, *more)
    out = run_eval(eval_cfg, capsys, *argv)
    files = [f for n in range(12) for f in sorted((folder / str(n)).iterdir())]
    labels = torch.tensor([int(f.parent.name) for f in files])
    logits = logits_by_hand(path, files, flip)
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


def test_subset_restricts_the_answers_without_all_logits(eval_cfg, tmp_path, capsys):
    path = checkpoint(tmp_path / "w.safetensors", TWELVE)
    chosen = [2, 3, 7, 8, 9, 11]
    folder = draw(tmp_path / "r", {TWELVE[n]: 3 for n in chosen})
    (folder / "README.txt").write_text("not a class")
    files = sorted(folder.glob("*/*.jpg"), key=lambda f: (TWELVE.index(f.parent.name), f.name))
    labels = torch.tensor([TWELVE.index(f.parent.name) for f in files])
    logits = logits_by_hand(path, files)
    argv = ("--checkpoint", path, "--val-path", folder, "--json")
    out = run_eval(eval_cfg, capsys, *argv, tmp_path / "a.json")
    assert "answers restricted to 6 of 12 classes" in out
    inside = torch.tensor(chosen)[logits[:, chosen].argmax(1)]
    assert f"top-1 {100 * (inside == labels).float().mean():.3f} ({(inside == labels).sum()}/18)" in out
    assert not torch.equal(inside, logits.argmax(1))  # the restriction changes answers
    out = run_eval(eval_cfg, capsys, *argv, tmp_path / "b.json", "--all-logits")
    assert "answers among all 12 classes" in out
    assert f"({(logits.argmax(1) == labels).sum()}/18)" in out
    a, b = (json.loads((tmp_path / name).read_text()) for name in ("a.json", "b.json"))
    assert a["protocol"]["answers"] == [TWELVE[n] for n in chosen]
    assert b["protocol"]["answers"] is None
    assert a["results"]["raw"]["loss"] == pytest.approx(
        F.cross_entropy(logits[:, chosen], torch.tensor([chosen.index(y) for y in labels.tolist()])).item(), rel=1e-4
    )
    assert b["results"]["raw"]["loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-4)


def test_model_without_class_names_uses_those_of_imagenet(eval_cfg, tmp_path, capsys):
    path = checkpoint(tmp_path / "w.safetensors", WNIDS, names=False)
    folder = draw(tmp_path / "a", {WNIDS[950]: 2, WNIDS[3]: 2})
    out = run_eval(eval_cfg, capsys, "--checkpoint", path, "--val-path", folder, "--per-class", tmp_path / "c.csv")
    assert "2 folders named by ImageNet-1k's list" in out
    assert "answers restricted to 2 of 1000 classes" in out
    assert [(r["class"], r["name"]) for r in table(tmp_path / "c.csv")] == [("3", WNIDS[3]), ("950", WNIDS[950])]
    (folder / WNIDS[3]).rename(folder / "n99999999")
    text = eval_fails(eval_cfg, capsys, "--checkpoint", path, "--val-path", folder)
    assert "'n99999999' (nearest: n" in text


def test_weights_for_other_classes_name_the_keys(eval_cfg, twelve_classes, tmp_path, capsys):
    path = checkpoint(tmp_path / "w.safetensors", TWELVE, names=False)
    text = eval_fails(eval_cfg, capsys, "--checkpoint", path, "--val-path", twelve_classes[0])
    assert "of another shape: classifier.weight" in text
    assert "MODEL.NUM_CLASSES, DATA.CLASS_INDEX" in text
    out = run_eval(
        eval_cfg, capsys, "--checkpoint", path, "--val-path", twelve_classes[0], "--opts", "MODEL.NUM_CLASSES", 12
    )
    assert "12 folders named by the checkpoint, which has no names but numbers" in out


def test_real_accuracy_is_printed_beside_top1(eval_cfg, tmp_path, capsys):
    classes = [WNIDS[n] for n in (5, 0, 900, 33)]
    path, val = checkpoint(tmp_path / "w.safetensors", classes), tmp_path / "data/val"
    numbers = iter([4, 9, 2, 7, 1, 6, 3, 8])
    for n, name in enumerate(classes):
        (val / name).mkdir(parents=True)
        for i in range(2):
            picture(np.random.RandomState([n, i]), 40, 50).save(val / name / f"ILSVRC2012_val_{next(numbers):08d}.JPEG")
    (tmp_path / "index.txt").write_text("\n".join(classes))
    files = [f for name in classes for f in sorted((val / name).iterdir())]
    answers = logits_by_hand(path, files).argmax(1).tolist()
    entries = [[0] for _ in range(9)]
    wanted = {0: True, 3: True, 6: False, 7: None}  # by place: right, right, wrong, no label
    for place, right in wanted.items():
        number = [5, 0, 900, 33][answers[place] if right else (answers[place] + 1) % 4]
        entries[int(files[place].stem[-8:]) - 1] = [number, 999] if right is not None else []
    hits = sum([5, 0, 900, 33][a] in entries[int(f.stem[-8:]) - 1] for a, f in zip(answers, files, strict=True))
    (tmp_path / "real.json").write_text(json.dumps(entries))
    argv = ("--checkpoint", path, "--data-path", tmp_path / "data", "--real-labels", tmp_path / "real.json")
    argv = (*argv, "--json", tmp_path / "r.json", "--opts", "DATA.CLASS_INDEX", tmp_path / "index.txt")
    out = run_eval(eval_cfg, capsys, *argv)
    assert f"ReaL top-1 {100 * hits / 7:.3f} ({hits}/7)" in out
    real = json.loads((tmp_path / "r.json").read_text())["results"]["raw"]["real"]
    assert (real["correct1"], real["images"], real["top1"]) == (hits, 7, pytest.approx(100 * hits / 7))


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


def test_folder_with_some_classes_is_evaluated_with_a_note(eval_cfg, tmp_path, capsys):
    path = checkpoint(tmp_path / "w.safetensors", ["a", "b", "c"])
    draw(tmp_path / "data/train", {"a": 1, "b": 1, "c": 1})
    draw(tmp_path / "data/val", {"a": 2, "c": 2})
    out = run_eval(eval_cfg, capsys, "--checkpoint", path, "--data-path", tmp_path / "data")
    assert "has images of 2 of the 3 classes" in out
    assert "answers among all 3 classes" in out


def test_folded_evaluation_gives_the_same_counts(eval_cfg, twelve_classes, tmp_path, capsys):
    folder, _ = twelve_classes
    torch.manual_seed(0)
    model = scrambled(timm.create_model("groupmixformer_mobile", num_classes=12))
    known = {"model": "groupmixformer_mobile", "num_classes": 12, "classes": TWELVE}
    path = tmp_path / "w.safetensors"
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, path, {"retoken": json.dumps(known)})
    results = {}
    for flags in ((), ("--fold",)):
        argv = ("--checkpoint", path, "--val-path", folder, *flags, "--json", tmp_path / "r.json")
        out = run_eval(eval_cfg, capsys, *argv, "--opts", "MODEL.NAME", "groupmixformer_mobile")
        results[flags] = json.loads((tmp_path / "r.json").read_text())
        assert (", folded" in out) == bool(flags)
        assert results[flags]["protocol"]["folded"] == bool(flags)
    plain, folded = (found["results"]["raw"] for found in results.values())
    assert folded["loss"] == pytest.approx(plain["loss"], rel=1e-3)
    assert folded["loss"] != plain["loss"]
    assert (folded["correct1"], folded["images"]) == (plain["correct1"], plain["images"])


def test_folding_a_model_of_timm_is_refused(eval_cfg, twelve_classes, capsys):
    folder, path = twelve_classes
    err = eval_fails(eval_cfg, capsys, "--checkpoint", path, "--val-path", folder, "--fold")
    assert "--fold: the class of MODEL.NAME=test_efficientnet does not declare `foldable`; leave it out" in err
