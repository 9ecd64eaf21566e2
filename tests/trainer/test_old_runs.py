"""Run directories of an older version: they load, continue to the same end, evaluate, compare and are reported."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

import eval as eval_script
from tests.conftest import ROOT
from tests.helpers.small_runs import rows, run_here
from tools.compare import main as compare
from tools.report import main as report

FIXTURE = ROOT / "tests/fixtures/run_before_rooms"
EXPECTED = json.loads((FIXTURE / "expected.json").read_text())
OWN = ("MODEL.MODULE", "tests/fixtures/run_before_rooms/net.py")  # the config's, which has to be named again
CHECKPOINT = "checkpoints/update-00000010.pt"
# Sums here have fewer than 1000 terms, each rounded by 6e-8 of its size: 6e-5 at worst. The 8 updates that are done again differ by
# 2e-6 between CPU instruction sets, as measured when the run was made.
TOLERANCE = 1e-4


@pytest.fixture
def old(tmp_path, monkeypatch):
    """A copy of the run, killed after update 11 of 18 with a checkpoint of update 10."""
    monkeypatch.chdir(ROOT)  # where its config sees the model's file
    return shutil.copytree(FIXTURE / "old", tmp_path / "old")


def go_on(run):
    """Train the run to its end, by its own config."""
    assert run_here(run / "config.yaml", run.parent, *OWN) == 0


def assert_rows_as_expected(found):
    """Check rows of metrics.jsonl: places and learning rates exactly, losses and norms to rounding, counts to one image."""
    assert [list(row) for row in found] == [list(row) for row in EXPECTED["rows"]]
    for row, expected in zip(found, EXPECTED["rows"], strict=True):
        for key, value in expected.items():
            if key in ("loss", "epoch_loss", "grad_norm"):
                assert row[key] == pytest.approx(value, rel=TOLERANCE), (key, expected)
            elif key in ("correct1", "correct5"):  # answers that almost tie
                assert abs(row[key] - value) <= 1, (key, expected)
            elif key in ("top1", "top5"):
                assert row[key] == 100 * row[f"correct{key[-1]}"] / row["images"]
            elif key != "best":  # which of two accuracies is the higher one follows from the counts
                assert row[key] == value, (key, expected)


def assert_weights_as_expected(found, expected):
    assert {name: list(tensor.shape) for name, tensor in found.items()} == {
        k: v[0] for k, v in expected["norms"].items()
    }
    for name, tensor in found.items():
        norm = expected["norms"][name][1]
        assert float(tensor.double().norm()) == pytest.approx(norm, rel=10 * TOLERANCE, abs=TOLERANCE), name


@pytest.mark.parametrize("form", [1, 2])
def test_old_run_continues_to_the_same_end(old, capsys, form):
    if form == 1:
        shutil.copy(FIXTURE / "format_1.pt", old / CHECKPOINT)
    before = rows(old)
    go_on(old)
    assert f"continuing {old / CHECKPOINT} at update 10 of 18 (in epoch 2)" in capsys.readouterr().out
    found = rows(old)
    kept = [row for row in before if row["update"] <= 10]
    assert found[: len(kept)] == kept
    assert_rows_as_expected(found)
    assert (old / "done").is_file()
    last = torch.load(old / "checkpoints/update-00000018.pt", weights_only=True)
    assert list(last) == EXPECTED["checkpoint"]
    assert_weights_as_expected(last["model"], EXPECTED["weights"]["raw"])
    assert_weights_as_expected(last["ema"], EXPECTED["weights"]["ema"])
    starts = json.loads((old / "manifest.json").read_text())["starts"]
    assert [start["update"] for start in starts] == [0, 10]
    assert len({start["model_file_sha256"] for start in starts}) == 1
    for which in ("raw", "ema"):
        best = max(
            (row for row in found if row["kind"] == "eval" and row["weights"] == which), key=lambda row: row["top1"]
        )
        assert last["best"][which]["update"] == best["update"]
        if best["update"] == EXPECTED["best"][which]["update"]:
            weights = load_file(old / f"best_{which}.safetensors")
            assert_weights_as_expected(weights, EXPECTED["weights"][f"best_{which}"])


def test_old_weights_start_another_run(old, tmp_path, capsys):
    asked = ("MODEL.INIT", old / "best_ema.safetensors", "TRAIN.EPOCHS", 1, "TAG", "new", *OWN)
    assert run_here(old / "config.yaml", tmp_path, *asked) == 0
    assert "(ema weights)" in capsys.readouterr().out
    assert rows(tmp_path / "old-new")[-1]["update"] == 6


@pytest.mark.parametrize("which", ["raw", "ema"])
@pytest.mark.parametrize("file", ["best_{}.safetensors", CHECKPOINT, "../format_1.pt"])
def test_old_weights_evaluate_to_what_their_rows_say(old, tmp_path, which, file):
    shutil.copy(FIXTURE / "format_1.pt", tmp_path)
    out, path = tmp_path / "numbers.json", old / file.format(which)
    asked = ("--cfg", old / "config.yaml", "--checkpoint", path, "--weights", which, "--json", out, "--opts", *OWN)
    assert eval_script.main([str(part) for part in asked]) == 0
    found = json.loads(out.read_text())["results"][which]
    assert found["images"] == 60
    if file.startswith("best"):
        (row,) = (row for row in rows(old) if row["kind"] == "eval" and row["weights"] == which)
        assert found["loss"] == pytest.approx(row["loss"], rel=TOLERANCE)
        assert abs(found["correct1"] - row["correct1"]) <= 1


def test_old_run_is_compared_and_reported(old, tmp_path, capsys):
    assert compare([str(old), str(FIXTURE / "old")]) == 0
    assert "identical through update 11" in capsys.readouterr().out
    assert report([str(old), "--out", str(tmp_path / "page.html")]) == 0
    assert "old_net" in (tmp_path / "page.html").read_text()
    go_on(old)
    found = compare([str(old), str(FIXTURE / "old"), "--tolerance", str(TOLERANCE)])
    printed = capsys.readouterr().out
    assert found == 0, printed
    assert "compared 11 training rows and 2 evaluations" in printed


@pytest.mark.slow
def test_commands_take_the_old_run(old, tmp_path, run_script):
    train = run_script("train.py", "--cfg", str(old / "config.yaml"), "--output", str(old.parent), "--opts", *OWN)
    assert "done: best" in train.stdout
    best = str(old / "best_raw.safetensors")
    evaluation = run_script("eval.py", "--cfg", str(old / "config.yaml"), "--checkpoint", best, "--opts", *OWN)
    assert "/60" in evaluation.stdout
    assert run_script("-m", "tools.compare", str(old), str(old)).returncode == 0
    run_script("-m", "tools.report", str(old))
    assert (old / "report.html").is_file()
