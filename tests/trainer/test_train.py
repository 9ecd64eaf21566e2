"""train.py and eval.py as a user runs them: train, continue, evaluate, and what they say when something is wrong."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

import eval as eval_script
import train as train_script
from engine.checkpoint.files import load_state
from engine.checkpoint.run_directory import RunDirectory
from engine.logging.log import Log
from tests.conftest import ROOT, draw_folder
from tests.helpers.small_runs import rows

LAST = "checkpoints/update-00000018.pt"


def train(cfg, output, *more) -> int:
    return train_script.main(["--cfg", str(cfg), "--output", str(output), *map(str, more)])


def assert_same_state(a, b, exact=True, best=True):
    a, b = load_state(a), load_state(b)
    assert a["update"] == b["update"]
    if exact:
        assert a["best"] == b["best"] or not best
        assert a["optimizer"]["param_groups"] == b["optimizer"]["param_groups"]
    close = {"rtol": 0, "atol": 0} if exact else {"rtol": 1e-3, "atol": 5e-6}
    for part in ("model", "ema") if a["ema"] else ("model",):
        torch.testing.assert_close(a[part], b[part], **close)
    if exact:
        torch.testing.assert_close(a["optimizer"]["state"], b["optimizer"]["state"], **close)


@pytest.fixture(scope="module")
def whole(small_cfg, tmp_path_factory):
    """An uninterrupted run."""
    output = tmp_path_factory.mktemp("whole")
    assert train(small_cfg, output) == 0
    return output / "small"


def test_run_directory_holds_what_is_promised(whole):
    names = {p.name for p in whole.iterdir()}
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
    assert sorted(p.name for p in (whole / "checkpoints").iterdir()) == ["update-00000012.pt", "update-00000018.pt"]
    manifest = json.loads((whole / "manifest.json").read_text())
    assert manifest["classes"] == ["blue", "green", "red"]
    assert manifest["starts"][0]["packages"]["torch"] == torch.__version__.split("+")[0]
    evals = [r for r in rows(whole) if r["kind"] == "eval"]
    assert [(r["epoch"], r["weights"]) for r in evals] == [(e, w) for e in range(3) for w in ("raw", "ema")]
    assert {r["images"] for r in evals} == {15}
    assert [r["update"] for r in rows(whole) if r["kind"] == "train"] == [4, 6, 10, 12, 16, 18]


@pytest.mark.slow
def test_training_learns(small_cfg, tmp_path):
    easy = ("AUG.RAND_AUGMENT", "", "AUG.MIX_PROB", 0, "AUG.ERASE_PROB", 0, "AUG.SCALE", "[0.5, 1]", "EMA.DECAY", 0)
    assert train(small_cfg, tmp_path, "--opts", "TRAIN.EPOCHS", 8, "EVAL.EVERY", 4, *easy) == 0
    assert max(r["top1"] for r in rows(tmp_path / "small") if r["kind"] == "eval") > 80


@pytest.mark.parametrize("stop_at", [3, 8])
def test_resume_in_the_middle_is_bitwise_the_uninterrupted_run(small_cfg, whole, tmp_path, monkeypatch, stop_at):
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
    assert_same_state(whole / LAST, tmp_path / "small" / LAST)
    assert rows(whole) == rows(tmp_path / "small")
    for which in ("raw", "ema"):
        a, b = (load_file(run / f"best_{which}.safetensors") for run in (whole, tmp_path / "small"))
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert len(json.loads((tmp_path / "small/manifest.json").read_text())["starts"]) == 2


@pytest.mark.slow
def test_kill_in_the_middle_of_an_epoch_loses_nothing(small_cfg, whole, tmp_path):
    argv = [sys.executable, "train.py", "--cfg", str(small_cfg), "--output", str(tmp_path)]
    env = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}  # another number may sum in another order
    process = subprocess.Popen(argv, cwd=ROOT, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    metrics = tmp_path / "small/metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and '"update": 10,' in metrics.read_text()) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert train(small_cfg, tmp_path) == 0
    assert_same_state(whole / LAST, tmp_path / "small" / LAST)
    assert rows(whole) == rows(tmp_path / "small")


def test_complete_run_says_so_and_changes_nothing(small_cfg, whole, capsys):
    before = {p: p.stat().st_mtime_ns for p in whole.rglob("*")}
    assert train(small_cfg, whole.parent) == 0
    assert "is complete" in capsys.readouterr().out
    assert {p: p.stat().st_mtime_ns for p in whole.rglob("*")} == before


def test_second_start_on_a_run_is_refused_while_the_first_lasts(small_cfg, whole, capsys, monkeypatch):
    monkeypatch.setattr("engine.checkpoint.run_directory.LOCK_ATTEMPTS", 1)
    first = RunDirectory(whole, 2)
    first.lock()
    assert "another process trains in" in fails(lambda: train(small_cfg, whole.parent), capsys)
    assert train(small_cfg, whole.parent, "--eval") == 0
    first.unlock()
    assert train(small_cfg, whole.parent) == 0


def test_second_start_on_a_new_run_is_refused_before_it_writes(small_cfg, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("engine.checkpoint.run_directory.LOCK_ATTEMPTS", 1)
    first = RunDirectory(tmp_path / "small", 2)
    first.lock()
    assert "another process trains in" in fails(lambda: train(small_cfg, tmp_path, "--seed", 7), capsys)
    assert [path.name for path in (tmp_path / "small").iterdir()] == [".lock"]
    first.unlock()
    assert not (tmp_path / "small").exists()


def test_other_optimiser_cannot_continue_a_checkpoint(small_cfg, whole, tmp_path, capsys):
    argv = ("--resume", whole / "checkpoints/update-00000012.pt", "--opts", "OPTIM.NAME", "lion")
    text = fails(lambda: train(small_cfg, tmp_path, *argv), capsys)
    assert "was written with the optimiser AdamW, OPTIM.NAME makes Lion" in text
    assert not (tmp_path / "small").exists()


def test_init_takes_the_headline_weights_of_a_file_that_holds_both(small_cfg, whole, tmp_path, capsys):
    argv = ("--init", whole / "checkpoints/update-00000012.pt", "--eval")
    for headline, other in (("raw", "ema"), ("ema", "raw")):
        assert train(small_cfg, tmp_path, *argv, "--opts", "RECIPE.HEADLINE", headline) == 0
        said = f"({headline} weights; the file also holds {other} weights, see MODEL.INIT_WEIGHTS)"
        assert said in capsys.readouterr().out


@pytest.mark.slow
def test_batch_norm_on_two_processes_gives_the_weights_of_one(small_cfg, tmp_path, run_script):
    # A gradient that is zero but for rounding (a bias before a BatchNorm) would be blown up by Adam: a larger eps lets it be.
    base = ["train.py", "--cfg", str(small_cfg), "--opts", "TRAIN.EPOCHS", "2", "OPTIM.EPS", "1e-3"]
    run_script(*base, "--output", str(tmp_path / "one"))
    run_script(*base, "--output", str(tmp_path / "two"), processes=2)
    name = "small/checkpoints/update-00000012.pt"
    assert_same_state(tmp_path / "one" / name, tmp_path / "two" / name, exact=False)
    one, two = (rows(tmp_path / n / "small") for n in ("one", "two"))
    assert [r.keys() for r in one] == [r.keys() for r in two]
    for a, b in zip(one, two, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)


@pytest.mark.slow
def test_two_processes_resume_bitwise(small_cfg, tmp_path, run_script):
    base = ["train.py", "--cfg", str(small_cfg)]
    run_script(*base, "--output", str(tmp_path / "whole"), processes=2)
    run_script(*base, "--output", str(tmp_path / "parts"), processes=2)
    for path in (tmp_path / "parts/small/checkpoints").glob("*18.pt"):
        path.unlink()
    run_script(*base, "--output", str(tmp_path / "parts"), processes=2)
    assert_same_state(tmp_path / "whole/small" / LAST, tmp_path / "parts/small" / LAST)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2, 3])
def test_eval_counts_every_image_once_on_any_number_of_processes(small_cfg, whole, run_script, processes):
    best = load_state(whole / LAST)["best"]["raw"]
    argv = ("eval.py", "--cfg", str(small_cfg), "--checkpoint", str(whole / "best_raw.safetensors"))
    out = run_script(*argv, processes=processes).stdout
    assert f"({best['correct1']}/15)" in out
    assert "15 images" in out


def evaluate(cfg, checkpoint, *more) -> int:
    return eval_script.main(["--cfg", str(cfg), "--checkpoint", str(checkpoint), *map(str, more)])


@pytest.mark.parametrize("which", ["raw", "ema"])
def test_eval_of_the_saved_best_gives_the_same_number(small_cfg, whole, capsys, which):
    best = load_state(whole / LAST)["best"][which]
    assert evaluate(small_cfg, whole / f"best_{which}.safetensors") == 0
    out = capsys.readouterr().out
    assert f"top-1 {best['top1']:.3f} ({best['correct1']}/15)" in out
    assert f"loss {best['loss']:.4f}" in out
    assert evaluate(small_cfg, whole / LAST, "--weights", which) == 0
    last = [r for r in rows(whole) if r["kind"] == "eval" and r["weights"] == which][-1]
    assert f"({last['correct1']}/15)" in capsys.readouterr().out


def test_train_eval_flag_evaluates_and_writes_nothing(small_cfg, whole, capsys):
    before = {p: p.stat().st_mtime_ns for p in whole.rglob("*")}
    assert train(small_cfg, whole.parent, "--eval") == 0
    assert capsys.readouterr().out.count("top-1") == 2
    assert {p: p.stat().st_mtime_ns for p in whole.rglob("*")} == before


def fails(call, capsys, status=2) -> str:
    with pytest.raises(SystemExit) as caught:
        call()
    assert caught.value.code == status
    return capsys.readouterr().err


def test_eval_refuses_what_does_not_fit(small_cfg, whole, tmp_path, capsys):
    best = whole / "best_raw.safetensors"
    assert "best_raw.safetensors" in fails(lambda: evaluate(small_cfg, whole / "best.safetensors"), capsys)
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


def test_other_recipe_in_the_same_directory_is_refused(small_cfg, whole, capsys):
    text = fails(lambda: train(small_cfg, whole.parent, "--opts", "OPTIM.LR", 0.1, "LOG.EVERY", 3), capsys)
    assert "OPTIM.LR: 0.001 -> 0.1" in text
    assert "LOG.EVERY" not in text
    assert "--tag" in text


def test_loader_may_change_within_a_run_with_a_warning(small_cfg, whole, tmp_path, capsys):
    pytest.importorskip("nvidia.dali", reason="DALI is not installed: pip install nvidia-dali-cuda130")
    shutil.copytree(whole, tmp_path / "small")
    (tmp_path / "small" / LAST).unlink()
    (tmp_path / "small/done").unlink()
    assert train(small_cfg, tmp_path, "--opts", "DATA.LOADER", "dali", "DATA.DALI_DEVICE", "cpu") == 0
    out = capsys.readouterr().out
    assert "DATA.LOADER: 'torch' -> 'dali'; DATA.DALI_DEVICE: 'auto' -> 'cpu': the same images" in out
    assert "at update 12 of 18" in out
    other = ("DATA.LOADER", "synthetic", "DATA.SYNTHETIC_CLASSES", 3)
    assert "holds a run with other settings" in fails(lambda: train(small_cfg, tmp_path, "--opts", *other), capsys)


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


def test_eval_flag_without_a_checkpoint_is_refused(small_cfg, tmp_path, capsys):
    assert "holds no checkpoint" in fails(lambda: train(small_cfg, tmp_path, "--eval"), capsys)


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


@pytest.mark.slow
def test_failure_of_one_process_is_said_by_it(small_cfg, tmp_path, run_script):
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


def test_other_data_of_the_same_size_are_refused(small_cfg, whole, tmp_path, capsys):
    draw_folder(tmp_path / "data", 16, 5)
    for split in ("train", "val"):
        (tmp_path / "data" / split / "blue").rename(tmp_path / "data" / split / "azure")
    text = fails(lambda: train(small_cfg, whole.parent, "--data-path", tmp_path / "data"), capsys)
    assert "blue -> azure" in text
    draw_folder(tmp_path / "more", 17, 5)
    text = fails(lambda: train(small_cfg, whole.parent, "--data-path", tmp_path / "more"), capsys)
    assert "train: 48 -> 51" in text


def test_resume_into_a_new_run_takes_the_new_recipe(small_cfg, whole, tmp_path, capsys):
    middle = whole / "checkpoints/update-00000012.pt"
    other = ("--opts", "OPTIM.WEIGHT_DECAY", 0.5, "TRAIN.AMP", "fp16", "OPTIM.LR", 2e-3, "EVAL.EVERY", 3)
    assert train(small_cfg, tmp_path, "--resume", middle, *other) == 0
    assert "learning rate 0.002;" in capsys.readouterr().out
    state = load_state(tmp_path / "small" / LAST)
    assert {g["weight_decay"] for g in state["optimizer"]["param_groups"]} == {0.0, 0.5}
    assert all(best["epoch"] == 3 for best in state["best"].values())
    assert (tmp_path / "small/best_raw.safetensors").exists()
    text = fails(lambda: train(small_cfg, tmp_path, "--tag", "x", "--resume", whole / LAST), capsys)
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


def test_eval_refuses_weights_the_file_does_not_hold(small_cfg, whole, capsys):
    text = fails(lambda: evaluate(small_cfg, whole / "best_raw.safetensors", "--weights", "ema"), capsys)
    assert "holds raw weights, ema were asked for" in text


def test_eval_flag_takes_the_named_file(small_cfg, whole, capsys):
    first = next(r for r in rows(whole) if r["kind"] == "eval" and r["epoch"] == 1 and r["weights"] == "ema")
    assert train(small_cfg, whole.parent, "--eval", "--resume", whole / "checkpoints/update-00000012.pt") == 0
    out = capsys.readouterr().out
    assert "at update 12 of 18" in out
    assert f"loss {first['loss']:.4f}" in out


def test_init_starts_from_weights_and_resume_from_a_position(small_cfg, whole, tmp_path, capsys):
    one = ("--opts", "TRAIN.EPOCHS", 1, "SCHEDULE.WARMUP_EPOCHS", 0, "OPTIM.LR", 0)
    still = ("SCHEDULE.MIN_LR", 0, "SCHEDULE.WARMUP_LR", 0)
    assert train(small_cfg, tmp_path, "--init", whole / "best_raw.safetensors", *one, *still) == 0
    assert "started from all" in capsys.readouterr().out
    state = load_state(tmp_path / "small/checkpoints/update-00000006.pt")
    start = load_file(whole / "best_raw.safetensors")
    norms = ("running_mean", "running_var", "num_batches_tracked")
    assert all(torch.equal(state["model"][k], start[k]) for k in start if not k.endswith(norms))
    assert train(small_cfg, tmp_path, "--tag", "on", "--resume", whole / "checkpoints/update-00000012.pt") == 0
    assert "at update 12 of 18" in capsys.readouterr().out
    assert_same_state(whole / LAST, tmp_path / "small-on" / LAST, best=False)
