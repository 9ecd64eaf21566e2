"""Checkpoint files: atomic writes, checksums, damage, and reading without unpickling code."""

import io
import os
import random
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from engine.checkpoint.files import (
    CheckpointFolder,
    ChecksumWriter,
    DamagedError,
    load_state,
    read_metadata,
    save_state,
    write_atomically,
)
from engine.distributed.processes import Processes
from tests.conftest import ROOT
from tests.helpers.damaged_files import damaged_file
from tests.helpers.small_runs import rows, run_here

LAST = "checkpoints/update-00000018.pt"
ALONE = Processes(0, 1, 0, torch.device("cpu"), "test")


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


def test_any_changed_byte_and_any_cut_is_found(tmp_path):
    path = tmp_path / "c.pt"
    save_state(path, {"model": {"a": torch.arange(300.0)}, "facts": {"text": "abc"}})
    whole = path.read_bytes()
    draw = random.Random(0)
    ends = [0, 1, len(whole) // 2, *range(len(whole) - 110, len(whole))]
    for position in [*draw.sample(range(len(whole)), 150), *range(len(whole) - 110, len(whole))]:
        changed = bytearray(whole)
        changed[position] ^= 1 << draw.randrange(8)
        path.write_bytes(changed)
        with pytest.raises(ValueError, match=r"c\.pt"):
            load_state(path)
    for end in ends:
        path.write_bytes(whole[:end])
        with pytest.raises(DamagedError, match=r"c\.pt"):
            load_state(path)
    path.write_bytes(whole)
    assert load_state(path)["facts"] == {"text": "abc"}


def test_byte_that_the_disk_changes_while_it_is_written_is_found(tmp_path):
    class Disk(io.BytesIO):
        def write(self, data):
            return super().write(bytes(data).replace(b"abc", b"abd"))

    disk = Disk()
    writer = ChecksumWriter(disk)
    torch.save({"format": 2, "model": {}, "text": "abc"}, writer)
    writer.finish()
    (tmp_path / "c.pt").write_bytes(disk.getvalue())
    with pytest.raises(DamagedError, match="its checksum is not that of what was written"):
        load_state(tmp_path / "c.pt")


@pytest.mark.parametrize("step", [1, 2, 3, 1000])
def test_checksum_does_not_depend_on_the_sizes_of_writes(step):
    archive = io.BytesIO()
    torch.save({"w": torch.arange(50)}, archive)
    whole, pieces = io.BytesIO(), io.BytesIO()
    for file, size in ((whole, 1 << 30), (pieces, step)):
        writer = ChecksumWriter(file)
        for start in range(0, len(archive.getvalue()), size):
            writer.write(archive.getvalue()[start : start + size])
        writer.finish()
    assert pieces.getvalue() == whole.getvalue()
    assert len(whole.getvalue()) == len(archive.getvalue()) + 79
    whole.seek(0)
    assert torch.load(whole)["w"].tolist() == list(range(50))


def test_file_of_the_first_format_needs_no_checksum(tmp_path):
    torch.save({"format": 1, "model": {}}, tmp_path / "c.pt")
    assert load_state(tmp_path / "c.pt")["format"] == 1
    torch.save({"format": 2, "model": {}}, tmp_path / "c.pt")
    with pytest.raises(DamagedError, match="checksum is missing"):
        load_state(tmp_path / "c.pt")


def assert_same_run(a, b):
    x, y = load_state(a / LAST), load_state(b / LAST)
    for part in ("model", "ema"):
        torch.testing.assert_close(x[part], y[part], rtol=0, atol=0)
    torch.testing.assert_close(x["optimizer"]["state"], y["optimizer"]["state"], rtol=0, atol=0)
    assert x["best"] == y["best"]
    assert rows(a) == rows(b)
    assert_best_files_hold_the_best(a)


def assert_best_files_hold_the_best(run):
    for which, entry in load_state(max((run / "checkpoints").glob("*.pt")))["best"].items():
        metadata = read_metadata(run / f"best_{which}.safetensors")
        assert {k: metadata[k] for k in entry} == entry
    assert not [p for p in run.rglob("*") if p.suffix == ".tmp"]


@pytest.fixture(scope="module")
def uninterrupted(small_cfg, tmp_path_factory):
    """Run directory of an uninterrupted run with one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    output = tmp_path_factory.mktemp("uninterrupted")
    assert run_here(small_cfg, output) == 0
    yield output / "small"
    torch.set_num_threads(threads)


@pytest.mark.parametrize("damage", ["byte", "cut"])
def test_damaged_newest_checkpoint_is_a_warning_and_the_one_before_is_used(
    small_cfg, uninterrupted, tmp_path, capsys, damage
):
    run = tmp_path / "small"
    shutil.copytree(uninterrupted, run)
    content = bytearray((run / LAST).read_bytes())
    content[len(content) // 2] ^= 4
    (run / LAST).write_bytes(content if damage == "byte" else content[: len(content) // 3])
    assert run_here(small_cfg, tmp_path) == 0
    out = capsys.readouterr().out
    assert "warning" in out
    assert "update-00000018.pt" in out
    assert "going back to" in out
    assert "at update 12 of 18" in out
    assert (run / f"{LAST}.damaged").exists()
    assert_same_run(run, uninterrupted)


def test_run_whose_checkpoints_are_all_damaged_is_not_started_again(small_cfg, uninterrupted, tmp_path, capsys):
    shutil.copytree(uninterrupted, tmp_path / "small")
    for path in (tmp_path / "small/checkpoints").iterdir():
        path.write_bytes(b"PK")
    with pytest.raises(SystemExit):
        run_here(small_cfg, tmp_path)
    assert "no checkpoint in" in capsys.readouterr().err


def test_newest_checkpoint_of_a_newer_format_is_refused_not_skipped(small_cfg, uninterrupted, tmp_path, capsys):
    shutil.copytree(uninterrupted, tmp_path / "small")
    torch.save({"format": 99, "model": {}}, tmp_path / "small" / LAST)
    assert_refused(small_cfg, tmp_path, capsys, "format 99, this version reads up to")


def test_newest_checkpoint_that_is_intact_and_unknown_is_refused_not_skipped(
    small_cfg, uninterrupted, tmp_path, capsys
):
    shutil.copytree(uninterrupted, tmp_path / "small")
    save_state(tmp_path / "small" / LAST, {"format": 99, "model": {}, "new": SimpleNamespace()})
    with pytest.raises(ValueError, match="is intact but cannot be read here") as caught:
        load_state(tmp_path / "small" / LAST)
    assert not isinstance(caught.value, DamagedError)
    assert_refused(small_cfg, tmp_path, capsys, "it is of a newer Retoken, or there is too little memory")


def assert_refused(cfg, output, capsys, text):
    folder = output / "small/checkpoints"
    before = sorted(path.name for path in folder.iterdir())
    with pytest.raises(SystemExit) as caught:
        run_here(cfg, output)
    assert caught.value.code == 2
    assert text in capsys.readouterr().err
    assert sorted(path.name for path in folder.iterdir()) == before  # nothing is set aside


def killed_run(cfg, output, patch):
    """Run train.py in a process after the code `patch`, which ends the process with status 9 without any clean-up."""
    code = f"import os, train\nfrom engine.checkpoint import async_saver, files\n{patch}\ntrain.main(['--cfg', {str(cfg)!r}, '--output', {str(output)!r}])"
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 9, done.stderr


@pytest.mark.parametrize(("after", "cut"), [(1, 6), (2, 12)])  # an epoch is saved before its evaluation and after it
def test_kill_while_a_checkpoint_is_written_keeps_the_one_before(small_cfg, uninterrupted, tmp_path, after, cut):
    nth = (
        f"calls = []\ndef finish(file):\n  calls.append(1)\n  len(calls) > {after} and os._exit(9)\n  original(file)\n"
    )
    killed_run(
        small_cfg, tmp_path, f"original = files.ChecksumWriter.finish\n{nth}files.ChecksumWriter.finish = finish"
    )
    names = {p.name for p in (tmp_path / "small/checkpoints").iterdir()}
    written = f".update-{cut:08d}.pt."
    assert [name for name in names if not name.startswith(written)] == ["update-00000006.pt"]
    assert len(names) == 2
    assert run_here(small_cfg, tmp_path) == 0
    assert_same_run(tmp_path / "small", uninterrupted)


def test_best_file_missing_after_a_kill_is_restored(small_cfg, uninterrupted, tmp_path):
    patch = (
        "calls = []\ndef write(*args):\n"
        "  calls.append(1)\n  len(calls) > 1 and os._exit(9)\n  original(*args)\n"
        "original = async_saver.save_weights\nasync_saver.save_weights = write"
    )
    killed_run(small_cfg, tmp_path, patch)
    run = tmp_path / "small"
    assert load_state(run / "checkpoints/update-00000006.pt")["best"].keys() == {"raw", "ema"}
    assert len(list(run.glob("best_*.safetensors"))) == 1
    assert run_here(small_cfg, tmp_path, "EVAL.EVERY", 1) == 0
    assert_same_run(run, uninterrupted)
    for which in ("raw", "ema"):
        a, b = (load_file(r / f"best_{which}.safetensors") for r in (run, uninterrupted))
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("failures", [1, 2])
def test_training_continues_until_too_many_saves_failed(
    small_cfg, uninterrupted, tmp_path, monkeypatch, capsys, failures
):
    def save(self, update, *more, **how):
        if update in (6, 12)[:failures]:
            raise OSError(28, "No space left on device")
        return whole_save(self, update, *more, **how)

    whole_save = CheckpointFolder.save
    monkeypatch.setattr(CheckpointFolder, "save", save)
    if failures == 1:
        assert run_here(small_cfg, tmp_path, "CHECKPOINT.MAX_FAILURES", 2) == 0
        assert_same_run(tmp_path / "small", uninterrupted)
    else:
        with pytest.raises(SystemExit) as caught:
            run_here(small_cfg, tmp_path, "CHECKPOINT.MAX_FAILURES", 2)
        assert caught.value.code == 1
        text = capsys.readouterr().err
        assert "checkpoints cannot be written" in text
        assert "No space left on device" in text
        monkeypatch.setattr(CheckpointFolder, "save", whole_save)
        assert run_here(small_cfg, tmp_path) == 0
        assert_same_run(tmp_path / "small", uninterrupted)
