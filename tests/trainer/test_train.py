"""Training as a user runs train.py: its files, and its messages for wrong input."""

import json

import pytest
import torch

from engine.checkpoint.files import load_state
from tests.conftest import draw_folder
from tests.helpers.bounds import CONDITIONED, DEPTH, TERMS, ulps
from tests.helpers.small_runs import LAST, assert_same_state, fails, rows, train


def test_run_directory_holds_the_documented_files(uninterrupted):
    names = {p.name for p in uninterrupted.iterdir()}
    assert names == {
        "config.yaml",
        "manifest.json",
        "log.txt",
        "metrics.jsonl",
        "checkpoints",
        "best_raw.safetensors",
        "best_ema.safetensors",
        "pictures",
        "done",
    }
    assert sorted(p.name for p in (uninterrupted / "checkpoints").iterdir()) == [
        "update-00000012.pt",
        "update-00000018.pt",
    ]
    manifest = json.loads((uninterrupted / "manifest.json").read_text())
    assert manifest["classes"] == ["blue", "green", "red"]
    assert manifest["starts"][0]["packages"]["torch"] == torch.__version__.split("+")[0]
    evals = [r for r in rows(uninterrupted) if r["kind"] == "eval"]
    assert [(r["epoch"], r["weights"]) for r in evals] == [(e, w) for e in range(3) for w in ("raw", "ema")]
    assert {r["images"] for r in evals} == {15}
    assert [r["update"] for r in rows(uninterrupted) if r["kind"] == "train"] == [4, 6, 10, 12, 16, 18]


@pytest.mark.slow
def test_training_learns(small_cfg, tmp_path):
    easy = ("AUG.RAND_AUGMENT", "", "AUG.MIX_PROB", 0, "AUG.ERASE_PROB", 0, "AUG.SCALE", "[0.5, 1]", "EMA.DECAY", 0)
    assert train(small_cfg, tmp_path, "--opts", "TRAIN.EPOCHS", 8, "EVAL.EVERY", 4, *easy) == 0
    assert max(r["top1"] for r in rows(tmp_path / "small") if r["kind"] == "eval") > 80


@pytest.mark.slow
def test_batch_norm_on_two_processes_gives_the_weights_of_one(small_cfg, tmp_path, run_script):
    base = ["train.py", "--cfg", str(small_cfg), "--opts", "TRAIN.EPOCHS", "2", *CONDITIONED]
    run_script(*base, "--output", str(tmp_path / "one"))
    run_script(*base, "--output", str(tmp_path / "two"), processes=2)
    name = "small/checkpoints/update-00000012.pt"
    assert_same_state(tmp_path / "one" / name, tmp_path / "two" / name, exact=False)
    one, two = (rows(tmp_path / n / "small") for n in ("one", "two"))
    assert [r.keys() for r in one] == [r.keys() for r in two]
    for a, b in zip(one, two, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=DEPTH * ulps(TERMS))


@pytest.mark.parametrize(
    ("more", "parts"),
    [
        (("--data-path", "nowhere"), ["nowhere"]),
        (("--opts", "MODEL.NUM_CLASSES", 5), ["5", "3"]),
        (("--opts", "MODEL.NAME", "groupmixformer_tinny"), ["groupmixformer_tinny", "groupmixformer_tiny"]),
        (("--opts", "TRAIN.GLOBAL_BATCH", 512), ["512", "48"]),
        (("--init", "nothing.pt"), ["nothing.pt"]),
        (("--resume", "nothing.pt"), ["nothing.pt"]),
    ],
)
def test_wrong_input_is_a_message_not_a_traceback(small_cfg, tmp_path, capsys, more, parts):
    text = fails(lambda: train(small_cfg, tmp_path, *more), capsys)
    for part in parts:
        assert part in text, text
    assert not (tmp_path / "small").exists()


def test_unreadable_image_stops_with_its_name(small_cfg, tmp_path, capsys):
    draw_folder(tmp_path / "data", 8, 2)
    (tmp_path / "data/val/red/000.jpg").write_bytes(b"<html>")
    text = fails(lambda: train(small_cfg, tmp_path, "--data-path", tmp_path / "data"), capsys, status=1)
    assert "stopped" in text
    assert "red/000.jpg" in text


def test_epoch_before_an_evaluation_that_fails_is_kept(small_cfg, tmp_path, capsys):
    draw_folder(tmp_path / "data", 16, 5)
    argv = ("--data-path", tmp_path / "data")
    assert train(small_cfg, tmp_path / "whole", *argv) == 0
    picture = tmp_path / "data/val/red/000.jpg"
    good = picture.read_bytes()
    picture.write_bytes(b"<html>")
    assert "red/000.jpg" in fails(lambda: train(small_cfg, tmp_path / "parts", *argv), capsys, status=1)
    (stored,) = (tmp_path / "parts/small/checkpoints").iterdir()
    assert [load_state(stored)[key] for key in ("update", "closed")] == [6, 0]
    picture.write_bytes(good)
    assert train(small_cfg, tmp_path / "parts", *argv) == 0
    assert "update 6 of 18" in capsys.readouterr().out
    assert_same_state(tmp_path / "whole/small" / LAST, tmp_path / "parts/small" / LAST)
    assert rows(tmp_path / "whole/small") == rows(tmp_path / "parts/small")
