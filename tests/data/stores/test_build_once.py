"""Locks beside the data, in folders that others can write: no link is followed, no pipe waited for."""

import os
import socket
from pathlib import Path

import pytest

from data.stores import build_once as module
from data.stores.build_once import build_once


def built(folder: Path, progress=lambda text: None) -> str:
    """Build a file in a folder unless it is there; return its content."""

    def read(file):
        return file.read_text() if file.exists() else None

    return build_once([folder / "index"], read, lambda file: file.write_text("built"), progress)[0]


@pytest.mark.parametrize("kind", ["link", "dangling", "pipe", "folder"])
def test_other_kinds_of_locks_are_refused_by_name(kind, tmp_path):
    lock, victim = tmp_path / "index.lock", tmp_path / "victim"
    victim.write_text("mine")
    os.utime(victim, ns=(0, 0))
    if kind == "pipe":
        os.mkfifo(lock)
    elif kind == "folder":
        lock.mkdir()
    else:
        lock.symlink_to(victim if kind == "link" else tmp_path / "new")
    with pytest.raises(ValueError, match=r"index\.lock is a (link|pipe|folder) and not a file"):
        built(tmp_path)
    assert victim.read_text() == "mine"
    assert victim.stat().st_mtime_ns == 0
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "owner", ["", "\x1b]0;owned\x07", "{host} -9", "{host} 0", f"{{host}} {'9' * 40}", "{host} 1e9", "a b c " * 50]
)
def test_any_text_in_a_lock_is_an_owner_that_grows_stale(owner, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "STALE_S", 0.3)
    monkeypatch.setattr(module, "POLL_S", 0.05)
    (tmp_path / "index.lock").write_text(owner.format(host=socket.gethostname()))
    assert built(tmp_path) == "built"
    assert not (tmp_path / "index.lock").exists()


def test_huge_lock_is_refused(tmp_path):
    with (tmp_path / "index.lock").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(ValueError, match=r"index\.lock has 1,099,511,627,776 bytes"):
        built(tmp_path)
