"""Files that are whole or not there, and read without unpickling code."""

import pytest
import torch

from engine.checkpoint import CheckpointFolder, load_state, save_state, write_atomically
from tests.damaged_files import damaged_file


def test_write_that_fails_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "a.pt"
    save_state(path, {"model": {}, "n": 1})

    def broken(file):
        file.write_bytes(b"half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, broken)
    assert load_state(path)["n"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["a.pt"]


def test_folder_keeps_the_newest_and_finds_the_latest(tmp_path):
    folder = CheckpointFolder(tmp_path / "checkpoints", keep=2)
    assert folder.latest() is None
    for update in (9, 10, 100, 99):
        folder.save(update, {"model": {}, "update": update})
    assert [p.name for p in folder.numbered()] == ["update-00000099.pt", "update-00000100.pt"]
    assert load_state(folder.latest())["update"] == 100


def test_leftover_temporary_is_removed_by_the_next_save(tmp_path):
    folder = CheckpointFolder(tmp_path, keep=1)
    (tmp_path / ".update-00000001.pt.tmp").write_bytes(b"half")
    folder.save(2, {"model": {}})
    assert [p.name for p in tmp_path.iterdir()] == ["update-00000002.pt"]


@pytest.mark.parametrize("content", ["evil", "namespace", "garbage", "truncated", "empty"])
def test_damaged_or_foreign_state_is_refused_and_runs_nothing(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    damaged_file(tmp_path / "c.pt", content)
    with pytest.raises(ValueError, match=r"c\.pt"):
        load_state(tmp_path / "c.pt")
    assert not (tmp_path / "evil").exists()


def test_newer_format_is_refused(tmp_path):
    torch.save({"format": 99, "model": {}}, tmp_path / "c.pt")
    with pytest.raises(ValueError, match=r"format 99.*update Retoken"):
        load_state(tmp_path / "c.pt")
