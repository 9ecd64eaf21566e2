"""Outputs of eval.py: raw and EMA weights, tables, JSON, and its messages for wrong flags."""

import json
import sys

import pytest
import torch
from PIL import Image

from engine.result_files import write_table
from tests.helpers.evaluations import argv_of, eval_fails, run_eval, table, weights_of


def test_both_weights_are_evaluated(eval_cfg, both_weights, pictures, tmp_path, capsys):
    argv = ("--checkpoint", both_weights, "--data-path", pictures)
    lines = {}
    for which in ("raw", "ema"):
        out = run_eval(eval_cfg, capsys, *argv, "--weights", which)
        lines[which] = next(line for line in out.splitlines() if "top-1" in line)
    files = ("--json", tmp_path / "b.json", "--per-class", tmp_path / "c.csv", "--predictions", tmp_path / "p.csv")
    out = run_eval(eval_cfg, capsys, *argv, "--weights", "both", *files)
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
    assert report["checkpoint"] == str(both_weights)
    protocol = report["protocol"]
    assert (protocol["crop"], protocol["resize"], protocol["mode"], protocol["flip"]) == (32, 36, "center", False)


def test_default_is_the_raw_weights(eval_cfg, both_weights, pictures, capsys):
    argv = ("--checkpoint", both_weights, "--data-path", pictures)
    strip = [
        line.split()[1:10]
        for out in (run_eval(eval_cfg, capsys, *argv), run_eval(eval_cfg, capsys, *argv, "--weights", "raw"))
        for line in out.splitlines()
        if "top-1" in line
    ]
    assert strip[0] == strip[1]


def test_both_weights_of_a_run_without_ema_are_refused(eval_cfg, pictures, tmp_path, capsys):
    path = tmp_path / "update-00000001.pt"
    torch.save({"format": 1, "model": weights_of(3, 0), "ema": None, "facts": {"num_classes": 3}}, path)
    text = eval_fails(eval_cfg, capsys, "--checkpoint", path, "--data-path", pictures, "--weights", "both")
    assert "holds raw weights only" in text
    assert "EMA.DECAY" in text


@pytest.mark.slow
def test_predictions_of_two_processes_equal_those_of_one(eval_cfg, twelve_classes, tmp_path, capsys, run_script):
    folder, path = twelve_classes

    def argv(name):
        files = ("--predictions", tmp_path / f"p{name}.csv", "--per-class", tmp_path / f"c{name}.csv")
        return ("--checkpoint", path, "--val-path", folder, *files)

    run_eval(eval_cfg, capsys, *argv("one"))
    run_script("eval.py", *argv_of(eval_cfg, *argv("two")), processes=2)
    assert table(tmp_path / "cone.csv") == table(tmp_path / "ctwo.csv")
    rows, more = table(tmp_path / "pone.csv"), table(tmp_path / "ptwo.csv")
    assert len(rows) == len(more) == 25  # which two cannot share evenly
    for a, b in zip(rows, more, strict=True):
        assert all(a[key] == b[key] for key in a if not key.startswith("probability"))
        for key in (key for key in a if key.startswith("probability")):
            assert float(a[key]) == pytest.approx(float(b[key]), rel=1e-4)


def test_parquet_reads_back(eval_cfg, twelve_classes, tmp_path, capsys):
    parquet = pytest.importorskip("pyarrow.parquet")
    folder, path = twelve_classes
    argv = ("--checkpoint", path, "--val-path", folder, "--predictions")
    run_eval(eval_cfg, capsys, *argv, tmp_path / "p.parquet")
    run_eval(eval_cfg, capsys, *argv, tmp_path / "p.csv")
    rows, wanted = parquet.read_table(tmp_path / "p.parquet").to_pylist(), table(tmp_path / "p.csv")
    assert [list(row) for row in rows] == [list(row) for row in wanted]
    assert [str(row["label"]) + row["file"] for row in rows] == [row["label"] + row["file"] for row in wanted]
    assert [row["probability1"] for row in rows] == pytest.approx([float(row["probability1"]) for row in wanted])
    write_table(tmp_path / "odd.parquet", {"file": ["a\udcff.jpg"]})
    assert parquet.read_table(tmp_path / "odd.parquet").to_pylist() == [{"file": "a\\xff.jpg"}]


def test_parquet_without_pyarrow_names_the_remedy(eval_cfg, twelve_classes, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    argv = ("--checkpoint", twelve_classes[1], "--val-path", twelve_classes[0], "--predictions", tmp_path / "p.parquet")
    text = eval_fails(eval_cfg, capsys, *argv)
    assert "pip install pyarrow" in text
    assert "p.csv" in text
    assert list(tmp_path.iterdir()) == []


def test_synthetic_images_are_evaluated_and_listed(eval_cfg, both_weights, tmp_path, capsys):
    more = ("DATA.LOADER", "synthetic", "DATA.SYNTHETIC_CLASSES", 3, "DATA.SYNTHETIC_VAL", 10)
    out = run_eval(eval_cfg, capsys, "--checkpoint", both_weights, "--predictions", tmp_path / "p.csv", "--opts", *more)
    assert "10 images of synthetic images" in out
    assert [r["file"] for r in table(tmp_path / "p.csv")] == [str(n) for n in range(10)]


def test_wrong_flags_are_messages(eval_cfg, twelve_classes, tmp_path, capsys):
    folder, path = twelve_classes
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
        text = eval_fails(eval_cfg, capsys, *more)
        for part in parts:
            assert part in text, text
    (tmp_path / "d.csv").mkdir()
    assert "is a folder" in eval_fails(eval_cfg, capsys, *plain, "--predictions", tmp_path / "d.csv")
    (tmp_path / "flat").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "flat" / "a.jpg")
    assert "no class folders" in eval_fails(eval_cfg, capsys, "--checkpoint", path, "--val-path", tmp_path / "flat")
