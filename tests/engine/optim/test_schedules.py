"""Schedules in time: what changes by epoch reaches the images, the targets, drop path and the average."""

import math
from itertools import pairwise

import pytest
import timm
import torch
from timm.layers import DropPath
from torch import nn

import config
import train as train_script
from data.build import build_data
from engine.batch_plan import BatchPlan
from engine.build import build_learning_rate, build_optimizer, build_state
from engine.checkpoint.files import load_state
from engine.optim.lr_schedule import drop_path_setter
from engine.precision import Precision
from tests.trainer.test_train import assert_same_state

ALL = (
    *(
        "TIMELINE.DROP_PATH_RATE",
        "0:0.1, 1:0.4",
        "TIMELINE.EMA_DECAY",
        "0:0.5 -> 2:0.9",
        "TIMELINE.MAGNITUDE",
        "0:0 -> 2:9",
    ),
    *("TIMELINE.MIX_PROB", "0:1, 2:0", "TIMELINE.IMG_SIZE", "0:32, 1:48, 2:64"),
)


def test_image_size_and_mixing_follow_the_epoch(small_cfg):
    cfg = config.load(str(small_cfg), [*ALL, "AUG.LABEL_SMOOTHING", "0"])
    data = build_data(cfg, 0, 1, "cpu")
    for epoch, size in enumerate((32, 48, 64)):
        for micro, batch in enumerate(data.train.epoch(epoch)):
            images, targets = data.stage.train(batch, micro // 2, micro % 2, epoch)
            assert images.shape == (4, 3, size, size)
            if epoch == 2:  # mixing is off: one-hot
                assert set(targets.flatten().tolist()) == {0.0, 1.0}
    first = next(iter(data.train.epoch(0)))
    assert 0 < float(data.stage.train(first, 0, 0, 0)[1].max()) < 1
    assert next(iter(data.val)).images.shape[-1] == 32


def test_image_size_follows_the_epoch_in_synthetic_data():
    opts = (
        "DATA.LOADER",
        "synthetic",
        "TRAIN.GLOBAL_BATCH",
        "4",
        "TRAIN.MICRO_BATCH",
        "4",
        "TIMELINE.IMG_SIZE",
        "0:32, 1:64",
    )
    data = build_data(config.load((), list(opts)), 0, 1, "cpu")
    assert [next(iter(data.train.epoch(epoch))).images.shape[-1] for epoch in (0, 1, 0)] == [32, 64, 32]


def test_magnitude_follows_the_epoch(small_cfg):
    data = build_data(config.load(str(small_cfg), list(ALL)), 0, 1, "cpu")
    transform = data.train._loader.dataset.transform
    assert [transform.policy_in(epoch).magnitude for epoch in (0, 1, 2)] == [0, 4.5, 9]
    assert transform.policy_in(0).std == 0.5


def state_of(model, *opts):
    cfg = config.load((), ["TRAIN.AMP", "off", *opts])
    return build_state(cfg, model, BatchPlan(8, 4, 0, 1, 10, 3), Precision("off", torch.device("cpu")))


def test_ema_decay_follows_the_epoch():
    state = state_of(nn.Linear(2, 2), "EMA.DECAY", "0.9", "TIMELINE.EMA_DECAY", "0:0.5 -> 2:0.9")
    for epoch, decay in enumerate((0.5, 0.7, 0.9)):
        state.schedule.begin_epoch(epoch)
        assert state.ema.get_decay() == pytest.approx(decay)


@pytest.mark.parametrize("name", ["groupmixformer_mobile", "convnext_atto"])
def test_drop_path_follows_the_epoch_in_our_models_and_timms(name):
    model = timm.create_model(name, drop_path_rate=0.4)
    built = [m.drop_prob for m in model.modules() if isinstance(m, DropPath)]
    schedule = state_of(model, "TIMELINE.DROP_PATH_RATE", "0:0.1, 1:0.4").schedule
    schedule.begin_epoch(0)
    quarter = [m.drop_prob for m in model.modules() if isinstance(m, DropPath)]
    assert quarter == pytest.approx([p / 4 for p in built])
    schedule.begin_epoch(1)
    assert [m.drop_prob for m in model.modules() if isinstance(m, DropPath)] == pytest.approx(built)


def test_drop_path_of_a_model_without_is_refused():
    with pytest.raises(ValueError, match=r"TIMELINE\.DROP_PATH_RATE has no effect: Linear"):
        drop_path_setter(nn.Linear(2, 2), 0.1)


def test_run_with_all_timelines_resumes_bitwise(small_cfg, tmp_path):
    argv = ["--cfg", str(small_cfg), "--opts", *ALL]
    assert train_script.main([*argv, "--output", str(tmp_path / "a")]) == 0
    assert train_script.main([*argv, "--output", str(tmp_path / "b")]) == 0
    (tmp_path / "b/small/checkpoints/update-00000018.pt").unlink()
    assert train_script.main([*argv, "--output", str(tmp_path / "b")]) == 0
    last = "small/checkpoints/update-00000018.pt"
    assert_same_state(tmp_path / "a" / last, tmp_path / "b" / last)


def learning_rates(plan, *opts):
    cfg = config.load((), ["OPTIM.LR", "1.0", "SCHEDULE.WARMUP_EPOCHS", "2", "SCHEDULE.WARMUP_LR", "0", *opts])
    optimizer = build_optimizer(cfg, nn.Linear(2, 2))
    rate = build_learning_rate(cfg, optimizer, plan)

    def at(update):
        rate.set(update)
        return optimizer.param_groups[0]["lr"]

    return at


PLAN = BatchPlan(8, 4, 0, 1, 10, 100)  # 10 updates an epoch, 100 epochs
LENGTH = ("TRAIN.EPOCHS", "100", "SCHEDULE.MIN_LR", "0.1")


@pytest.mark.parametrize(
    ("opts", "formula"),
    [
        (("SCHEDULE.NAME", "cosine"), lambda t: 0.1 + 0.45 * (1 + math.cos(math.pi * t))),
        (("SCHEDULE.NAME", "poly", "SCHEDULE.POWER", "2"), lambda t: 0.1 + 0.9 * (1 - t) ** 2),
        (("SCHEDULE.NAME", "step", "SCHEDULE.DECAY_EPOCHS", "25"), lambda t: 0.1 ** int(4 * t + 1e-9)),
        (("SCHEDULE.NAME", "multistep", "SCHEDULE.MILESTONES", "[30, 60]"), lambda t: 0.1 ** ((t >= 0.3) + (t >= 0.6))),
        (("SCHEDULE.NAME", "constant"), lambda t: 1.0),
    ],
)
@pytest.mark.parametrize("unit", ["update", "epoch"])
def test_schedules_follow_their_formulas(opts, formula, unit):
    lr = learning_rates(PLAN, *LENGTH, *opts, "SCHEDULE.UNIT", unit)
    for update in (0, 5, 15, 20, 25, 249, 250, 300, 305, 600, 777, 999):
        step = update if unit == "update" else update // 10 * 10
        expected = step / 20 if step < 20 else formula(step / 1000)
        assert lr(update) == pytest.approx(expected, rel=1e-9), update


def test_tanh_falls_to_the_minimum():
    lr = learning_rates(PLAN, *LENGTH, "SCHEDULE.NAME", "tanh")
    rates = [lr(update) for update in range(20, 1000, 10)]
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] == pytest.approx(0.1, abs=0.01)


@pytest.mark.parametrize(
    ("opts", "rate"),
    [
        (("SCHEDULE.NAME", "cosine"), 0.1),
        (("SCHEDULE.NAME", "poly"), 0.1),
        (("SCHEDULE.NAME", "step", "SCHEDULE.DECAY_EPOCHS", "50"), 0.1),
        (("SCHEDULE.NAME", "multistep", "SCHEDULE.MILESTONES", "[50, 105]"), 0.1),
        (("SCHEDULE.NAME", "constant"), 1.0),
    ],
)
@pytest.mark.parametrize("unit", ["update", "epoch"])
def test_cooldown_stays_where_the_schedule_ended(opts, rate, unit):
    lr = learning_rates(
        BatchPlan(8, 4, 0, 1, 10, 110), *LENGTH, *opts, "SCHEDULE.COOLDOWN_EPOCHS", "10", "SCHEDULE.UNIT", unit
    )
    assert [lr(update) for update in range(1000, 1100)] == pytest.approx([rate] * 100)
    assert lr(999) == pytest.approx(rate, rel=0.1)


def test_delay_takes_the_first_value_again():
    plain = learning_rates(PLAN, *LENGTH)
    late = learning_rates(PLAN, *LENGTH, "SCHEDULE.DELAY", "3")
    assert [late(u) for u in range(50)] == [plain(max(u - 3, 0)) for u in range(50)]


def test_layer_decay_scales_the_learning_rate_block_by_block():
    model = timm.create_model("stvit_small")
    cfg = config.load((), ["OPTIM.LAYER_DECAY", "0.5", "OPTIM.LR", "1.0", "SCHEDULE.WARMUP_EPOCHS", "0"])
    optimizer = build_optimizer(cfg, model)
    build_learning_rate(cfg, optimizer, PLAN).set(0)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    named = dict(model.named_parameters())
    assert rates[id(named["head.weight"])] == 1.0
    blocks = [f"stages.{s}.blocks.{b}." for s, depth in enumerate((3, 5, 9, 3)) for b in range(depth)]
    of_blocks = [{rates[id(p)] for n, p in named.items() if n.startswith(block)} for block in blocks]
    assert all(len(found) == 1 for found in of_blocks)
    values = [found.pop() for found in of_blocks]
    assert all(b / a == pytest.approx(2) for a, b in pairwise(values))
    stem = {rates[id(p)] for n, p in named.items() if n.startswith("stem.")}
    assert max(stem) < values[0]
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(named)


def test_training_in_evaluation_mode_freezes_statistics_and_drop_path(small_cfg, tmp_path):
    start = timm.create_model("test_efficientnet", num_classes=3)
    torch.save(start.state_dict(), tmp_path / "start.pt")
    argv = ["--cfg", str(small_cfg), "--init", str(tmp_path / "start.pt"), "--opts", "TRAIN.EVAL_MODE", "true"]
    assert train_script.main([*argv, "--output", str(tmp_path / "a")]) == 0
    end = load_state(tmp_path / "a/small/checkpoints/update-00000018.pt")["model"]
    for name, before in start.state_dict().items():
        if "running" in name or "tracked" in name:
            assert torch.equal(end[name], before), name
        elif name == "classifier.weight":
            assert not torch.equal(end[name], before)
    other = [*argv, "MODEL.DROP_PATH_RATE", "0.9", "--output", str(tmp_path / "b")]
    assert train_script.main(other) == 0
    again = load_state(tmp_path / "b/small/checkpoints/update-00000018.pt")["model"]
    torch.testing.assert_close(end, again, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("opts", "parts"),
    [
        (("TIMELINE.DROP_PATH_RATE", "0:1.5"), ("TIMELINE.DROP_PATH_RATE", "1.5", "0.999")),
        (("TIMELINE.EMA_DECAY", "0:0.9"), ("TIMELINE.EMA_DECAY", "EMA.DECAY is off")),
        (("TIMELINE.MAGNITUDE", "0:9", "AUG.RAND_AUGMENT", ""), ("TIMELINE.MAGNITUDE", "AUG.RAND_AUGMENT is off")),
        (("TIMELINE.IMG_SIZE", "0:100.5"), ("TIMELINE.IMG_SIZE", "whole numbers")),
        (("SCHEDULE.NAME", "multistep"), ("SCHEDULE.MILESTONES", "[150, 225]")),
        (("SCHEDULE.NAME", "cosin"), ("SCHEDULE.NAME", "did you mean cosine")),
        (("SCHEDULE.NAME", "multistep", "SCHEDULE.MILESTONES", "[9, 3]"), ("must rise", "[9.0, 3.0]")),
        (("RECIPE.HEADLINE", "ema"), ("RECIPE.HEADLINE=ema", "EMA.DECAY")),
        (("OPTIM.NAME", "sdg"), ("OPTIM.NAME", "did you mean sgd")),
    ],
)
def test_impossible_schedules_name_key_and_remedy(opts, parts):
    with pytest.raises(ValueError, match=r".") as caught:
        config.load((), list(opts))
    for part in parts:
        assert part in str(caught.value)
