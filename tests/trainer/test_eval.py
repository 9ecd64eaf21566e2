"""Evaluation of a run's weights by eval.py and train.py --eval, and its messages for weights that do not fit."""

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from engine.checkpoint.files import load_state
from tests.conftest import draw_folder
from tests.helpers.small_runs import LAST, evaluate, fails, rows, train


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2, 3])
def test_eval_counts_every_image_once_on_any_number_of_processes(small_cfg, uninterrupted, run_script, processes):
    best = load_state(uninterrupted / LAST)["best"]["raw"]
    argv = ("eval.py", "--cfg", str(small_cfg), "--checkpoint", str(uninterrupted / "best_raw.safetensors"))
    out = run_script(*argv, processes=processes).stdout
    assert f"({best['correct1']}/15)" in out
    assert "15 images" in out


@pytest.mark.parametrize("which", ["raw", "ema"])
def test_eval_of_the_saved_best_gives_the_same_number(small_cfg, uninterrupted, capsys, which):
    best = load_state(uninterrupted / LAST)["best"][which]
    assert evaluate(small_cfg, uninterrupted / f"best_{which}.safetensors") == 0
    out = capsys.readouterr().out
    assert f"top-1 {best['top1']:.3f} ({best['correct1']}/15)" in out
    assert f"loss {best['loss']:.4f}" in out
    assert evaluate(small_cfg, uninterrupted / LAST, "--weights", which) == 0
    last = [r for r in rows(uninterrupted) if r["kind"] == "eval" and r["weights"] == which][-1]
    assert f"({last['correct1']}/15)" in capsys.readouterr().out


def test_train_eval_flag_evaluates_and_writes_nothing(small_cfg, uninterrupted, capsys):
    before = {p: p.stat().st_mtime_ns for p in uninterrupted.rglob("*")}
    assert train(small_cfg, uninterrupted.parent, "--eval") == 0
    assert capsys.readouterr().out.count("top-1") == 2
    assert {p: p.stat().st_mtime_ns for p in uninterrupted.rglob("*")} == before


def test_eval_refuses_what_does_not_fit(small_cfg, uninterrupted, tmp_path, capsys):
    best = uninterrupted / "best_raw.safetensors"
    assert "best_raw.safetensors" in fails(lambda: evaluate(small_cfg, uninterrupted / "best.safetensors"), capsys)
    weights = load_file(best)
    name = next(key for key in weights if key.endswith("weight"))
    save_file({k: v for k, v in weights.items() if k != name} | {"extra": torch.zeros(1)}, tmp_path / "a.safetensors")
    text = fails(lambda: evaluate(small_cfg, tmp_path / "a.safetensors"), capsys)
    assert f"1 missing: {name}" in text
    assert "1 unexpected: extra" in text
    wrong = ("--opts", "DATA.LOADER", "synthetic", "DATA.SYNTHETIC_CLASSES", 7)
    text = fails(lambda: evaluate(small_cfg, best, *wrong), capsys)
    assert "3 classes" in text
    assert "7" in text
    other = ("--opts", "MODEL.NAME", "groupmixformer_tiny")
    assert "test_efficientnet" in fails(lambda: evaluate(small_cfg, best, *other), capsys)


def test_eval_flag_without_a_checkpoint_is_refused(small_cfg, tmp_path, capsys):
    assert "holds no checkpoint" in fails(lambda: train(small_cfg, tmp_path, "--eval"), capsys)


@pytest.mark.slow
def test_failure_of_one_process_names_that_process(small_cfg, tmp_path, run_script):
    draw_folder(tmp_path / "data", 8, 2)
    (tmp_path / "data/val/blue/001.jpg").write_bytes(b"<html>")  # the second process's first image
    argv = (
        "eval.py",
        "--cfg",
        str(small_cfg),
        "--data-path",
        str(tmp_path / "data"),
        "--checkpoint",
        str(tmp_path / "w.pt"),
    )
    torch.save(timm.create_model("test_efficientnet", num_classes=3).state_dict(), tmp_path / "w.pt")
    done = run_script(*argv, processes=2, check=False)
    assert done.returncode != 0
    assert "process 1: " in done.stderr
    assert "blue/001.jpg" in done.stderr


def test_eval_refuses_weights_the_file_does_not_hold(small_cfg, uninterrupted, capsys):
    text = fails(lambda: evaluate(small_cfg, uninterrupted / "best_raw.safetensors", "--weights", "ema"), capsys)
    assert "holds raw weights, ema were asked for" in text


def test_eval_flag_takes_the_named_file(small_cfg, uninterrupted, capsys):
    first = next(r for r in rows(uninterrupted) if r["kind"] == "eval" and r["epoch"] == 1 and r["weights"] == "ema")
    assert (
        train(small_cfg, uninterrupted.parent, "--eval", "--resume", uninterrupted / "checkpoints/update-00000012.pt")
        == 0
    )
    out = capsys.readouterr().out
    assert "at update 12 of 18" in out
    assert f"loss {first['loss']:.4f}" in out
