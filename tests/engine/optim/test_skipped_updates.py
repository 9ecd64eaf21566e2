"""Skipped updates: their counts, the return to a checkpoint after too many consecutive ones, and the record of the divergence."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from timm.loss import SoftTargetCrossEntropy

import config
import engine.loop
from data.build import build_data
from engine.checkpoint.async_saver import AsyncSaver
from engine.checkpoint.files import load_state
from engine.default_generators import seed_default_generators
from engine.logging.log import Log
from engine.optim.skipped_updates import DivergedError, is_rollback_target
from tests.conftest import ROOT
from tests.helpers.bounds import CONDITIONED, assert_same_but_for_order
from tests.helpers.small_loop import ALONE, batches, small_loop
from tests.helpers.small_runs import rows, run_here
from trainer.rollback import describe_divergence


def test_consecutive_skips_end_the_loop_and_metrics_leave_them_out():
    state, loop, _ = small_loop(1, max_skipped=3, log_every=2)
    good, steps = loop.criterion, []
    spoiled = {2, 4, 5, 6, 7}
    loop.criterion = lambda *args: good(*args) * (float("nan") if state.update in spoiled else 1.0)
    with pytest.raises(DivergedError, match=r"3 updates in a row \(TRAIN.MAX_SKIPPED=3\).*the last one update 7"):
        loop.train_epoch(state, batches(8), steps.append, lambda: None)
    assert [(s.update, s.skipped, s.skipped_in_run) for s in steps] == [(2, 0, 0), (4, 1, 1), (6, 2, 3)]
    assert torch.tensor([s.epoch_loss for s in steps]).isfinite().all()
    assert torch.tensor([s.loss for s in steps[:2]]).isfinite().all()
    assert loop.losses[[4 % 4, 5 % 4, 6 % 4]].isnan().all()


@pytest.mark.parametrize(("bad", "consecutive", "last"), [((4, 5, 6), 3, 7), ((4, 5, 6, 7), 4, 8)])
def test_consecutive_skips_read_an_update_late_are_counted_exactly(monkeypatch, bad, consecutive, last):
    class Late:  # as ConsecutiveSkips on CUDA
        def __init__(self):
            self.before = 0

        def read(self, skips):
            before, self.before = self.before, int(skips.consecutive)
            return before

    monkeypatch.setattr(engine.loop, "ConsecutiveSkips", Late)
    state, loop, _ = small_loop(1, max_skipped=3)
    good = loop.criterion
    loop.criterion = lambda *args: good(*args) * (float("nan") if state.update in bad else 1.0)
    with pytest.raises(DivergedError, match=f"{consecutive} updates in a row .*the last one update {last}") as caught:
        loop.train_epoch(state, batches(8), lambda step: None, lambda: None)
    assert (caught.value.consecutive, caught.value.last_update, state.update) == (consecutive, last, 8)
    sampler = SimpleNamespace(micro_batch=lambda epoch, number, j: (None, torch.tensor([number])))
    found = describe_divergence(caught.value, state, loop, sampler, ALONE)["updates"]
    assert [(u["update"], u["micro_batches"][0]) for u in found] == [
        (u + 1, {"loss": "nan", "indices": [u]}) for u in bad
    ]


def test_checkpoint_after_skips_or_with_weights_that_are_not_finite_is_no_rollback_target():
    state = {"skips": torch.tensor([0, 4, 0]), "model": {"w": torch.ones(2), "n": torch.tensor(3)}}
    assert is_rollback_target(state)
    assert is_rollback_target({"model": state["model"]})  # of the first format
    assert not is_rollback_target(state | {"skips": torch.tensor([1, 4, 0])})
    assert not is_rollback_target(state | {"model": {"w": torch.tensor([1.0, float("inf")])}})
    assert is_rollback_target(state | {"ema": None, "optimizer": {"state": {0: {"step": torch.tensor(1), "n": 3}}}})
    bad = torch.tensor([1.0, float("nan")])
    assert not is_rollback_target(state | {"ema": {"w": bad}})
    assert not is_rollback_target(state | {"optimizer": {"state": {0: {"exp_avg": bad}}}})


class Poison:
    """Patch that makes the loss NaN in the micro-batches for which `spoils(update, micro)` is true; counted from 0."""

    def __init__(self, monkeypatch, spoils):
        def seed(number, update, micro):
            self.key = (update, micro)
            seed_default_generators(number, update, micro)

        poison = self

        class Spoiled(SoftTargetCrossEntropy):
            def forward(self, x, target):
                return super().forward(x, target) * (float("nan") if spoils(*poison.key) else 1.0)

        monkeypatch.setattr(engine.loop, "seed_default_generators", seed)
        monkeypatch.setattr("engine.loss.SoftTargetCrossEntropy", Spoiled)


LAST = "checkpoints/update-00000018.pt"


def same_state(a, b, *but):
    a, b = load_state(a / LAST), load_state(b / LAST)
    assert a["facts"] == b["facts"]
    assert a["optimizer_name"] == b["optimizer_name"]
    for key in a.keys() - {"facts", "optimizer_name", *but}:
        torch.testing.assert_close(a[key], b[key], rtol=0, atol=0, msg=key)


def test_counts_survive_an_interruption_bitwise(small_cfg, tmp_path, monkeypatch):
    def interrupt(self):
        self.updates = getattr(self, "updates", 0) + 1
        if self.updates == 9:
            raise KeyboardInterrupt

    Poison(monkeypatch, lambda update, micro: (update in (3, 10) and micro) or update in (7, 8))
    often = ("CHECKPOINT.EVERY_UPDATES", 2)
    assert run_here(small_cfg, tmp_path / "whole", *often) == 0
    with monkeypatch.context() as patch:
        patch.setattr(Log, "advance", interrupt)
        assert run_here(small_cfg, tmp_path / "parts", *often) == 130
    stopped = load_state(max((tmp_path / "parts/small/checkpoints").iterdir()))
    assert (stopped["update"], stopped["skips"].tolist()) == (8, [1, 2, 0])
    assert run_here(small_cfg, tmp_path / "parts", *often) == 0
    same_state(tmp_path / "whole/small", tmp_path / "parts/small")
    assert rows(tmp_path / "whole/small") == rows(tmp_path / "parts/small")
    assert load_state(tmp_path / "whole/small" / LAST)["skips"].tolist() == [0, 4, 0]
    assert [r["skipped"] for r in rows(tmp_path / "whole/small") if r["kind"] == "train"] == [1, 0, 2, 1, 0, 0]


def test_run_rolls_back_once_and_ends_as_an_undisturbed_one(small_cfg, tmp_path, monkeypatch, capsys):
    assert run_here(small_cfg, tmp_path / "clean") == 0
    seen, kept = [], []

    def restore_best_files(self, *args):
        kept.append([path.name for path in self.run.checkpoints.numbered()])
        return whole_restore_best_files(self, *args)

    whole_restore_best_files = AsyncSaver.restore_best_files
    monkeypatch.setattr(AsyncSaver, "restore_best_files", restore_best_files)

    def spoils(update, micro):  # twice, as a transient fault of a device
        seen.append(update)
        return update >= 7 and seen.count(7) <= 2

    Poison(monkeypatch, spoils)
    assert run_here(small_cfg, tmp_path / "spoiled", "TRAIN.MAX_SKIPPED", 4, "CHECKPOINT.EVERY_UPDATES", 1) == 0
    out = capsys.readouterr().out
    assert "4 updates in a row (TRAIN.MAX_SKIPPED=4)" in out
    assert "update-00000007.pt, once" in out
    assert kept == [["update-00000006.pt", "update-00000007.pt"]]  # a start from here would not take a later one
    same_state(tmp_path / "clean/small", tmp_path / "spoiled/small", "rollbacks")
    assert load_state(tmp_path / "spoiled/small" / LAST)["rollbacks"] == 1
    assert rows(tmp_path / "clean/small") == rows(tmp_path / "spoiled/small")
    record = json.loads((tmp_path / "spoiled/small/diverged.json").read_text())
    assert record["went_back_to"] == "update-00000007.pt"
    assert [entry["update"] for entry in record["updates"]] == [8, 9, 10, 11]
    sampler = build_data(config.load(str(small_cfg)), 0, 1, "cpu").sampler
    for number, entry in enumerate(record["updates"], start=1):
        assert {m["loss"] for m in entry["micro_batches"]} == {"nan"}
        found = [m["indices"] for m in entry["micro_batches"]]
        assert found == [sampler.micro_batch(1, number, j)[1].tolist() for j in range(2)]
    weights = load_state(tmp_path / "spoiled/small/checkpoints/update-00000017.pt")["model"]
    assert record["norms"]["raw"].keys() == {name for name, w in weights.items() if w.is_floating_point()}
    assert record["norms"].keys() == {"raw", "ema"}


@pytest.mark.parametrize(("first", "good"), [(8, "update-00000006.pt"), (3, None)])
def test_run_that_diverges_again_stops_and_keeps_the_good_checkpoint(
    small_cfg, tmp_path, monkeypatch, capsys, first, good
):
    Poison(monkeypatch, lambda update, micro: update >= first)
    with pytest.raises(SystemExit) as caught:
        run_here(small_cfg, tmp_path, "TRAIN.MAX_SKIPPED", 6)
    assert caught.value.code == 1
    text = capsys.readouterr().err
    assert ("the run went back once before" if good else "there is no good checkpoint to go back to") in text
    assert "diverged.json" in text
    assert json.loads((tmp_path / "small/diverged.json").read_text())["went_back_to"] is None
    found = {p.name for p in (tmp_path / "small/checkpoints").iterdir()}
    assert (good in found) if good else (found == {"update-00000006.pt"})
    assert not (tmp_path / "small/done").exists()


def test_rollback_is_stored_before_training_continues(small_cfg, tmp_path, monkeypatch, capsys):
    def end(*_):
        raise KeyboardInterrupt

    Poison(monkeypatch, lambda update, micro: update >= 8)
    diverging = ("TRAIN.MAX_SKIPPED", 3)
    with monkeypatch.context() as patch:
        patch.setattr(Log, "reopen", end)
        patch.setattr("trainer.rollback.write_json", no_space)  # must not end the run
        assert run_here(small_cfg, tmp_path, *diverging) == 130
    assert "diverged.json cannot be written (No space left on device)" in capsys.readouterr().out
    stored = load_state(max((tmp_path / "small/checkpoints").iterdir()))
    assert (stored["update"], stored["rollbacks"]) == (6, 1)
    with pytest.raises(SystemExit):
        run_here(small_cfg, tmp_path, *diverging)
    assert "the run went back once before" in capsys.readouterr().err


def no_space(*_):
    raise OSError(28, "No space left on device")


@pytest.mark.slow
def test_loss_of_one_process_skips_the_update_on_all(small_cfg, tmp_path, monkeypatch):
    script = tmp_path / "spoiled.py"
    script.write_text(f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import engine.loop, engine.loss, train
from engine.default_generators import seed_default_generators
from timm.loss import SoftTargetCrossEntropy
key = []
def seed(number, update, micro):
    key[:] = update, micro
    seed_default_generators(number, update, micro)
class Spoiled(SoftTargetCrossEntropy):  # in update 2 the second micro-batch's loss is infinite and its gradient finite
    def forward(self, x, target):
        return super().forward(x, target) + (float("inf") if key == [2, 1] else 0.0)
engine.loop.seed_default_generators, engine.loss.SoftTargetCrossEntropy = seed, Spoiled
if __name__ == "__main__":
    sys.exit(train.main(sys.argv[1:]))
""")
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    opts = ("TRAIN.EPOCHS", "1", *CONDITIONED)
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    argv = [*launcher, str(script), "--cfg", str(small_cfg), "--output", str(tmp_path / "two"), "--opts", *opts]
    done = subprocess.run(argv, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    Poison(monkeypatch, lambda update, micro: (update, micro) == (2, 1))
    assert run_here(small_cfg, tmp_path / "one", *opts) == 0
    one, two = (load_state(tmp_path / name / "small/checkpoints/update-00000006.pt") for name in ("one", "two"))
    assert one["skips"].tolist() == two["skips"].tolist() == [0, 1, 0]
    for part in ("model", "ema"):
        assert_same_but_for_order(one[part], two[part])
    assert all(int(s["step"]) == 5 for s in two["optimizer"]["state"].values())
