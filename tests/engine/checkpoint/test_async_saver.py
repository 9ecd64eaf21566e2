"""AsyncSaver: saving in the background, and retries after failed writes."""

import contextlib
import errno
import resource
import threading
from types import SimpleNamespace

import torch
from safetensors.torch import load_file

import engine.checkpoint.files
from engine.checkpoint.async_saver import AsyncSaver, snapshot
from engine.checkpoint.files import load_state, read_metadata, save_state
from engine.checkpoint.run_directory import RunDirectory
from engine.distributed.processes import Processes
from engine.state import TrainState

ALONE = Processes(0, 1, 0, torch.device("cpu"), "test")


class FakeLog:
    """Log that collects its lines."""

    def __init__(self):
        self.lines = []

    def info(self, text):
        self.lines.append(text)

    warning = info


def state_of(update, value, closed=None):
    """Return a fake TrainState whose only weight is `value`, and this weight; `closed` is `update` by default."""
    closed = update if closed is None else closed
    weight = torch.full((50_000,), float(value))
    entry = {"update": update}
    tree = {
        "model": {"w": weight},
        "ema": None,
        "optimizer": {},
        "best": {"raw": entry},
        "skips": torch.zeros(3, dtype=torch.int64),
    }
    plan = SimpleNamespace(updates_per_epoch=10)
    state = SimpleNamespace(
        update=update, closed=closed, complete=False, plan=plan, best=tree["best"], state_dict=lambda _: tree
    )
    state.between_epochs = TrainState.between_epochs.fget(SimpleNamespace(**vars(state), update_in_epoch=update % 10))
    return state, weight


def test_epoch_is_saved_before_and_after_its_evaluation(tmp_path):
    saver = saver_of(tmp_path)
    for update, closed in ((5, 0), (10, 0), (10, 10)):
        saver.save(state_of(update, 1.0, closed)[0], ALONE, {}, {})
    assert saver.finish()
    assert [line.split(" in ")[0] for line in saver.log.lines] == [
        "saved update 5",
        "saved update 10 before its evaluation",
        "saved update 10",
    ]


def saver_of(path, max_failures=3):
    path.mkdir(exist_ok=True)
    return AsyncSaver(RunDirectory(path, 2), FakeLog(), max_failures)


def test_training_goes_on_while_a_snapshot_is_written(tmp_path, monkeypatch):
    gate, started = threading.Event(), threading.Event()

    def slow(path, state):
        started.set()
        assert gate.wait(30)
        save_state(path, state)

    monkeypatch.setattr(engine.checkpoint.files, "save_state", slow)
    saver, (state, weight) = saver_of(tmp_path), state_of(5, 1.0)
    saver.save(state, ALONE, {}, {"raw": {"update": 5}})
    assert started.wait(30)
    saver.poll()
    assert saver.log.lines == []
    weight.fill_(2.0)  # the next update
    gate.set()
    assert saver.finish()
    assert load_state(tmp_path / "checkpoints/update-00000005.pt")["model"]["w"].eq(1).all()
    assert load_file(tmp_path / "best_raw.safetensors")["w"].eq(1).all()
    assert len(saver.log.lines) == 1
    assert "saved update 5 in" in saver.log.lines[0]
    assert "training waited" in saver.log.lines[0]
    saver.save(state, ALONE, {}, {})  # stored already
    assert saver.finish()
    assert len(saver.log.lines) == 1


@contextlib.contextmanager
def files_limited_to(size):
    """Let no file of this process grow beyond `size` bytes: as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_full_disk_keeps_the_previous_checkpoint_and_the_best_weights_in_memory(tmp_path):
    saver = saver_of(tmp_path)
    saver.save(state_of(1, 1.0)[0], ALONE, {}, {"raw": {"update": 1}})
    saver.wait()
    with files_limited_to(100_000):
        for update in (2, 3):
            saver.save(state_of(update, update)[0], ALONE, {}, {"raw": {"update": update}} if update == 2 else {})
            saver.wait()
    assert (saver.failures, saver.failed) == (2, False)
    assert "OSError: [Errno 27] File too large" in saver.log.lines[-1]
    assert "2 of CHECKPOINT.MAX_FAILURES=3 in a row; update 1 is the last one saved" in saver.log.lines[-1]
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["update-00000001.pt"]
    assert read_metadata(tmp_path / "best_raw.safetensors")["update"] == 1
    saver.save(state_of(4, 4.0)[0], ALONE, {}, {})
    assert saver.finish()
    assert saver.failures == 0
    assert load_file(tmp_path / "best_raw.safetensors")["w"].eq(2).all()  # those of update 2, which were kept in memory


def test_best_weights_missing_everywhere_are_a_warning(tmp_path):
    saver, (state, _) = saver_of(tmp_path), state_of(9, 1.0)
    state.best["raw"] = {"update": 4}
    saver.restore_best_files(state, {"model": {}, "facts": {}})
    assert (
        "best_raw.safetensors is missing, but the best raw weights so far were those of update 4" in saver.log.lines[0]
    )


def test_failed_snapshot_is_freed_before_the_next_is_taken(tmp_path, monkeypatch):
    held = []

    def recording_snapshot(tree):
        held.append(saver._job)
        return snapshot(tree)

    monkeypatch.setattr("engine.checkpoint.async_saver.snapshot", recording_snapshot)
    saver = saver_of(tmp_path, max_failures=2)
    with files_limited_to(100_000):
        for update in (1, 2):
            saver.save(state_of(update, 1.0)[0], ALONE, {}, {})
            saver.wait()
    assert held == [None, None]
    assert saver.failed
    assert "File too large" in str(saver.saving_error())
    assert saver.finish()  # retries the last one
    assert load_state(tmp_path / "checkpoints/update-00000002.pt")["model"]["w"].eq(1).all()


def test_saver_that_gave_up_has_failed(tmp_path):
    saver = saver_of(tmp_path)
    assert not saver.failed
    saver.give_up()
    assert saver.failed


def test_checkpoints_are_not_pruned_while_best_weights_are_not_written(tmp_path, monkeypatch):
    saver = saver_of(tmp_path, max_failures=9)
    with monkeypatch.context() as patch:
        patch.setattr("engine.checkpoint.async_saver.save_weights", no_space)
        for update in (1, 2, 3, 4):
            saver.save(state_of(update, update)[0], ALONE, {}, {"raw": {"update": update}} if update == 1 else {})
            saver.wait()
    assert [path.stem for path in saver.run.checkpoints.numbered()] == [f"update-{i:08d}" for i in (1, 2, 3, 4)]
    saver.save(state_of(5, 5.0)[0], ALONE, {}, {})
    assert saver.finish()
    assert [path.stem for path in saver.run.checkpoints.numbered()] == [f"update-{i:08d}" for i in (4, 5)]
    assert load_file(tmp_path / "best_raw.safetensors")["w"].eq(1).all()


def test_best_files_that_cannot_be_restored_now_are_written_with_the_next_checkpoint(tmp_path, monkeypatch):
    saver, (state, weight) = saver_of(tmp_path), state_of(5, 1.0)
    with monkeypatch.context() as patch:
        patch.setattr("engine.checkpoint.async_saver.save_weights", no_space)
        saver.restore_best_files(state, {"model": {"w": weight}, "facts": {}})
    assert "No space left on device; 195 KiB needed, " in saver.log.lines[0]
    saver.save(state_of(6, 6.0)[0], ALONE, {}, {})
    assert saver.finish()
    assert load_file(tmp_path / "best_raw.safetensors")["w"].eq(1).all()


def no_space(*_):
    raise OSError(errno.ENOSPC, "No space left on device")
