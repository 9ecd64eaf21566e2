"""Run directory: lock, marker files, manifest, and the errors where they cannot be written."""

import errno
import fcntl
import os
from types import SimpleNamespace

import pytest

import train
from engine.checkpoint.manifest import read_manifest, record_start
from engine.checkpoint.run_directory import RunDirectory, RunLockedError
from trainer.stopping import write_marker


def test_lock_file_that_its_owner_removes_meanwhile_is_created_again(tmp_path, monkeypatch):
    first, second, third = (RunDirectory(tmp_path / "small", 2) for _ in range(3))
    first.lock()
    flock, gone = fcntl.flock, []

    def flock_after_the_owner_unlocked(*args):  # between opening and locking the file
        if not gone:
            gone.append(first.unlock())
        flock(*args)

    monkeypatch.setattr("engine.checkpoint.run_directory.fcntl.flock", flock_after_the_owner_unlocked)
    monkeypatch.setattr("engine.checkpoint.run_directory.time.sleep", lambda seconds: None)
    assert second.lock() == ""
    with pytest.raises(RunLockedError):
        third.lock()
    second.unlock()


def test_lock_file_is_open_for_writing_and_missing_support_of_locks_is_a_warning(tmp_path, monkeypatch):
    opened = []

    def no_locks(file, how):
        opened.append(fcntl.fcntl(file, fcntl.F_GETFL) & os.O_ACCMODE)
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("engine.checkpoint.run_directory.fcntl.flock", no_locks)
    run = RunDirectory(tmp_path / "small", 2)
    assert "cannot be locked (No locks available)" in run.lock()
    assert opened == [os.O_RDWR]  # NFS turns them into byte locks, which need a file open for writing
    run.unlock()
    monkeypatch.setattr("engine.checkpoint.run_directory.os.open", lambda *args: no_space())
    with pytest.raises(ValueError, match=r"cannot be written.*No space left"):
        run.lock()


def test_lock_file_that_another_process_holds_is_not_removed(tmp_path, monkeypatch):
    first, second = (RunDirectory(tmp_path / "small", 2) for _ in range(2))
    first.lock()

    def broken(*args):
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr("engine.checkpoint.run_directory.fcntl.flock", broken)
        with pytest.raises(ValueError, match="Input/output error"):
            second.lock()
    second.unlock()
    assert (tmp_path / "small/.lock").exists()
    first.unlock()


@pytest.mark.parametrize("written", ["record_start", "open"])
def test_files_that_cannot_be_written_are_an_error_with_a_remedy(small_cfg, tmp_path, monkeypatch, capsys, written):
    monkeypatch.setattr(
        "trainer.session.record_start" if written == "record_start" else "engine.logging.log.Log.open",
        lambda *args, **kwargs: no_space(),
    )
    with pytest.raises(SystemExit) as caught:
        train.main(["--cfg", str(small_cfg), "--output", str(tmp_path)])
    assert caught.value.code == 2
    assert "cannot be written (No space left on device); choose another with --output" in capsys.readouterr().err


def test_marker_that_cannot_be_written_is_a_warning(tmp_path, monkeypatch):
    warnings = []
    run = RunDirectory(tmp_path, 2)
    monkeypatch.setattr(RunDirectory, "write_marker", lambda *args: no_space())
    write_marker(SimpleNamespace(run=run, log=SimpleNamespace(warning=warnings.append)), run.done, "after update 1")
    assert warnings == [
        f"{run.done} cannot be written (No space left on device): job scripts that look for it will not find it"
    ]


def no_space():
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("text", ['{"starts": [{"time": "2026', "[]", '{"starts": 3}', "\xff"])
@pytest.mark.parametrize("flag", [[], ["--dry-run"]], ids=["train", "dry run"])
def test_damaged_manifest_is_an_error_with_a_remedy(small_cfg, tmp_path, capsys, text, flag):
    manifest = tmp_path / "small/manifest.json"
    manifest.parent.mkdir()
    manifest.write_text(text, encoding="latin-1")
    with pytest.raises(SystemExit) as stop:
        train.main(["--cfg", str(small_cfg), "--output", str(tmp_path), *flag])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert f"{manifest} is damaged (" in error
    assert "move it away: the run continues without it" in error
    assert "Traceback" not in error
    assert manifest.read_text(encoding="latin-1") == text


def test_manifest_that_was_moved_away_is_started_again(tmp_path):
    run = RunDirectory(tmp_path, 2)
    for number in range(2):
        record_start(run.manifest, {"model": "x"}, {"update": number})
    assert [start["update"] for start in read_manifest(run.manifest)["starts"]] == [0, 1]
    run.manifest.unlink()
    record_start(run.manifest, {"model": "x"}, {"update": 2})
    assert [start["update"] for start in read_manifest(run.manifest)["starts"]] == [2]


def test_dry_run_reports_a_run_directory_that_cannot_be_created(small_cfg, tmp_path, capsys, monkeypatch):
    (tmp_path / "file").touch()
    argv = ["--cfg", str(small_cfg), "--dry-run", "--output"]
    with pytest.raises(SystemExit) as stop:
        train.main([*argv, str(tmp_path / "file/runs")])
    assert stop.value.code == 2
    assert f"cannot be written ({tmp_path / 'file'} is a file); choose another with --output" in capsys.readouterr().err
    # Root may write everywhere, so the check is replaced.
    monkeypatch.setattr("engine.checkpoint.run_directory.os.access", lambda path, how: False)
    with pytest.raises(SystemExit):
        train.main([*argv, str(tmp_path / "runs")])
    assert f"(no permission to write in {tmp_path})" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
