"""The log and its trackers in a run directory with names and files that others chose."""

import os
import re

import pytest
from PIL import Image

from engine.logging.log import Log
from engine.logging.trackers import TensorBoardTracker, read_run_id
from tests.helpers.hostile_runs import EVIL, INSIDE, irregular

CONTROLS = set("\x1b\x07\x9b\u202e")


def test_lines_of_the_log_are_escaped_and_not_forged(tmp_path, capsys):
    log = Log(True)
    log.info(f"early {EVIL}")
    log.open(tmp_path, 0, tensorboard=False)
    log.warning(f"{EVIL} cannot be decoded \udce9")
    log.close()
    text = (tmp_path / "log.txt").read_bytes()
    assert text.count(b"\n") == 2
    assert b"decoded \xe9\n" in text  # bytes survive
    for shown in (text.decode("utf-8", "replace"), capsys.readouterr().out):
        assert not set(shown) & CONTROLS
        assert re.search(r"warning: evil\\x1b\]0;owned\\x07\\x9b2J\\u202egpj\.exe\\nforged: line cannot", shown)


def test_tags_of_tensorboard_are_escaped(tmp_path):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    tracker = TensorBoardTracker(tmp_path, 0)
    tracker.scalars({f"train/{EVIL}": 1.0}, 1)
    tracker.text(f"config {EVIL}", EVIL, 1)
    tracker.close()
    found = reader.EventAccumulator(str(tmp_path / "tensorboard"))
    found.Reload()
    tags = str(found.Tags())
    assert not set(tags) & CONTROLS
    assert "nforged" in tags


@pytest.mark.parametrize(
    "title", [title for title, (name, _) in irregular().items() if name in ("log.txt", "metrics.jsonl", "tensorboard")]
)
def test_log_opens_no_other_kinds_of_files(title, tmp_path):
    name, make = irregular()[title]
    run, outside = tmp_path / "run", tmp_path / "outside"
    run.mkdir()
    (outside / "folder").mkdir(parents=True)
    (outside / "file").write_text("mine")
    make(run, outside)
    log = Log(True)
    with pytest.raises(ValueError, match=f"{name} is a (link|pipe|folder|socket)"):
        log.open(run, 0, tensorboard=True)
    log.close()
    assert (outside / "file").read_text() == "mine"
    assert sorted(path.name for path in outside.rglob("*")) == ["file", "folder"]


def test_picture_replaces_a_link(tmp_path):
    (tmp_path / "victim").write_text("mine")
    (tmp_path / INSIDE[2]).parent.mkdir()
    (tmp_path / INSIDE[2]).symlink_to(tmp_path / "victim")
    log = Log(True)
    log.open(tmp_path, 0, tensorboard=False)
    log.picture("first_batch", Image.new("RGB", (4, 4)), 0)
    log.close()
    assert (tmp_path / "victim").read_text() == "mine"
    with Image.open(tmp_path / INSIDE[2]) as image:
        assert image.format == "PNG"


@pytest.mark.parametrize("text", ["", "../../other", "a b", EVIL, "x" * 999])
def test_id_of_another_form_is_refused(text, tmp_path):
    (tmp_path / "wandb_id").write_text(text)
    with pytest.raises(ValueError, match="no id of a Weights & Biases run"):
        read_run_id(tmp_path / "wandb_id")


def test_id_is_read_back(tmp_path):
    assert read_run_id(tmp_path / "wandb_id") is None
    (tmp_path / "wandb_id").write_text("1a-b_c\n")
    assert read_run_id(tmp_path / "wandb_id") == "1a-b_c"
    (tmp_path / "wandb_id").unlink()
    os.mkfifo(tmp_path / "wandb_id")
    with pytest.raises(ValueError, match="is a pipe"):
        read_run_id(tmp_path / "wandb_id")
