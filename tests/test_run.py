"""The run directory: who may write into it."""

import errno
import fcntl
import os

import pytest

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


def no_space():
    raise OSError(errno.ENOSPC, "No space left on device")
