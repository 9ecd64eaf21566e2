"""Learning rate schedules: formulas, warmup, cooldown, delay, and `lr_at`."""

import copy
import math

import pytest
import timm
import torch
from torch import nn

import config
from engine.batch_plan import BatchPlan
from engine.optim.build import build_learning_rate, build_optimizer


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


def test_schedule_follows_the_formula_at_every_update():
    cfg = config.load((), ["OPTIM.LR", "5e-4", "OPTIM.SCALE_BATCH", "512", "SCHEDULE.SCALED", "true"])
    plan = BatchPlan(1024, 128, 0, 1, 10, 300)
    optimizer = build_optimizer(cfg, torch.nn.Linear(2, 2))
    schedule = build_learning_rate(cfg, optimizer, plan)
    peak, low, start, warm = 1e-3, 2e-5, 2e-6, 200
    for update in (0, 1, 199, 200, 201, 1500, 2999):
        schedule.set(update)
        cosine = low + 0.5 * (peak - low) * (1 + math.cos(math.pi * update / plan.updates))
        expected = start + update * (peak - start) / warm if update < warm else cosine
        for group in optimizer.param_groups:
            assert group["lr"] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", config.CHOICES["SCHEDULE.NAME"])
@pytest.mark.parametrize(
    "more", [(), ("SCHEDULE.DELAY", "3"), ("SCHEDULE.UNIT", "epoch"), ("OPTIM.LAYER_DECAY", "0.5")]
)
def test_lr_at_equals_the_rate_that_set_sets_and_changes_nothing(name, more):
    common = ("SCHEDULE.NAME", name, "SCHEDULE.DECAY_EPOCHS", "25", "SCHEDULE.COOLDOWN_EPOCHS", "10")
    milestones = ("SCHEDULE.MILESTONES", "[30, 60]") if name == "multistep" else ()
    cfg = config.load((), ["OPTIM.LR", "1.0", *LENGTH, *common, *milestones, "SCHEDULE.WARMUP_EPOCHS", "2", *more])
    optimizer = build_optimizer(cfg, timm.create_model("test_vit", num_classes=3))
    schedule = build_learning_rate(cfg, optimizer, BatchPlan(8, 4, 0, 1, 10, 110))
    schedule.set(400)
    before = copy.deepcopy([optimizer.state_dict(), vars(schedule.scheduler) | {"optimizer": None}])
    asked = (0, 1, 3, 19, 20, 25, 249, 300, 305, 600, 999, 1000, 1099)
    rates = [schedule.lr_at(update) for update in asked]
    assert [optimizer.state_dict(), vars(schedule.scheduler) | {"optimizer": None}] == before
    for update, rate in zip(asked, rates, strict=True):
        schedule.set(update)
        assert rate == max(group["lr"] for group in optimizer.param_groups), update
    assert len(set(rates)) >= 3
