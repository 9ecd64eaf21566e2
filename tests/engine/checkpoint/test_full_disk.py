"""A disk that is too full for checkpoints, for best weights, or for both: what is written, and what the messages say."""

import errno
import io
import os
import re
import shutil
import subprocess
from contextlib import redirect_stderr, redirect_stdout
from types import SimpleNamespace

import pytest
import torch

import train
from engine.checkpoint.disk_space import SpaceNeed, WriteFailure, free_bytes, size_of
from engine.checkpoint.files import load_state, read_metadata, save_state, save_weights
from engine.checkpoint.run_directory import RunDirectory
from tests.engine.checkpoint.test_async_saver import ALONE, files_limited_to, saver_of, state_of
from trainer.summary import space_warning

BEST = ("best_raw.safetensors", "best_ema.safetensors")


@pytest.fixture
def small_disk(tmp_path):
    """Function that mounts a file system of a number of KiB; skips without the right to mount."""
    mounted = []

    def mount(kib):
        path = tmp_path / f"disk{len(mounted)}"
        path.mkdir()
        command = ("mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", str(path))
        if os.geteuid() or not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("no right to mount a file system")
        mounted.append(path)
        return path

    yield mount
    for path in mounted:
        subprocess.run(("umount", "-l", str(path)), check=True)


def run(cfg, output, *opts, flags=()):
    """Train with config `cfg`; return the exit status and all output."""
    out = io.StringIO()
    with redirect_stdout(out), redirect_stderr(out):
        try:
            status = train.main(
                ["--cfg", str(cfg), "--output", str(output), *flags, "--opts", "TRAIN.EPOCHS", "1", *opts]
            )
        except SystemExit as error:
            status = error.code
    return status, out.getvalue()


@pytest.fixture(scope="module")
def sizes(small_cfg, tmp_path_factory):
    """Bytes of a checkpoint and of a file of best weights."""
    output = tmp_path_factory.mktemp("sizes")
    assert run(small_cfg, output)[0] == 0
    folder = output / "small"
    return next((folder / "checkpoints").iterdir()).stat().st_size, (folder / BEST[0]).stat().st_size


def test_summary_states_need_and_room(small_cfg, tmp_path, sizes):
    status, text = run(small_cfg, tmp_path, "CHECKPOINT.KEEP", "4")
    assert status == 0
    found = re.search(
        r"disk +(\d+) MiB for CHECKPOINT.KEEP \+ 1 = 5 checkpoints of (\d+) (.)iB and 2 files of best", text
    )
    assert abs(int(found[1]) * 2**20 - (5 * sizes[0] + 3 * sizes[1])) < 2**20
    assert int(found[2]) * {"M": 2**20, "K": 2**10}[found[3]] == pytest.approx(sizes[0], rel=0.1, abs=2**19)
    assert re.search(r"being written; \d+\.?\d* .iB free\n", text)
    assert "are needed for checkpoints" not in text
    _, text = run(small_cfg, tmp_path, "CHECKPOINT.KEEP", "4", flags=["--dry-run"])
    assert re.search(r".iB free, \d+ .iB stored already\n", text), text


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_start_warns_if_checkpoints_and_best_weights_do_not_fit(small_cfg, small_disk, sizes, keep):
    need = (keep + 1) * sizes[0] + 3 * sizes[1]
    for share, warns in ((0.8, True), (1.3, False)):
        disk = small_disk(int(share * need) // 1024)
        text = run(small_cfg, disk, "CHECKPOINT.KEEP", str(keep))[1]
        assert (f"lower CHECKPOINT.KEEP={keep}, or choose another folder with --output" in text) == warns, text


def test_files_that_are_stored_already_need_no_room(tmp_path, monkeypatch):
    need, folder = SpaceNeed(checkpoint=1000, weights=100, keep=2, kinds=2), RunDirectory(tmp_path, 2)
    monkeypatch.setattr("trainer.summary.free_bytes", lambda _: 3299)
    assert need.total == 3300
    assert "3 KiB are free in" in space_warning(need, folder)
    folder.checkpoints.path.mkdir()
    folder.checkpoints.path_of(5).write_bytes(bytes(1000))
    folder.best("raw").write_bytes(bytes(100))
    (tmp_path / "log.txt").write_bytes(bytes(100))  # no room for checkpoints
    assert folder.stored_bytes() == 1100
    for free, warns in ((2199, True), (2200, False)):
        monkeypatch.setattr("trainer.summary.free_bytes", lambda _, free=free: free)
        assert bool(space_warning(need, folder)) == warns
    for update in range(6, 10):  # more than are kept: one more must fit nevertheless
        folder.checkpoints.path_of(update).write_bytes(bytes(1000))
    for free, warns in ((1099, True), (1100, False)):
        monkeypatch.setattr("trainer.summary.free_bytes", lambda _, free=free: free)
        assert bool(space_warning(need, folder)) == warns


@pytest.mark.parametrize("answer", [SimpleNamespace(total=0, free=0), OSError(errno.EIO, "Input/output error")])
def test_unknown_room_is_no_warning(tmp_path, monkeypatch, answer):
    def usage(_):
        if isinstance(answer, OSError):
            raise answer
        return answer

    monkeypatch.setattr("engine.checkpoint.disk_space.shutil.disk_usage", usage)
    assert free_bytes(tmp_path) is None
    assert space_warning(SpaceNeed(1000, 100, 2, 2), RunDirectory(tmp_path, 2)) == ""
    assert str(WriteFailure("checkpoint", "OSError: x", 2048, None)) == "OSError: x; 2 KiB needed, free space unknown"


def test_room_of_a_folder_that_does_not_exist_is_that_of_its_ancestor(tmp_path):
    assert free_bytes(tmp_path / "a/b/c") == pytest.approx(shutil.disk_usage(tmp_path).free, rel=0.05)


def test_each_storage_is_counted_once():
    weight = torch.zeros(100)
    assert (
        size_of({"a": weight, "b": [weight, weight[:50]], "c": (torch.zeros(3, dtype=torch.int64), "text", None)})
        == 424
    )


def test_best_weights_of_a_finished_run_survive_a_disk_too_full_for_its_checkpoint(small_cfg, small_disk, sizes):
    disk = small_disk(int(0.95 * sizes[0] / 1024))  # 2 files of weights fit
    assert 0.9 * sizes[0] > 2.2 * sizes[1]
    status, text = run(small_cfg, disk)
    assert status == 1
    assert "No space left on device" in text
    assert "nothing is saved so far; best_raw.safetensors was written; best_ema.safetensors was written" in text
    error = text.strip().splitlines()[-1]
    assert re.search(r"checkpoint: OSError: .*No space left on device; \d+ .iB needed, \d+ .iB free\)", error), error
    assert "starts the run again, of which no checkpoint is saved" in error
    assert "best_raw.safetensors (of update 6) and best_ema.safetensors (of update 6); copy them first" in error
    assert "the last one" not in error
    assert [read_metadata(disk / "small" / name)["update"] for name in BEST] == [6, 6]
    assert not list((disk / "small/checkpoints").iterdir())  # nor temporary files


def test_same_without_the_right_to_mount(small_cfg, tmp_path, sizes):
    with files_limited_to(int(sizes[0] * 0.9)):
        status, text = run(small_cfg, tmp_path)
    assert status == 1
    assert "File too large" in text
    assert "best_raw.safetensors was written; best_ema.safetensors was written" in text
    assert [read_metadata(tmp_path / "small" / name)["update"] for name in BEST] == [6, 6]
    status, text = run(small_cfg, tmp_path)  # with room
    assert status == 0, text
    assert read_metadata(tmp_path / "small" / BEST[0])["update"] == 6


def test_error_names_the_checkpoint_that_the_next_start_continues(small_cfg, tmp_path, monkeypatch):
    def save(path, state):
        with files_limited_to(2**20 if path.name == "update-00000012.pt" else 2**24):
            save_state(path, state)

    monkeypatch.setattr("engine.checkpoint.files.save_state", save)
    status, text = run(small_cfg, tmp_path, "TRAIN.EPOCHS", "2")
    assert status == 1, text
    assert "update 6 is the last one saved" in text
    assert "the same command continues from update 6" in text.strip().splitlines()[-1]


@pytest.mark.parametrize("failing", ["raw", "ema", "checkpoint"])
def test_each_file_is_written_whether_or_not_others_fail(tmp_path, monkeypatch, failing):
    saver, (state, weight) = saver_of(tmp_path), state_of(5, 1.0)
    tree = state.state_dict(None)
    tree["ema"] = {"w": weight}

    def fail_for(function, name):
        def written(path, *args):
            if name in path.name:
                raise OSError(errno.ENOSPC, "No space left on device")
            return function(path, *args)

        return written

    with monkeypatch.context() as patch:
        if failing == "checkpoint":
            patch.setattr("engine.checkpoint.files.save_state", fail_for(save_state, "update"))
        else:
            patch.setattr("engine.checkpoint.async_saver.save_weights", fail_for(save_weights, failing))
        saver.save(state, ALONE, {}, {"raw": {"update": 5}, "ema": {"update": 5}})
        saver.wait()
    written = {
        "raw": saver.run.best("raw"),
        "ema": saver.run.best("ema"),
        "checkpoint": saver.run.checkpoints.path_of(5),
    }
    assert {name for name, path in written.items() if path.exists()} == set(written) - {failing}
    if failing == "checkpoint":
        assert (
            "update 5 was not saved (OSError: [Errno 28] No space left on device; 391 KiB needed," in saver.log.lines[0]
        )
    else:
        assert f"update 5 was saved, but this failed: best_{failing}.safetensors (OSError" in saver.log.lines[0]
        assert f"best_{failing}.safetensors: OSError" in str(saver.saving_error())
        assert "continues from update 5" in str(saver.saving_error())
    before = {name: path.stat().st_mtime_ns for name, path in written.items() if name != failing}
    assert saver.finish()  # tries only the file that is missing
    assert all(path.exists() for path in written.values())
    assert before == {name: path.stat().st_mtime_ns for name, path in written.items() if name != failing}


def test_failed_write_frees_its_room_at_once(small_disk):
    disk = small_disk(1024)
    (disk / "other").write_bytes(bytes(700 * 1024))
    free = free_bytes(disk)
    for _ in range(3):
        with pytest.raises(OSError, match="No space left"):
            save_state(disk / "update-1.pt", {"model": {"w": torch.zeros(200_000)}})
        assert free_bytes(disk) == free
    save_state(disk / "update-1.pt", {"model": {"w": torch.zeros(20_000)}})
    assert load_state(disk / "update-1.pt")["model"]["w"].shape == (20_000,)


def test_temporary_files_of_a_killed_run_are_removed_before_the_room_is_measured(tmp_path):
    folder = RunDirectory(tmp_path, 2)
    names = ".best_raw.safetensors.0f.tmp", "checkpoints/.update-00000004.pt.1e.tmp", "pictures/.first_batch.png.2d.tmp"
    left = [tmp_path / name for name in names]
    for path in left:
        path.parent.mkdir(exist_ok=True)
    for path in left:
        path.write_bytes(bytes(100))
    folder.write_config("")
    assert not any(path.exists() for path in left)


def test_other_processes_promise_no_checkpoint(tmp_path):
    error = str(saver_of(tmp_path).saving_error())
    assert "see the log of process 0" in error
    assert "continues" not in error


@pytest.mark.parametrize("complete", [False, True])
def test_old_checkpoints_of_a_complete_run_are_removed_at_the_next_start(tmp_path, complete):
    saver = saver_of(tmp_path)
    for update in (1, 2, 3):  # killed before the third save removed the first
        state, weight = state_of(update, update)
        saver.run.checkpoints.save(update, state.state_dict(None), prune=False)
    state.complete = complete
    saver.restore_best_files(state, {"model": {"w": weight}, "facts": {}})
    assert len(saver.run.checkpoints.numbered()) == (2 if complete else 3)
