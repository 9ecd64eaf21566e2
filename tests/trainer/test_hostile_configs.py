"""Entry points with config files made to do harm, also in the run directory: a message, no traceback, soon."""

import json
import time

import pytest

import eval as eval_script
import train as train_script
from tests.conftest import ROOT
from tests.helpers.hostile_configs import TEXTS, write_hostile_configs
from tools.compare import main as compare
from tools.doctor import main as doctor
from tools.inspect import main as inspect
from tools.report import main as report
from tools.run_dir import main as run_dir

ROW = {"kind": "train", "update": 1, "epoch": 0, "update_in_epoch": 1, "loss": 1.0}
SMALL = ("--opts", "DEVICE", "cpu", "DATA.LOADER", "synthetic", "DATA.SYNTHETIC_TRAIN", "2048")
OTHERS = ("a large file", "a pipe", "a folder")


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    return write_hostile_configs(tmp_path_factory.mktemp("hostile"))


def refused(capsys, main, *argv):
    """Run a command that must end with status 2 and a message; return the message."""
    since = time.process_time()
    with pytest.raises(SystemExit) as caught:
        main([str(part) for part in argv])
    assert caught.value.code == 2
    assert time.process_time() - since < 20
    shown = capsys.readouterr().err
    assert "Traceback" not in shown
    assert 10 < len(shown) < 3000
    return shown


@pytest.mark.parametrize("name", [*TEXTS, *OTHERS])
def test_config_is_refused_by_every_command_that_takes_one(hostile, name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(hostile[name].parent)
    cfg = ("--cfg", hostile[name], "--output", tmp_path)
    refused(capsys, train_script.main, *cfg, "--dry-run", *SMALL)
    refused(capsys, train_script.main, *cfg, "--resume", tmp_path / "none.pt", *SMALL)
    refused(capsys, eval_script.main, "--cfg", hostile[name], "--checkpoint", tmp_path / "none.pt", *SMALL)
    if name not in ("a model of no name", "a program"):  # which no model is built for here
        refused(capsys, run_dir, *cfg)
        refused(capsys, doctor, *cfg)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", TEXTS)
def test_run_directory_with_the_config_is_reported_or_refused(hostile, name, tmp_path, capsys):
    runs = [tmp_path / "a", tmp_path / "b"]
    for run in runs:
        run.mkdir()
        (run / "config.yaml").write_bytes(hostile[name].read_bytes())
        (run / "metrics.jsonl").write_text(json.dumps(ROW) + "\n")
    page = tmp_path / "page.html"
    for main, argv in ((report, [*runs, "--out", page]), (compare, runs)):
        since = time.process_time()
        try:
            assert main([str(part) for part in argv]) == 0
        except SystemExit as end:
            assert end.code == 2  # noqa: PT017
        assert time.process_time() - since < 20
        shown = capsys.readouterr()
        assert "Traceback" not in shown.err
        assert len(shown.err + shown.out) < 20_000
    assert not page.exists() or page.stat().st_size < 8_000_000


def test_run_in_a_directory_with_a_hostile_config_is_refused(hostile, tmp_path, small_cfg, capsys):
    assert train_script.main(["--cfg", str(small_cfg), "--output", str(tmp_path), "--opts", "TRAIN.EPOCHS", "1"]) == 0
    capsys.readouterr()
    for name in ("aliases multiply text", "deep lists", "Python objects", "an integer of 5000 digits", "NUL bytes"):
        (tmp_path / "small/config.yaml").write_bytes(hostile[name].read_bytes())
        refused(capsys, train_script.main, "--cfg", small_cfg, "--output", tmp_path, "--opts", "TRAIN.EPOCHS", "1")


@pytest.mark.parametrize("model", ["x" * 100_000, "\x1b[2J", "hf-hub:a/b", "../../etc/passwd", ""])
def test_model_name_is_refused(model, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    refused(capsys, inspect, model)
