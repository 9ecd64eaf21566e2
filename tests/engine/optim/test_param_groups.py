"""Parameter groups: weight decay by kind of parameter, layer decay."""

from itertools import pairwise

import pytest
import timm
import torch

import config
from engine.batch_plan import BatchPlan
from engine.optim.build import build_learning_rate, build_optimizer

PLAN = BatchPlan(8, 4, 0, 1, 10, 100)  # 10 updates an epoch, 100 epochs


def test_weight_decay_excludes_biases_norms_and_what_the_model_names():
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
