"""The division of a global batch, the scaled learning rate and the schedule."""

import math

import pytest
import torch

import config
from engine.batch_plan import BatchPlan, accumulation, divisors, scaled_lr
from engine.build import build_learning_rate, build_optimizer


@pytest.mark.parametrize(("world", "expected"), [(1, 4), (2, 2), (4, 1)])
def test_accumulation_follows_from_the_world(world, expected):
    assert accumulation(32, 8, world) == expected


def test_micro_batches_of_all_processes_are_all_micro_batches():
    for world in (1, 2, 4):
        plans = [BatchPlan(32, 8, rank, world, 10, 2) for rank in range(world)]
        assert sorted(j for plan in plans for j in plan.micro_batches()) == [0, 1, 2, 3]
        assert plans[0].updates == 20


def test_impossible_division_lists_what_fits():
    with pytest.raises(ValueError, match=r"TRAIN\.GLOBAL_BATCH=32") as caught:
        accumulation(32, 8, 3)
    assert "1, 2, 4" in str(caught.value)
    assert "with 3 processes these micro-batches fit: none" in str(caught.value)


def test_learning_rate_scales_with_the_global_batch():
    assert scaled_lr(5e-4, 1024, 512) == 1e-3
    assert scaled_lr(5e-4, 1024, 0) == 5e-4


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


def test_decay_groups_leave_out_biases_norms_and_what_the_model_excepts():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(3, 4)
            self.norm = torch.nn.LayerNorm(4)
            self.table = torch.nn.Parameter(torch.zeros(2, 2))

        def no_weight_decay(self):
            return {"table"}

    model = Model()
    groups = build_optimizer(config.load(), model).param_groups
    decays = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert {name for name, p in model.named_parameters() if decays[id(p)]} == {"linear.weight"}
    assert set(decays.values()) == {0.0, 0.05}


def test_divisors_are_all_and_rising():
    for number in (1, 2, 36, 97, 1024):
        assert divisors(number) == [d for d in range(1, number + 1) if number % d == 0]
    assert len(divisors(10**8)) == 81


@pytest.mark.parametrize("name", config.CHOICES["OPTIM.NAME"])
def test_every_optimiser_offered_learns(name):
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 1)
    optimizer = build_optimizer(config.load((), ["OPTIM.NAME", name, "OPTIM.LR", "0.01"]), model)
    x = torch.randn(64, 4)
    losses = []
    for _ in range(100):
        loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


def test_optimiser_keeps_its_own_betas_and_eps_unless_they_are_set():
    layer = torch.nn.Linear(2, 2)
    own = build_optimizer(config.load((), ["OPTIM.NAME", "adopt"]), layer).param_groups[0]
    assert (own["betas"], own["eps"]) == ((0.9, 0.9999), 1e-6)
    given = ["OPTIM.NAME", "adopt", "OPTIM.BETAS", "[0.8, 0.9]", "OPTIM.EPS", "1e-3"]
    changed = build_optimizer(config.load((), given), layer).param_groups[0]
    assert (changed["betas"], changed["eps"]) == ((0.8, 0.9), 1e-3)
    with pytest.raises(ValueError, match=r"OPTIM.BETAS=\[0.8, 0.9\]: adan has 3"):
        build_optimizer(config.load((), ["OPTIM.NAME", "adan", "OPTIM.BETAS", "[0.8, 0.9]"]), layer)
