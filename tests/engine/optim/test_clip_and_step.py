"""Losses and gradients that are not finite: skipped on all processes, counted, and too many of them end the run in order."""

import copy
import json
import os
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.loss import SoftTargetCrossEntropy
from torch import nn

import config
import engine.loop
from common.rng import seed_default_generators
from data.build import build_data
from engine.batch_norm import RunningStatistics
from engine.batch_plan import BatchPlan
from engine.build import build_loop, build_state
from engine.checkpoint.async_saver import AsyncSaver
from engine.checkpoint.files import load_state
from engine.distributed.processes import Processes
from engine.logging.log import Log
from engine.optim.clip_and_step import DivergedError, is_sound
from engine.precision import Precision
from tests.conftest import ROOT
from tests.helpers.small_runs import rows, run_here
from trainer.rollback import describe_divergence

ALONE = Processes(0, 1, 0, torch.device("cpu"), "test")
BAD = {
    "loss": lambda loss: loss * float("nan"),
    "loss only": lambda loss: loss + float("inf"),  # its gradient is finite
    "gradient only": lambda loss: loss + 0 * (loss - loss.detach()).sqrt(),  # 0 * inf
}


def parts(accumulation, optimizer="adamw", amp="off", device="cpu", model=None, **loop_fields):
    """Return state, loop and statistics of a small model with BatchNorm; the loop's bad(loss) spoils what it returns."""
    torch.manual_seed(0)
    opts = [
        "TRAIN.GLOBAL_BATCH",
        "8",
        "TRAIN.MICRO_BATCH",
        str(8 // accumulation),
        "TRAIN.AMP",
        amp,
        "EMA.DECAY",
        "0.9",
    ]
    name, _, backend = optimizer.partition(" ")
    opts += ["OPTIM.NAME", name, "OPTIM.BACKEND", backend or "auto", "SCHEDULE.NAME", "constant"]
    cfg = config.load((), opts)
    plain = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    model = (plain if model is None else model).to(device).train()
    precision = Precision(amp, torch.device(device))
    processes = replace(ALONE, device=torch.device(device))
    state = build_state(cfg, model, BatchPlan(8, 8 // accumulation, 0, 1, 50, 1), precision)
    state.sums, state.skips = state.sums.to(device), state.skips.to(device)
    loop = build_loop(cfg, model, lambda batch, update, micro, epoch: batch, precision, processes)
    for name, value in loop_fields.items():
        setattr(loop, name, value)
    return state, loop, RunningStatistics(model, accumulation, processes)


def batches(micro, device="cpu"):
    generator = torch.Generator().manual_seed(1)
    while True:
        y = torch.randint(0, 3, (micro,), generator=generator)
        yield torch.randn(micro, 6, generator=generator).to(device), F.one_hot(y, 3).float().to(device)


def everything(state):
    return copy.deepcopy(
        [state.model.state_dict(), state.ema.module.state_dict(), state.optimizer.state_dict()["state"]]
    )


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("optimizer", ["adamw for-loop", "adamw foreach", "adamw fused", "momentum", "lamb", "lion"])
def test_skipped_update_leaves_everything_as_it_was(optimizer, accumulation, bad):
    state, loop, statistics = parts(accumulation, optimizer)
    sampler, good = batches(8 // accumulation), loop.criterion
    for _ in range(2):
        loop._train_update(state, sampler, statistics)
    before = everything(state)
    calls = []

    def criterion(outputs, targets, images):  # spoils the last micro-batch of the update
        calls.append(1)
        loss = good(outputs, targets, images)
        return BAD[bad](loss) if len(calls) == accumulation else loss

    loop.criterion = criterion
    loop._train_update(state, sampler, statistics)
    torch.testing.assert_close(everything(state), before, rtol=0, atol=0)
    assert state.skips.tolist() == [1, 1, 0]
    assert state.update == 3
    loop.criterion = good
    loop._train_update(state, sampler, statistics)
    assert state.skips.tolist() == [0, 1, 0]
    after = everything(state)
    assert not torch.equal(after[0]["0.weight"], before[0]["0.weight"])
    assert after[0]["1.num_batches_tracked"] == 3
    assert all(t.isfinite().all() for t in after[1].values())


def test_good_updates_are_those_of_plain_pytorch():
    state, loop, statistics = parts(1)
    model, ema = copy.deepcopy(state.model).train(), copy.deepcopy(state.ema)
    groups = [{"params": [dict(model.named_parameters())[n] for n in names], "weight_decay": w} for names, w in GROUPS]
    optimizer = torch.optim.AdamW(groups, lr=1e-3)
    for _, (x, y) in zip(range(4), batches(8), strict=False):
        state.schedule.set(state.update)
        for group in optimizer.param_groups:
            group["lr"] = state.optimizer.param_groups[0]["lr"]
        optimizer.zero_grad()
        SoftTargetCrossEntropy()(model(x), y).backward()
        optimizer.step()
        ema.update(model)
        loop._train_update(state, iter([(x, y)]), statistics)
    torch.testing.assert_close(state.model.state_dict(), model.state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(state.ema.module.state_dict(), ema.module.state_dict(), rtol=1e-6, atol=1e-7)


GROUPS = ((("0.bias", "1.weight", "1.bias", "3.bias"), 0.0), (("0.weight", "3.weight"), 0.05))


def test_overflow_of_the_loss_scale_is_not_counted():
    state, loop, statistics = parts(2, amp="fp16")
    before, good = everything(state), loop.criterion
    loop.criterion = lambda *args: 1e4 * good(*args)
    sampler = batches(4)
    scales = [state.scaler.get_scale()]
    while state.skips[2] < 3:
        loop._train_update(state, sampler, statistics)
        scales.append(state.scaler.get_scale())
    assert state.skips.tolist() == [0, 0, 3]
    assert scales == [65536.0, 32768.0, 16384.0, 8192.0]
    torch.testing.assert_close(everything(state)[:2], before[:2], rtol=0, atol=0)
    loop.criterion = lambda *args: good(*args) * float("nan")
    loop._train_update(state, sampler, statistics)
    assert state.skips.tolist() == [1, 1, 3]
    loop.criterion = lambda *args: BAD["gradient only"](good(*args))  # the scale falls to 1, then it is no overflow
    for _ in range(14):
        loop._train_update(state, sampler, statistics)
    assert state.scaler.get_scale() < 1
    assert state.skips[0] > 1


def test_row_of_skipped_updates_ends_the_loop_and_reports_leave_them_out():
    state, loop, _ = parts(1, max_skipped=3, log_every=2)
    good, steps = loop.criterion, []
    spoiled = {2, 4, 5, 6, 7}
    loop.criterion = lambda *args: good(*args) * (float("nan") if state.update in spoiled else 1.0)
    with pytest.raises(DivergedError, match=r"3 updates in a row \(TRAIN.MAX_SKIPPED=3\).*the last one update 7"):
        loop.train_epoch(state, batches(8), steps.append, lambda: None)
    assert [(s.update, s.skipped, s.skipped_in_run) for s in steps] == [(2, 0, 0), (4, 1, 1), (6, 2, 3)]
    assert torch.tensor([s.epoch_loss for s in steps]).isfinite().all()
    assert torch.tensor([s.loss for s in steps[:2]]).isfinite().all()
    assert loop.losses[[4 % 4, 5 % 4, 6 % 4]].isnan().all()


@pytest.mark.parametrize(("bad", "row", "end"), [((4, 5, 6), 3, 7), ((4, 5, 6, 7), 4, 8)])
def test_row_that_is_seen_an_update_late_is_told_as_it_was(monkeypatch, bad, row, end):
    class Late:  # what Row is on CUDA
        def __init__(self):
            self.before = 0

        def read(self, skips):
            before, self.before = self.before, int(skips[0])
            return before

    monkeypatch.setattr(engine.loop, "ConsecutiveSkips", Late)
    state, loop, _ = parts(1, max_skipped=3)
    good = loop.criterion
    loop.criterion = lambda *args: good(*args) * (float("nan") if state.update in bad else 1.0)
    with pytest.raises(DivergedError, match=f"{row} updates in a row .*the last one update {end}") as caught:
        loop.train_epoch(state, batches(8), lambda step: None, lambda: None)
    assert (caught.value.row, caught.value.end, state.update) == (row, end, 8)
    sampler = SimpleNamespace(micro_batch=lambda epoch, number, j: (None, torch.tensor([number])))
    found = describe_divergence(caught.value, state, loop, sampler, ALONE)["updates"]
    assert [(u["update"], u["micro_batches"][0]) for u in found] == [
        (u + 1, {"loss": "nan", "indices": [u]}) for u in bad
    ]


def test_checkpoint_in_a_row_or_with_broken_weights_is_not_gone_back_to():
    state = {"skips": torch.tensor([0, 4, 0]), "model": {"w": torch.ones(2), "n": torch.tensor(3)}}
    assert is_sound(state)
    assert is_sound({"model": state["model"]})  # of the first format
    assert not is_sound(state | {"skips": torch.tensor([1, 4, 0])})
    assert not is_sound(state | {"model": {"w": torch.tensor([1.0, float("inf")])}})


class Poison:
    """Spoils the loss in the updates of a run that `spoils(update, micro)` tells; counted from 0."""

    def __init__(self, monkeypatch, spoils):
        def seed(number, update, micro):
            self.address = (update, micro)
            seed_default_generators(number, update, micro)

        poison = self

        class Spoiled(SoftTargetCrossEntropy):
            def forward(self, x, target):
                return super().forward(x, target) * (float("nan") if spoils(*poison.address) else 1.0)

        monkeypatch.setattr(engine.loop, "seed_default_generators", seed)
        monkeypatch.setattr("engine.build.SoftTargetCrossEntropy", Spoiled)


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


def test_run_goes_back_once_and_ends_as_if_nothing_had_been(small_cfg, tmp_path, monkeypatch, capsys):
    assert run_here(small_cfg, tmp_path / "clean") == 0
    seen, kept = [], []

    def restore_best_files(self, *args):
        kept.append([path.name for path in self.run.checkpoints.numbered()])
        return whole_restore_best_files(self, *args)

    whole_restore_best_files = AsyncSaver.restore_best_files
    monkeypatch.setattr(AsyncSaver, "restore_best_files", restore_best_files)

    def spoils(update, micro):  # for a while, as a broken device would
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


def test_going_back_is_stored_before_training_goes_on(small_cfg, tmp_path, monkeypatch, capsys):
    def end(*_):
        raise KeyboardInterrupt

    Poison(monkeypatch, lambda update, micro: update >= 8)
    diverging = ("TRAIN.MAX_SKIPPED", 3)
    with monkeypatch.context() as patch:
        patch.setattr(Log, "reopen", end)
        patch.setattr("trainer.rollback.write_json", no_space)  # not worth the run
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
import engine.build, engine.loop, train
from common.rng import seed_default_generators
from timm.loss import SoftTargetCrossEntropy
address = []
def seed(number, update, micro):
    address[:] = update, micro
    seed_default_generators(number, update, micro)
class Spoiled(SoftTargetCrossEntropy):  # in update 2 the second micro-batch's loss is infinite and its gradient finite
    def forward(self, x, target):
        return super().forward(x, target) + (float("inf") if address == [2, 1] else 0.0)
engine.loop.seed_default_generators, engine.build.SoftTargetCrossEntropy = seed, Spoiled
if __name__ == "__main__":
    sys.exit(train.main(sys.argv[1:]))
""")
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    opts = ("TRAIN.EPOCHS", "1", "OPTIM.EPS", "1e-3")
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    argv = [*launcher, str(script), "--cfg", str(small_cfg), "--output", str(tmp_path / "two"), "--opts", *opts]
    done = subprocess.run(argv, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    Poison(monkeypatch, lambda update, micro: (update, micro) == (2, 1))
    assert run_here(small_cfg, tmp_path / "one", *opts) == 0
    one, two = (load_state(tmp_path / name / "small/checkpoints/update-00000006.pt") for name in ("one", "two"))
    assert one["skips"].tolist() == two["skips"].tolist() == [0, 1, 0]
    for part in ("model", "ema"):
        torch.testing.assert_close(one[part], two[part], rtol=1e-3, atol=5e-6)
    assert all(int(s["step"]) == 5 for s in two["optimizer"]["state"].values())


def test_sums_are_averaged_where_the_processes_exchange_and_stay_where_they_are():
    state, _, _ = parts(1)  # as between two epochs: continued from a file, nothing on the device yet
    state.sums += 3
    assert state.mean_sums(replace(ALONE, device=torch.device("meta"))).device.type == "meta"
    state.mean_sums(ALONE).zero_()
    assert (state.sums.device.type, int(state.sums[0, 0])) == ("cpu", 3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("amp", ["off", "bf16"])
def test_update_on_cuda_is_skipped_without_waiting_for_the_device(amp):
    state, loop, statistics = parts(2, amp=amp, device="cuda")
    sampler, good = batches(4, "cuda"), loop.criterion
    loop._train_update(state, sampler, statistics)
    before = everything(state)
    prepared = iter([next(sampler) for _ in range(2)])
    loop.criterion = lambda *args: good(*args) * float("nan")
    torch.cuda.set_sync_debug_mode("error")
    try:
        loop._train_update(state, prepared, statistics)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(everything(state), before, rtol=0, atol=0)
    assert state.skips.tolist() == [1, 1, 0]


def test_state_continues_with_another_implementation_of_the_optimiser():
    fused, loop, statistics = parts(1, "adamw fused")
    loop._train_update(fused, batches(8), statistics)
    plain, loop, statistics = parts(1, "adamw for-loop")
    plain.load_state_dict(fused.state_dict(ALONE) | {"format": 2}, "c.pt")
    assert {group["fused"] for group in plain.optimizer.param_groups} == {False}
    loop._train_update(plain, batches(8), statistics)
    back, loop, statistics = parts(1, "adamw fused")
    back.load_state_dict(plain.state_dict(ALONE) | {"format": 2}, "c.pt")
    assert {group["fused"] for group in back.optimizer.param_groups} == {True}
    loop._train_update(back, batches(8), statistics)
    assert {int(s["step"]) for s in back.optimizer.state.values()} == {3}


@pytest.mark.parametrize("accumulation", [1, 2])
def test_checkpointed_model_of_timm_is_equal_to_the_plain_one(accumulation):
    found = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        model = timm.create_model("test_efficientnet", num_classes=3, drop_path_rate=0.3)
        if checkpointed:
            model.set_grad_checkpointing(True)
        state, loop, statistics = parts(accumulation, "sgd", model=model)
        for update in range(2):
            x = torch.randn(8 // accumulation, 3, 32, 32, generator=torch.Generator().manual_seed(update))
            y = F.one_hot(torch.arange(len(x)) % 3, 3).float()
            loop._train_update(state, iter([(x, y)] * accumulation), statistics)
        found.append(everything(state))
    torch.testing.assert_close(*found, rtol=0, atol=0)


def test_models_with_frozen_or_no_batch_norm_train_on():
    model = timm.create_model("test_vit", num_classes=3, img_size=32)
    statistics = RunningStatistics(model, 1, ALONE)
    statistics.begin()
    statistics.end(torch.tensor(False))
    assert not statistics.active
