"""Entry points with config files made to do harm, also in the run directory: a message, no traceback, soon."""

import time

import pytest

import eval as eval_script
import train as train_script
from tests.conftest import ROOT
from tests.helpers.hostile_configs import TEXTS, write_hostile_configs
from tools.doctor import main as doctor
from tools.inspect import main as inspect
from tools.run_dir import main as run_dir

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
