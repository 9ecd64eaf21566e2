"""The run directory: who may write into it."""

import errno
import fcntl
import os
from types import SimpleNamespace

import pytest

import train
from engine.log import Log
from engine.run import OccupiedError, RunDirectory


def test_lock_that_its_owner_removes_meanwhile_is_made_anew(tmp_path, monkeypatch):
    first, second, third = (RunDirectory(tmp_path / "small", 2) for _ in range(3))
    first.lock()
    flock, gone = fcntl.flock, []

    def flock_after_the_owner_left(*args):  # between the opening of the file and the lock on it
        if not gone:
            gone.append(first.unlock())
        flock(*args)

    monkeypatch.setattr("engine.run.fcntl.flock", flock_after_the_owner_left)
    monkeypatch.setattr("engine.run.time.sleep", lambda seconds: None)
    assert second.lock() == ""
    with pytest.raises(OccupiedError):
        third.lock()
    second.unlock()


def test_lock_is_of_a_file_open_for_writing_and_its_lack_is_a_warning(tmp_path, monkeypatch):
    opened = []

    def no_locks(file, how):
        opened.append(fcntl.fcntl(file, fcntl.F_GETFL) & os.O_ACCMODE)
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("engine.run.fcntl.flock", no_locks)
    run = RunDirectory(tmp_path / "small", 2)
    assert "cannot be locked (No locks available)" in run.lock()
    assert opened == [os.O_RDWR]  # NFS makes locks of bytes from them, which want that
    run.unlock()
    monkeypatch.setattr("engine.run.os.open", lambda *args: no_space())
    with pytest.raises(ValueError, match=r"cannot be written.*No space left"):
        run.lock()


def test_lock_that_fails_is_not_removed_as_if_it_were_held(tmp_path, monkeypatch):
    first, second = (RunDirectory(tmp_path / "small", 2) for _ in range(2))
    first.lock()

    def broken(*args):
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr("engine.run.fcntl.flock", broken)
        with pytest.raises(ValueError, match="Input/output error"):
            second.lock()
    second.unlock()
    assert (tmp_path / "small/.lock").exists()
    first.unlock()


@pytest.mark.parametrize("written", ["record_start", "open"])
def test_files_that_cannot_be_written_end_the_start_in_order(small_cfg, tmp_path, monkeypatch, capsys, written):
    monkeypatch.setattr(RunDirectory if written == "record_start" else Log, written, lambda *args: no_space())
    with pytest.raises(SystemExit) as caught:
        train.main(["--cfg", str(small_cfg), "--output", str(tmp_path)])
    assert caught.value.code == 2
    assert "cannot be written (No space left on device); choose another with --output" in capsys.readouterr().err


def test_mark_that_cannot_be_written_is_a_warning(tmp_path, monkeypatch):
    said = []
    run = RunDirectory(tmp_path, 2)
    monkeypatch.setattr(RunDirectory, "mark", lambda *args: no_space())
    train.leave_mark(SimpleNamespace(run=run, log=SimpleNamespace(warn=said.append)), run.done, "after update 1")
    assert said == [f"{run.done} cannot be written (No space left on device): whoever looks for it finds nothing"]


def no_space():
    raise OSError(errno.ENOSPC, "No space left on device")
