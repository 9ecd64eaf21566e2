"""WandbTracker, with a fake of the package: logged values, continuation of a run, errors where it is missing or fails."""

import json
import types

import pytest

from engine.logging.trackers import WANDB_ID
from tests.helpers.small_runs import run_here


class FakeRun:
    """Run object that the fake wandb.init returns."""

    def __init__(self, arguments):
        self.arguments, self.id = arguments, arguments["id"] or "made-up"
        self.metrics, self.rows, self.finished = [], [], False

    def define_metric(self, name, step_metric=None):
        self.metrics.append((name, step_metric))

    def log(self, row):
        assert not self.finished
        self.rows.append(row)

    def finish(self):
        self.finished = True


@pytest.fixture
def wandb(monkeypatch):
    """Install a fake package wandb that records its runs."""
    module = types.ModuleType("wandb")
    module.runs = []

    def init(**arguments):
        module.runs.append(FakeRun(arguments))
        return module.runs[-1]

    module.init, module.Image = init, lambda pixels: ("image", pixels.shape, str(pixels.dtype))
    monkeypatch.setitem(__import__("sys").modules, "wandb", module)
    return module


def test_run_is_logged_and_continued_under_one_id(small_cfg, tmp_path, wandb):
    opts = "LOG.WANDB", "trials", "TRAIN.EPOCHS", 2
    assert run_here(small_cfg, tmp_path, *opts) == 0
    run = tmp_path / "small"
    (first,) = wandb.runs
    arguments = first.arguments
    assert (arguments["project"], arguments["name"], arguments["dir"]) == ("trials", "small", str(run))
    assert (arguments["id"], arguments["resume"]) == (None, "allow")
    assert arguments["config"]["MODEL"]["NAME"] == "test_efficientnet"
    assert first.finished
    assert first.metrics == [("update", None), ("*", "update")]
    assert (run / WANDB_ID).read_text() == "made-up\n"
    written = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    logged = {(row["update"], name): value for row in first.rows for name, value in row.items()}
    for row in written:
        prefix = "train" if row["kind"] == "train" else f"eval_{row['weights']}"
        for name in ("loss",) if row["kind"] == "train" else ("loss", "top1", "top5"):
            assert logged[row["update"], f"{prefix}/{name}"] == row[name]
    assert logged[0, "pictures/first_batch"][::2] == ("image", "uint8")

    (run / "checkpoints" / "update-00000012.pt").unlink()  # as after a power cut
    assert run_here(small_cfg, tmp_path, *opts) == 0
    assert wandb.runs[1].arguments["id"] == "made-up"
    assert {row["update"] for row in wandb.runs[1].rows} == {10, 12}


def test_missing_package_is_an_error_with_its_remedy(small_cfg, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("engine.logging.trackers.find_spec", lambda name: None)
    with pytest.raises(SystemExit) as ended:
        run_here(small_cfg, tmp_path, "LOG.WANDB", "trials")
    assert ended.value.code == 2
    assert "LOG.WANDB='trials' needs the package wandb: pip install wandb" in capsys.readouterr().err
    assert not (tmp_path / "small").exists()


def test_wandb_that_does_not_start_is_an_error_with_its_remedy(small_cfg, tmp_path, capsys, wandb, monkeypatch):
    def init(**_):
        raise RuntimeError("api_key not configured (no-tty)")

    monkeypatch.setattr(wandb, "init", init)
    with pytest.raises(SystemExit):
        run_here(small_cfg, tmp_path, "LOG.WANDB", "trials")
    error = capsys.readouterr().err
    assert "LOG.WANDB='trials': wandb does not start (RuntimeError: api_key not configured (no-tty))" in error
    assert "WANDB_MODE=offline" in error
