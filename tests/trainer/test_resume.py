"""Continuing runs: bitwise after interruptions, and refused in other recipes, data or while another process trains."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from engine.checkpoint.files import load_state
from engine.checkpoint.run_directory import RunDirectory
from engine.logging.log import Log
from tests.conftest import ROOT, draw_folder
from tests.helpers.small_runs import LAST, PATIENCE_S, assert_same_state, fails, rows, train


@pytest.mark.parametrize("stop_at", [3, 8])
def test_resume_in_the_middle_is_bitwise_the_uninterrupted_run(
    small_cfg, uninterrupted, tmp_path, monkeypatch, stop_at
):
    def interrupt(self):
        self.updates = getattr(self, "updates", 0) + 1
        if self.updates == stop_at:
            raise KeyboardInterrupt

    often = ("--opts", "CHECKPOINT.EVERY_UPDATES", 2)
    with monkeypatch.context() as patch:
        patch.setattr(Log, "advance", interrupt)
        assert train(small_cfg, tmp_path, *often) == 130
    stopped = load_state(max((tmp_path / "small/checkpoints").iterdir()))
    assert 0 < stopped["update"] < stop_at
    assert train(small_cfg, tmp_path, *often) == 0
    assert_same_state(uninterrupted / LAST, tmp_path / "small" / LAST)
    assert rows(uninterrupted) == rows(tmp_path / "small")
    for which in ("raw", "ema"):
        a, b = (load_file(run / f"best_{which}.safetensors") for run in (uninterrupted, tmp_path / "small"))
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert len(json.loads((tmp_path / "small/manifest.json").read_text())["starts"]) == 2


@pytest.mark.slow
def test_kill_in_the_middle_of_an_epoch_loses_nothing(small_cfg, uninterrupted, tmp_path):
    argv = [sys.executable, "train.py", "--cfg", str(small_cfg), "--output", str(tmp_path)]
    env = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}  # another number may sum in another order
    process = subprocess.Popen(argv, cwd=ROOT, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    metrics = tmp_path / "small/metrics.jsonl"
    deadline = time.monotonic() + PATIENCE_S
    while not (metrics.exists() and '"update": 10,' in metrics.read_text()) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert train(small_cfg, tmp_path) == 0
    assert_same_state(uninterrupted / LAST, tmp_path / "small" / LAST)
    assert rows(uninterrupted) == rows(tmp_path / "small")


def test_complete_run_is_reported_and_not_changed(small_cfg, uninterrupted, capsys):
    before = {p: p.stat().st_mtime_ns for p in uninterrupted.rglob("*")}
    assert train(small_cfg, uninterrupted.parent) == 0
    assert "is complete" in capsys.readouterr().out
    assert {p: p.stat().st_mtime_ns for p in uninterrupted.rglob("*")} == before


def test_second_start_on_a_run_is_refused_while_the_first_lasts(small_cfg, uninterrupted, capsys, monkeypatch):
    monkeypatch.setattr("engine.checkpoint.run_directory.LOCK_ATTEMPTS", 1)
    first = RunDirectory(uninterrupted, 2)
    first.lock()
    assert "another process trains in" in fails(lambda: train(small_cfg, uninterrupted.parent), capsys)
    assert train(small_cfg, uninterrupted.parent, "--eval") == 0
    first.unlock()
    assert train(small_cfg, uninterrupted.parent) == 0


def test_second_start_on_a_new_run_is_refused_before_it_writes(small_cfg, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("engine.checkpoint.run_directory.LOCK_ATTEMPTS", 1)
    first = RunDirectory(tmp_path / "small", 2)
    first.lock()
    assert "another process trains in" in fails(lambda: train(small_cfg, tmp_path, "--seed", 7), capsys)
    assert [path.name for path in (tmp_path / "small").iterdir()] == [".lock"]
    first.unlock()
    assert not (tmp_path / "small").exists()


def test_other_optimiser_cannot_continue_a_checkpoint(small_cfg, uninterrupted, tmp_path, capsys):
    argv = ("--resume", uninterrupted / "checkpoints/update-00000012.pt", "--opts", "OPTIM.NAME", "lion")
    text = fails(lambda: train(small_cfg, tmp_path, *argv), capsys)
    assert "was written with the optimiser AdamW, OPTIM.NAME makes Lion" in text
    assert not (tmp_path / "small").exists()


@pytest.mark.slow
def test_two_processes_resume_bitwise(small_cfg, tmp_path, run_script):
    base = ["train.py", "--cfg", str(small_cfg)]
    run_script(*base, "--output", str(tmp_path / "whole"), processes=2)
    run_script(*base, "--output", str(tmp_path / "parts"), processes=2)
    for path in (tmp_path / "parts/small/checkpoints").glob("*18.pt"):
        path.unlink()
    run_script(*base, "--output", str(tmp_path / "parts"), processes=2)
    assert_same_state(tmp_path / "whole/small" / LAST, tmp_path / "parts/small" / LAST)


def test_other_recipe_in_the_same_directory_is_refused(small_cfg, uninterrupted, capsys):
    text = fails(lambda: train(small_cfg, uninterrupted.parent, "--opts", "OPTIM.LR", 0.1, "LOG.EVERY", 3), capsys)
    assert "OPTIM.LR: 0.001 -> 0.1" in text
    assert "LOG.EVERY" not in text
    assert "--tag" in text


def test_loader_may_change_within_a_run_with_a_warning(small_cfg, uninterrupted, tmp_path, capsys):
    pytest.importorskip("nvidia.dali", reason="DALI is not installed: pip install nvidia-dali-cuda130")
    shutil.copytree(uninterrupted, tmp_path / "small")
    (tmp_path / "small" / LAST).unlink()
    (tmp_path / "small/done").unlink()
    assert train(small_cfg, tmp_path, "--opts", "DATA.LOADER", "dali", "DATA.DALI_DEVICE", "cpu") == 0
    out = capsys.readouterr().out
    assert "DATA.LOADER: 'torch' -> 'dali'; DATA.DALI_DEVICE: 'auto' -> 'cpu': the same images" in out
    assert "at update 12 of 18" in out
    other = ("DATA.LOADER", "synthetic", "DATA.SYNTHETIC_CLASSES", 3)
    assert "holds a run with other settings" in fails(lambda: train(small_cfg, tmp_path, "--opts", *other), capsys)


def test_other_data_of_the_same_size_are_refused(small_cfg, uninterrupted, tmp_path, capsys):
    draw_folder(tmp_path / "data", 16, 5)
    for split in ("train", "val"):
        (tmp_path / "data" / split / "blue").rename(tmp_path / "data" / split / "azure")
    text = fails(lambda: train(small_cfg, uninterrupted.parent, "--data-path", tmp_path / "data"), capsys)
    assert "blue -> azure" in text
    draw_folder(tmp_path / "more", 17, 5)
    text = fails(lambda: train(small_cfg, uninterrupted.parent, "--data-path", tmp_path / "more"), capsys)
    assert "train: 48 -> 51" in text


def test_resume_into_a_new_run_takes_the_new_recipe(small_cfg, uninterrupted, tmp_path, capsys):
    middle = uninterrupted / "checkpoints/update-00000012.pt"
    other = ("--opts", "OPTIM.WEIGHT_DECAY", 0.5, "TRAIN.AMP", "fp16", "OPTIM.LR", 2e-3, "EVAL.EVERY", 3)
    assert train(small_cfg, tmp_path, "--resume", middle, *other) == 0
    assert "learning rate 0.002;" in capsys.readouterr().out
    state = load_state(tmp_path / "small" / LAST)
    assert {g["weight_decay"] for g in state["optimizer"]["param_groups"]} == {0.0, 0.5}
    assert all(best["epoch"] == 3 for best in state["best"].values())
    assert (tmp_path / "small/best_raw.safetensors").exists()
    text = fails(lambda: train(small_cfg, tmp_path, "--tag", "x", "--resume", uninterrupted / LAST), capsys)
    assert "at the end of TRAIN.EPOCHS=3" in text


def test_fp16_resumes_bitwise(small_cfg, tmp_path):
    fp16 = ("--opts", "TRAIN.AMP", "fp16", "TRAIN.EPOCHS", 1, "CHECKPOINT.EVERY_UPDATES", 3, "EMA.DECAY", 0)
    assert train(small_cfg, tmp_path / "a", *fp16) == 0
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    name = "small/checkpoints/update-00000006.pt"
    (tmp_path / "b" / name).unlink()
    assert train(small_cfg, tmp_path / "b", *fp16) == 0
    assert_same_state(tmp_path / "a" / name, tmp_path / "b" / name)
    assert load_state(tmp_path / "a" / name)["scaler"] == load_state(tmp_path / "b" / name)["scaler"]


def test_init_starts_from_weights_and_resume_from_a_position(small_cfg, uninterrupted, tmp_path, capsys):
    one = ("--opts", "TRAIN.EPOCHS", 1, "SCHEDULE.WARMUP_EPOCHS", 0, "OPTIM.LR", 0)
    still = ("SCHEDULE.MIN_LR", 0, "SCHEDULE.WARMUP_LR", 0)
    assert train(small_cfg, tmp_path, "--init", uninterrupted / "best_raw.safetensors", *one, *still) == 0
    assert "started from all" in capsys.readouterr().out
    state = load_state(tmp_path / "small/checkpoints/update-00000006.pt")
    start = load_file(uninterrupted / "best_raw.safetensors")
    norms = ("running_mean", "running_var", "num_batches_tracked")
    assert all(torch.equal(state["model"][k], start[k]) for k in start if not k.endswith(norms))
    assert train(small_cfg, tmp_path, "--tag", "on", "--resume", uninterrupted / "checkpoints/update-00000012.pt") == 0
    assert "at update 12 of 18" in capsys.readouterr().out
    assert_same_state(uninterrupted / LAST, tmp_path / "small-on" / LAST, best=False)


def test_init_takes_the_headline_weights_of_a_file_that_holds_both(small_cfg, uninterrupted, tmp_path, capsys):
    argv = ("--init", uninterrupted / "checkpoints/update-00000012.pt", "--eval")
    for headline, other in (("raw", "ema"), ("ema", "raw")):
        assert train(small_cfg, tmp_path, *argv, "--opts", "RECIPE.HEADLINE", headline) == 0
        expected = f"({headline} weights; the file also holds {other} weights, see MODEL.INIT_WEIGHTS)"
        assert expected in capsys.readouterr().out
